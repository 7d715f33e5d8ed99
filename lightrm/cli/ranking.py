"""lightrm rank, explain: answers best first, and what is behind one score; of texts or of a file of records."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from lightrm.cli.shared_options import FILE, load_options, quiet, tell
from lightrm.display.tables import Column, Sheet, terminal
from lightrm.errors import InputError, LightRMError
from lightrm.files import UNFINISHED, to_disk
from lightrm.loading.options import LoadOptions

if TYPE_CHECKING:
    from lightrm.data.records import Row
    from lightrm.judge.exact_ranking import Ranking
    from lightrm.scorer import RewardModel

DATA_HELP = "Prompts with answers, in any form that `lightrm score` reads, in place of PROMPT and answers."
SINK = click.Path(dir_okay=False, path_type=Path, allow_dash=True)
LOADED = (
    "scheme", "engine", "device", "memory", "template", "system", "max_length", "strict", "layout", "label", "weights",
    "reduce",
)  # fmt: skip
Made = tuple[Sheet | str, list[dict[str, Any]]]  # what is printed, and the rows that are written
Makes = Callable[[Any, Sequence[str]], Made]  # of a prompt with its answers


@click.command()
@click.argument("model")
@click.argument("prompt", required=False)
@click.argument("responses", nargs=-1)
@click.option("--data", type=FILE, help=DATA_HELP)
@click.option("-o", "--output", type=SINK, help="File for rows of JSON, one a record; '-' is standard output.")
@click.option("--top-k", type=click.IntRange(1), help="How many answers to show, the best; default: all.")
@load_options(*LOADED)
@quiet
def rank(
    model: str,
    prompt: str | None,
    responses: tuple[str, ...],
    data: Path | None,
    output: Path | None,
    top_k: int | None,
    options: LoadOptions,
    quiet: bool,
) -> None:
    """Show the answers to PROMPT, best first.

    With --data, the answers of each record. With -o, rows: {"record": number, "prompt": ..., "ranking": [{"index": ...,
    "score": ..., "response": ...}, ...]}, where index is the answer's place in the record, counted from 0. Records that
    cannot be ranked are reported by number and left out; the exit status is then 1.
    """
    rm = opened(model, prompt, responses, data, options, quiet)

    def ranked(asked: Any, answers: Sequence[str]) -> Made:
        found = rm.rank(asked, answers, top_k=top_k)
        best = [{"index": r.index, "score": r.score, "response": r.response} for r in found]
        return table(found, asked), [{"prompt": asked, "ranking": best}]

    report(ranked, prompt, responses, data, output)


@click.command()
@click.argument("model")
@click.argument("prompt", required=False)
@click.argument("responses", nargs=-1)
@click.option("--data", type=FILE, help=DATA_HELP)
@click.option("-o", "--output", type=SINK, help="File for rows of JSON, one an answer; '-' is standard output.")
@load_options(*LOADED)
@quiet
def explain(
    model: str,
    prompt: str | None,
    responses: tuple[str, ...],
    data: Path | None,
    output: Path | None,
    options: LoadOptions,
    quiet: bool,
) -> None:
    """Show what is behind the score of each answer to PROMPT: the text, the token ids and the pieces that were scored.

    With -o, rows with "record", "prompt", "response", "index" (the answer's place in the record, counted from 0) and
    the fields of an explanation. Records that cannot be scored are reported by number and left out; the exit status is
    then 1.
    """
    rm = opened(model, prompt, responses, data, options, quiet)

    def explained(asked: Any, answers: Sequence[str]) -> Made:
        found = [rm.explain(asked, answer) for answer in answers]
        rows = [
            {"prompt": asked, "index": k, "response": answer, **asdict(one)}
            for k, (answer, one) in enumerate(zip(answers, found, strict=True))
        ]
        return "\n\n".join(map(str, found)), rows

    report(explained, prompt, responses, data, output)


def opened(
    model: str, prompt: str | None, responses: Sequence[str], data: Path | None, options: LoadOptions, quiet: bool
) -> RewardModel:
    """Raises UsageError unless there is a prompt with answers, or a file of them: before the model is loaded."""
    from lightrm.display.progress import on_terminal
    from lightrm.opening import open_model

    if data is not None and prompt is not None:
        raise click.UsageError("pass PROMPT and answers, or --data, not both")
    if data is None and not responses:
        raise click.UsageError("pass PROMPT and at least one answer, or --data FILE")
    return open_model(model, options, progress=on_terminal(quiet))


def report(make: Makes, prompt: str | None, responses: Sequence[str], data: Path | None, output: Path | None) -> None:
    """Print what is made of each record, or write its rows. Exits with 1 if there was a record of which nothing could
    be made."""
    from lightrm.data.records import to_line

    bad = 0
    with sink(output) as file:
        for row in rows_of(prompt, responses, data):
            try:
                shown, rows = made(make, row)
            except LightRMError as error:
                if data is None:
                    raise
                bad += 1
                tell(f"{row.name}: {error}")
                continue
            if file is None:
                terminal().print(shown, soft_wrap=isinstance(shown, str))
            else:
                file.writelines(to_line({"record": row.number, **one}) for one in rows)
    if bad:
        tell(f"{bad} records were left out")
        raise SystemExit(1)


def rows_of(prompt: str | None, responses: Sequence[str], data: Path | None) -> Iterator[Row]:
    from lightrm.data.record_files import read_rows
    from lightrm.data.records import Row

    if data is not None:
        return read_rows(data)
    return iter([Row(1, b"", {"prompt": prompt, "responses": list(responses)})])


def made(make: Makes, row: Row) -> Made:
    """Raises LightRMError if a record cannot be read or scored."""
    from lightrm.data.record_forms import answers_of

    if row.error:
        raise InputError(row.error)
    found = answers_of(row.record, labels=False)
    if found.prompts:
        raise InputError("each answer of this record follows a conversation of its own: `lightrm score` scores them")
    return make(found.prompt, found.responses)


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
    title = prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))
    columns = (Column("score"), Column("index"), Column("response", words=True))
    return Sheet(columns, tuple((f"{r.score:+.3f}", str(r.index), r.response) for r in found), title)
