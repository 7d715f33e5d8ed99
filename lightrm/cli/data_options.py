"""Options that say which data a command reads: a file or an address on the hub, which columns, how many records."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from lightrm.data.data_source import DataSource

Command = Callable[..., Any]
ADDRESS = "hf://"
SPELLED = {"source": "SOURCE", "file": "--data"}
USUAL = {"source": "-"}  # standard input


class DataPath(click.Path):
    """A file that exists, "-" where a command takes it, or an address on the hub."""

    name = "file"

    def __init__(self, *, allow_dash: bool = False) -> None:
        super().__init__(exists=True, dir_okay=False, allow_dash=allow_dash)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if str(value).startswith(ADDRESS) else super().convert(value, param, ctx)


def data_options(place: str, limit: str, needed: bool = True) -> Callable[[Command], Command]:
    """Give a command --dataset, --config, --split, columns and --limit; it gets the source they name, as `data`.

    place: the name of its parameter that a file is given by. limit: the help of --limit. FIRST makes it a part of the
    source; otherwise the command gets it. needed: whether a source must be named; else the command may get None.
    """

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(**values: Any) -> Any:
            names = ("dataset", "config", "split", "prompt_column", "response_column", "limit")
            given = {name: values.pop(name) for name in names}
            asked = values.pop(place)
            if limit != FIRST:
                values["limit"] = given.pop("limit")
            named = needed or any(value not in (None, ()) for value in (asked, *given.values()))
            return command(data=chosen(asked, place, **given) if named else None, **values)

        for option in reversed((*OPTIONS, click.option("--limit", type=click.IntRange(1), help=limit))):
            run = option(run)
        return run

    return decorate


FIRST = "Number of records to read, from the first on."
SPREAD = "Number of records to use, spread evenly over the data."
OPTIONS = (
    click.option("--dataset", help="Data set on the hub, OWNER/NAME or OWNER/NAME@REVISION, instead of a file."),
    click.option("--config", help="Configuration of the data set; needed if it has several."),
    click.option("--split", help="Split of the data set; needed if it has several."),
    click.option("--prompt-column", help="Column with the prompt; default: by the names of known forms."),
    click.option(
        "--response-column", multiple=True,
        help="Column with the answer, or with a list of answers; give it again for each further answer.",
    ),
)  # fmt: skip


def chosen(
    asked: str | None,
    place: str,
    dataset: str | None,
    config: str | None,
    split: str | None,
    prompt_column: str | None,
    response_column: tuple[str, ...],
    limit: int | None = None,
) -> DataSource:
    """Return the source that the options name. Raises UsageError unless they name one, InputError as `source_of`."""
    from lightrm.data.data_source import source_of
    from lightrm.data.record_columns import Columns

    if asked is None and dataset is None:
        asked = USUAL.get(place)
    if (asked is None) == (dataset is None):
        said = "both" if asked is not None else "neither"
        named = SPELLED[place]
        raise click.UsageError(f"pass {named} (a file, or hf://datasets/...) or --dataset OWNER/NAME: found {said}")
    where = f"{ADDRESS}datasets/{dataset}" if asked is None else asked
    return source_of(where, config=config, split=split, columns=Columns(prompt_column, response_column), limit=limit)


def check_output(output: Path) -> None:
    """Raise an error for an output that cannot be written, before the minutes of work."""
    from lightrm.jobs.job_outputs import ending_of

    if not output.parent.is_dir():
        raise click.BadParameter(f"the folder {output.parent} does not exist", param_hint="--output")
    ending_of(output)
