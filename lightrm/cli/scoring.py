"""lightrm score, demo: texts in, scores out."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

import lightrm
from lightrm.cli.shared_options import load_options, quiet, tell
from lightrm.loading.options import LoadOptions

if TYPE_CHECKING:
    from lightrm.display.progress import AdvanceRows

SINK = click.Path(dir_okay=False, writable=True, allow_dash=True)


@click.command()
@click.argument("source", default="-", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option("-m", "--model", default="demo", show_default=True, help="Folder, hub id, or 'demo'.")
@click.option("-o", "--output", default="-", show_default=True, type=SINK, help="File to write.")
@load_options("scheme", "engine", "device", "memory", "template", "system", "strict", "layout", "label", "reduce")
@quiet
def score(source: str, model: str, output: str, options: LoadOptions, quiet: bool) -> None:
    """Score records from SOURCE: JSONL, a JSON array or CSV (all also gzipped), or Parquet; '-' is standard input.

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
    from lightrm.data import record_files
    from lightrm.display.progress import on_terminal, row_progress
    from lightrm.files import UNFINISHED
    from lightrm.jobs import job, job_outputs
    from lightrm.opening import open_model

    def make_bar(rows: int | None) -> AbstractContextManager[AdvanceRows]:
        return row_progress(rows, not quiet)

    if output != "-":
        if not Path(output).parent.is_dir():
            raise click.BadParameter(f"the folder {Path(output).parent} does not exist", param_hint="--output")
        job_outputs.ending_of(Path(output))
    rm = open_model(model, options, progress=on_terminal(quiet))
    if output != "-":
        try:
            counts = job.score_file(rm, model, source, Path(output), tell, make_bar)
        except KeyboardInterrupt:
            tell(f"stopped; the same command goes on from {output}{UNFINISHED}")
            raise
    else:
        piped = source == "-"
        rows = record_files.line_rows(click.open_file("-", "rb")) if piped else record_files.read_rows(Path(source))
        total = None if piped or quiet else sum(1 for _ in record_files.read_rows(Path(source)))
        with make_bar(total) as advance_rows, click.open_file("-", "w", encoding="utf-8") as sink:
            counts = job.score_stream(rm, model, rows, sink, tell, advance_rows)
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
