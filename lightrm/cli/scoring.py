"""lightrm score, demo: texts in, scores out."""

from __future__ import annotations

from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

import lightrm
from lightrm.cli.data_options import FIRST, DataPath, check_output, data_options
from lightrm.cli.shared_options import load_options, quiet, tell
from lightrm.loading.options import LoadOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightrm.data.data_source import DataSource
    from lightrm.data.records import Row
    from lightrm.display.progress import AdvanceRows

SINK = click.Path(dir_okay=False, writable=True, allow_dash=True)


def needed(ctx: click.Context, param: click.Parameter, model: str | None) -> str:
    """Raise UsageError if no model is named: a score of the bundled one is of use to nobody but its tests."""
    if model is None and not ctx.resilient_parsing:
        raise click.UsageError(
            "pass -m MODEL, a folder or a hub id of a reward model; `lightrm demo` shows what the bundled one does"
        )
    return model or ""


@click.command()
@click.argument("source", required=False, type=DataPath(allow_dash=True))
@data_options("source", FIRST)
@click.option("-m", "--model", callback=needed, help="Folder or hub id of the reward model. Needed.")
@click.option("-o", "--output", default="-", show_default=True, type=SINK, help="File to write.")
@load_options(
    "scheme", "engine", "device", "memory", "template", "system", "max_length", "strict", "parse_specials", "layout",
    "label", "reduce", "revision", "base", "token_budget",
)  # fmt: skip
@quiet
def score(data: DataSource, model: str, output: str, options: LoadOptions, quiet: bool) -> None:
    """Score records from SOURCE: JSONL, a JSON array, CSV or TSV (all also by gzip or zstd), Parquet, or a file on the
    hub, hf://datasets/OWNER/NAME/FILE; '-' is standard input. --dataset OWNER/NAME reads a split of a data set.

    A record is {"prompt": ..., "responses": [...]}, or has another of the forms that `lightrm evaluate` reads. A prompt
    is a string or a list of {"role", "content"} turns. Each record is written with two more fields: "scores", one for
    each answer in order (chosen answers before rejected ones), and "scored_by". The output is .jsonl, .jsonl.gz, .csv,
    .csv.gz or .parquet. With -o, a run that was stopped goes on when the same command is started again.

    A process reward model writes "steps" in place of "scores": for each answer the scores of its steps, as its own form
    divides the answer. A model with several attributes writes "attributes": for each answer a number by name. --reduce
    and --label make one score of them.

    Records that cannot be scored are reported by number and left out. The exit status is 1 if there were any or if the
    run failed, and 0 if all records were scored.
    """
    from lightrm.data.record_files import stream_rows
    from lightrm.display.progress import on_terminal, row_progress
    from lightrm.files import UNFINISHED
    from lightrm.jobs import job
    from lightrm.opening import open_model

    def make_bar(rows: int | None) -> AbstractContextManager[AdvanceRows]:
        return row_progress(rows, not quiet)

    if output != "-":
        check_output(Path(output))
    rm = open_model(model, options, progress=on_terminal(quiet))
    if output != "-":
        try:
            counts = job.score_file(rm, model, data, Path(output), tell, make_bar)
        except KeyboardInterrupt:
            tell(f"stopped; the same command goes on from {output}{UNFINISHED}")
            raise
    else:
        if data.piped:
            every = stream_rows(click.open_file("-", "rb"), data.name, data.columns.names)
            rows: Iterator[Row] = islice(data.checked(every, data.name), data.limit)
        else:
            rows = data.rows()
        total = None if data.piped or quiet else sum(1 for _ in data.rows())
        with make_bar(total) as advance_rows, click.open_file("-", "w", encoding="utf-8") as sink:
            counts = job.score_stream(rm, model, rows, sink, tell, advance_rows, data.columns)
    if counts.resumed:
        tell(f"{counts.resumed} records were scored by an earlier run")
    if counts.cut:
        tell(f"{counts.cut} answers were longer than {rm.max_length} tokens with their prompt and were cut")
    if counts.bad:
        tell(f"{counts.bad} of {counts.good + counts.bad} lines were not scored")
        raise SystemExit(1)


@click.command()
def demo() -> None:
    """Score a few answers with the bundled model."""
    from lightrm.cli.demo_texts import EXAMPLES

    rm = lightrm.load("demo")
    console = Console()
    for prompt, responses in EXAMPLES:
        table = Table(title=Text(prompt), title_justify="left", title_style="bold", expand=True)
        for column in ("score", "the answer", "says"):
            table.add_column(column, overflow="fold")  # Chinese has no spaces to wrap at
        ranked = rm.rank(prompt, [text for _, text in responses])
        for row in ranked:
            note, text = responses[row.index]
            table.add_row(f"{row.score:+.2f}", Text(note), Text(text))
        console.print(table)
    console.print(repr(rm), style="dim", markup=False, highlight=False)
