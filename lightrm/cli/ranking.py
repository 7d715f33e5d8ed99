"""lightrm rank, explain: answers best first, and what is behind one score; of texts or of records."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from lightrm.cli.data_options import FIRST, Command, DataPath, data_options
from lightrm.cli.shared_options import DATA_HELP, SCORING, load_options, quiet, tell
from lightrm.display.tables import Column, Sheet, terminal
from lightrm.errors import InputError, LightRMError
from lightrm.files import UNFINISHED, to_disk
from lightrm.loading.options import LoadOptions

if TYPE_CHECKING:
    from lightrm.data.data_source import DataSource
    from lightrm.data.record_forms import Answers
    from lightrm.data.records import Row
    from lightrm.judge.exact_ranking import Ranking
    from lightrm.scorer import RewardModel

INSTEAD = f"Prompts with answers, in place of PROMPT and answers. {DATA_HELP}"
SINK = click.Path(dir_okay=False, path_type=Path, allow_dash=True)
Made = tuple[Sheet | str, list[dict[str, Any]]]  # what is printed, and the rows that are written
Makes = Callable[["RewardModel", "Answers"], Made]


def texts_or_data(each: str) -> Callable[[Command], Command]:
    """Give a command a model, a prompt with answers or the options of data in their place, and -o. each: what a row
    holds."""
    parts = (
        click.argument("model"),
        click.argument("prompt", required=False),
        click.argument("responses", nargs=-1),
        click.option("--data", "file", type=DataPath(), help=INSTEAD),
        data_options("file", FIRST, needed=False),
        click.option("-o", "--output", type=SINK, help=f"File for rows of JSON, one {each}; '-' is standard output."),
    )

    def decorate(command: Command) -> Command:
        for part in reversed(parts):
            command = part(command)
        return command

    return decorate


@click.command()
@texts_or_data("a record")
@click.option("--top-k", type=click.IntRange(1), help="How many answers to show, the best; default: all.")
@load_options(*SCORING)
@quiet
def rank(
    model: str,
    prompt: str | None,
    responses: tuple[str, ...],
    data: DataSource | None,
    output: Path | None,
    top_k: int | None,
    options: LoadOptions,
    quiet: bool,
) -> None:
    """Show the answers to PROMPT, best first.

    With --data or --dataset, the answers of each record. With -o, rows: {"record": number, "prompt": ..., "ranking":
    [{"index": ..., "score": ..., "response": ...}, ...]}, where index is the answer's place in the record, counted from
    0. Records that cannot be ranked are reported by number and left out; the exit status is then 1.
    """

    def ranked(rm: RewardModel, answers: Answers) -> Made:
        if answers.prompts:
            raise InputError(
                "each answer of this record follows a conversation of its own: `lightrm score` scores them"
            )
        found = rm.rank(answers.prompt, answers.responses, top_k=top_k)
        best = [{"index": r.index, "score": r.score, "response": r.response} for r in found]
        return table(found, answers.prompt), [{"prompt": answers.prompt, "ranking": best}]

    check(prompt, responses, data)
    report(model, options, quiet, ranked, rows_of(prompt, responses, data), data, output)


@click.command()
@texts_or_data("an answer")
@load_options(*SCORING)
@quiet
def explain(
    model: str,
    prompt: str | None,
    responses: tuple[str, ...],
    data: DataSource | None,
    output: Path | None,
    options: LoadOptions,
    quiet: bool,
) -> None:
    """Show what is behind the score of each answer to PROMPT: the text, the token ids and the pieces that were scored.

    With -o, rows with "record", "prompt", "response", "index" (the answer's place in the record, counted from 0) and
    the fields of an explanation. Records that cannot be scored are reported by number and left out; the exit status is
    then 1.
    """

    def explained(rm: RewardModel, answers: Answers) -> Made:
        each = [(asked, answer) for asked, some in answers.asked for answer in some]
        found = [rm.explain(asked, answer) for asked, answer in each]
        rows = [
            {"prompt": asked, "index": k, "response": answer, **asdict(one)}
            for k, ((asked, answer), one) in enumerate(zip(each, found, strict=True))
        ]
        return "\n\n".join(map(str, found)), rows

    check(prompt, responses, data)
    report(model, options, quiet, explained, rows_of(prompt, responses, data), data, output)


def check(prompt: str | None, responses: Sequence[str], data: DataSource | None) -> None:
    """Raises UsageError unless there is a prompt with answers, or data with them: before the model is loaded."""
    if data is not None and prompt is not None:
        raise click.UsageError("pass PROMPT and answers, or --data, not both")
    if data is None and not responses:
        raise click.UsageError("pass PROMPT and at least one answer, or --data FILE")


def report(
    model: str,
    options: LoadOptions,
    quiet: bool,
    make: Makes,
    rows: Iterator[Row],
    data: DataSource | None,
    output: Path | None,
) -> None:
    """Load the model and print what is made of each record, or write its rows. Exits with 1 if there was a record of
    which nothing could be made."""
    from lightrm.data.records import to_line
    from lightrm.display.progress import on_terminal
    from lightrm.opening import open_model

    bad = 0
    with sink(output) as file:
        rm = open_model(model, options, progress=on_terminal(quiet))
        for row in rows:
            try:
                shown, found = make(rm, answers_in(row, data))
            except LightRMError as error:
                if data is None:
                    raise
                bad += 1
                tell(f"{row.name}: {error}")
                continue
            if file is None:
                terminal().print(shown, soft_wrap=isinstance(shown, str))
            else:
                place = {"file": row.file} if data is not None and len(data.files) > 1 else {}
                file.writelines(to_line({**place, "record": row.number, **one}) for one in found)
    if bad:
        tell(f"{bad} records were left out")
        raise SystemExit(1)


def rows_of(prompt: str | None, responses: Sequence[str], data: DataSource | None) -> Iterator[Row]:
    from lightrm.data.records import Row

    return iter([Row(1, b"", {"prompt": prompt, "responses": list(responses)})]) if data is None else data.rows()


def answers_in(row: Row, data: DataSource | None) -> Answers:
    """Raises InputError if a record cannot be read."""
    from lightrm.data.record_forms import answers_of

    if row.error:
        raise InputError(row.error)
    return answers_of(row.record, labels=False) if data is None else data.answers(row.record, labels=False)


@contextmanager
def sink(output: Path | None) -> Iterator[IO[str] | None]:
    """Yield a file to write, which is there when all is written, or None to print. Raises InputError if it exists."""
    if output is None:
        yield None
        return
    if str(output) != "-" and output.exists():
        raise InputError(f"{output} exists already: remove it, or name another output")
    if str(output) == "-":
        with click.open_file("-", "w", encoding="utf-8") as file:
            yield file
        return
    draft = output.with_name(output.name + UNFINISHED)
    try:
        with draft.open("w", encoding="utf-8") as file:
            yield file
        to_disk(draft)
        os.replace(draft, output)
    finally:
        draft.unlink(missing_ok=True)


def table(found: Ranking, prompt: Any) -> Sheet:
    columns = (Column("score"), Column("index"), Column("response", words=True))
    return Sheet(columns, tuple((f"{r.score:+.3f}", str(r.index), r.response) for r in found), title_of(prompt))


def title_of(prompt: Any) -> str:
    """Return the text that a prompt ends in."""
    said = prompt if isinstance(prompt, str) else prompt[-1].get("content")
    return said if isinstance(said, str) else "".join(str(part.get("text", "")) for part in said or ())
