"""Options that several commands share, each written once, and how those of `lightrm.load` become one record."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click

from lightrm.cli.data_options import DataPath
from lightrm.loading.options import EngineName, LoadOptions

Command = Callable[..., Any]
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
DATA_HELP = "JSONL, JSON, CSV or TSV, also by gzip or zstd, or Parquet; or hf://datasets/OWNER/NAME/FILE."


def numbers_by_name(context: click.Context, option: click.Parameter, value: str | None) -> dict[str, float] | None:
    """Return NAME=NUMBER,NAME=NUMBER as numbers by name; None for None. Raises BadParameter."""
    if value is None:
        return None
    found: dict[str, float] = {}
    for part in value.split(","):
        name, _, number = part.rpartition("=")
        try:
            found[name.strip()] = float(number)
        except ValueError as error:
            raise click.BadParameter(f"expected NAME=NUMBER,NAME=NUMBER, found {part!r}") from error
    return found


LOADING = {
    "scheme": click.option(
        "--scheme", default="auto", show_default=True,
        help="auto, fp32, bf16, fp16, w8a8, w4a8, w4a8-g32, w4a16, nf4, ...",
    ),
    "engine": click.option(
        "--engine", type=click.Choice(get_args(EngineName)), default="auto", show_default=True,
        help="lightrm: its own decoder. transformers: its class. auto: lightrm's own where there is one.",
    ),
    "device": click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
    "memory": click.option("--memory", help="Memory to use at most, such as 8GiB; default: most of what is free."),
    "template": click.option("--template", help="Prompt template; default: the model's own."),
    "system": click.option("--system", help="Text of a system turn for prompts that have none."),
    "max_length": click.option("--max-length", type=int, help="Tokens of a text at most; default: the template's."),
    "revision": click.option("--revision", help="Commit, tag or branch of a hub id."),
    "layout": click.option("--layout", help="nemotron, math_shepherd or rlhflow_prm, whose files do not tell it."),
    "label": click.option("--label", help="Which of several attributes is the score; default: all are written."),
    "weights": click.option(
        "--weights", callback=numbers_by_name, metavar="NAME=NUMBER,...",
        help="Several attributes, each times its number, are the score.",
    ),
    "reduce": click.option(
        "--reduce", help="min, product, last or mean of the scores of an answer's steps; default: all are written."
    ),
    "base": click.option("--base", help="Base model of a LoRA adapter, if it is not where its config says."),
    "token_budget": click.option(
        "--token-budget", type=click.IntRange(1), help="Tokens computed at once; default: as many as pay and fit."
    ),
    "parse_specials": click.option(
        "--parse-specials", is_flag=True, help="Let special tokens in the texts act, to compare with other tools."
    ),
    "strict": click.option("--strict", is_flag=True, help="Refuse texts that are too long instead of cutting them."),
}  # fmt: skip
SCORING = (  # what a command takes that loads a model and scores answers
    "scheme", "engine", "device", "memory", "template", "system", "max_length", "strict", "parse_specials", "layout",
    "label", "weights", "reduce", "revision", "base", "token_budget",
)  # fmt: skip
quiet = click.option("--quiet", is_flag=True, help="Show no progress bars.")
calibrate = click.option(
    "--calibrate",
    type=DataPath(),
    help="Prompts with answers, on which rounding is corrected: a file or hf://datasets/...",
)
calibration_tokens = click.option(
    "--tokens", type=click.IntRange(1), default=16384, show_default=True, help="Calibration tokens to use at most."
)


def load_options(*names: str) -> Callable[[Command], Command]:
    """Give a command some options of `lightrm.load`; it gets them together, as `options`."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(**values: Any) -> Any:
            options = LoadOptions(**{name: values.pop(name) for name in names})
            return command(options=options, **values)

        for name in reversed(names):
            run = LOADING[name](run)
        return run

    return decorate


def tell(line: str) -> None:
    """Print a line to standard error."""
    click.echo(line, err=True)
