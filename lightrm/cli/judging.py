"""lightrm fidelity, evaluate, verify-card: how a scheme changes the scores, and how good the scores are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lightrm.cli.data_options import SPREAD, DataPath, check_output, data_options
from lightrm.cli.shared_options import (
    DATA_HELP,
    FILE,
    SCORING,
    calibrate,
    calibration_tokens,
    load_options,
    quiet,
    tell,
)
from lightrm.display.progress import on_terminal
from lightrm.display.tables import Column, Sheet, terminal
from lightrm.loading.options import LoadOptions

if TYPE_CHECKING:
    from lightrm.data.data_source import DataSource

SINK = click.Path(dir_okay=False, writable=True, path_type=Path)
SCHEMES_HELP = (
    "Separated by commas; w4a8+cal: calibrated. hf:fp32, hf:bf16, hf:nf4, hf:int8: as transformers' own class scores; "
    "hf:gptq: the same of a GPTQ folder."
)


@click.command()
@click.argument("model")
@click.option("--data", "file", type=DataPath(), help=f"Prompts with answers. {DATA_HELP}")
@data_options("file", SPREAD)
@click.option("--schemes", default="w8a8,w4a8", show_default=True, help=SCHEMES_HELP)
@click.option("--reference", default="fp32", show_default=True, help="What to measure against: fp32, bf16 or fp16.")
@click.option("--reference-model", help="The full-precision model that MODEL was quantized from.")
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), help="Folder for report and scores.")
@calibrate
@calibration_tokens
@click.option("--layers", is_flag=True, help="Also measure how far each layer alone moves the scores.")
@click.option("--fail-under", type=float, help="Exit with 1 if Kendall's tau-b of a scheme is lower than this.")
@load_options("engine", "device", "memory", "template", "system", "max_length", "layout", "label", "weights", "reduce")
@quiet
def fidelity(
    model: str,
    data: DataSource,
    schemes: str,
    reference: str,
    reference_model: str | None,
    output: Path | None,
    calibrate: str | None,
    tokens: int,
    layers: bool,
    limit: int | None,
    fail_under: float | None,
    options: LoadOptions,
    quiet: bool,
) -> None:
    """Measure how far each scheme moves the scores and rankings of MODEL from full precision, on the same token ids.

    With -o, the report is written as fidelity.json and fidelity.html, and a run that was stopped goes on. tokens/s
    counts the tokens of all texts, a prompt's with each of its answers, and the time of scoring alone. If `lightrm
    quantize` wrote MODEL, the result is also stored in its manifest, where `lightrm.load` shows it.
    """
    from lightrm.checkpoints.hub import resolve
    from lightrm.data.preferences import calibration_pairs, read_questions
    from lightrm.loading import quantized_folder
    from lightrm.measure.measurement import measure_fidelity, spread

    folder = resolve(model)
    questions = spread(read_questions(data, tell), limit)
    report = measure_fidelity(
        model, questions, name=data.name, schemes=[name.strip() for name in schemes.split(",")], reference=reference,
        reference_model=reference_model, engine=options.engine, device=options.device, template=options.template,
        system=options.system, max_length=options.max_length, memory=options.memory, layout=options.layout,
        label=options.label, weights=options.weights, reduce=options.reduce,
        calibration=None if calibrate is None else calibration_pairs(calibrate),
        calibration_tokens=tokens, layers=layers, keep=output, tell=tell, progress=not quiet,
    )  # fmt: skip
    terminal().print(report.table(), *(alone.table() for alone in report.sensitivity))
    if output is not None:
        from lightrm.judge.report_page import write_report

        tell(f"{write_report(report, output)}")
    if quantized_folder.is_native(folder):
        if Path(model).expanduser().is_dir():
            quantized_folder.note_fidelity(folder, report.note(report.rows[0].scheme))
        else:
            tell(f"{model} lies in the hub's cache, which is left as it is: a copy of {folder} would keep the result")
    missed = report.below(fail_under) if fail_under is not None else []
    for line in missed:
        tell(line)
    if missed:
        raise SystemExit(1)


@click.command()
@click.argument("model")
@click.option("--data", "file", type=DataPath(), help=f"Labelled data. {DATA_HELP}")
@data_options("file", SPREAD)
@click.option("-o", "--output", type=SINK, help="File for the records with their scores, as `lightrm score` writes it.")
@load_options(*SCORING)
@click.option("--json", "as_json", is_flag=True, help="Print the fields as JSON.")
@quiet
def evaluate(
    model: str,
    data: DataSource,
    limit: int | None,
    output: Path | None,
    options: LoadOptions,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure how often MODEL agrees with the labels of --data, and compare with a coin and with the longer answer.

    Reads chosen and rejected answers (plain, as turns, as hh-rlhf's dialogues, RewardBench's columns), pairs with a
    preference (HelpSteer3, Chatbot Arena, PPE) and lists with scores or ranks. Records whose labels call the answers
    equally good are left out and counted. Prints the fields that trainers print, with 95 % intervals and a breakdown.
    """
    from lightrm.data.preferences import numbered_questions
    from lightrm.jobs.judged_rows import JudgedRows
    from lightrm.measure import measurement
    from lightrm.opening import open_model

    if output is not None:
        check_output(output)
    asked = measurement.spread(numbered_questions(data, tell), limit)
    rows = None if output is None else JudgedRows.of(data, output, tell)
    rm = open_model(model, options, progress=on_terminal(quiet))
    found, scores = measurement.evaluated(rm, [one for _, one in asked], model, data.name, progress=not quiet)
    if rows is not None:
        rows.write(rm, model, dict(zip((place for place, _ in asked), scores, strict=True)))
    if as_json:
        click.echo(json.dumps(found.fields | {"ties": found.ties, "unlabelled": found.unlabelled}))
    else:
        terminal().print(found)


@click.command()
@click.argument("model")
@click.option("--card", type=FILE, help="Model card; default: README.md or MODEL_CARD.md beside the weights.")
@click.option("--data", type=DataPath(), help="Labelled data of your own, to stand beside the card's evaluation.")
@load_options("scheme", "engine", "device", "memory", "template", "system", "layout", "label", "weights", "reduce")
@click.option("--tolerance", default=0.05, show_default=True, help="How far a score may be from the published one.")
@quiet
def verify_card(
    model: str, card: Path | None, data: str | None, options: LoadOptions, tolerance: float, quiet: bool
) -> None:
    """Compare MODEL with the numbers of its own card: published scores, one by one, and published evaluations.

    The default tolerance suits fp32, bf16 and fp16: a card shows two decimals of an fp16 model's scores, which fp16
    itself moves by about 0.01. A quantized scheme moves them further. Exits with 1 if a score is outside the tolerance.
    """
    from lightrm.checkpoints.hub import resolve
    from lightrm.data.data_source import source_of
    from lightrm.data.preferences import read_questions
    from lightrm.measure import measurement
    from lightrm.measure.model_card import find_card, read_card
    from lightrm.opening import open_model

    path = card or find_card(resolve(model))
    published = read_card(path)
    rm = open_model(model, options, progress=on_terminal(quiet))
    console = terminal()
    off = 0
    for k, example in enumerate(published.examples, 1):
        scores = rm.score(example.prompt, example.responses)
        lines = []
        for text, wanted, found in zip(example.responses, example.scores, scores.tolist(), strict=True):
            far = not abs(found - wanted) <= tolerance
            off += far
            lines.append((text, f"{wanted:.2f}", f"{found:.3f}", f"{found - wanted:+.3f}", "off" if far else ""))
        headings = (
            Column("answer", words=True), Column("published"), Column("here"), Column("difference"), Column("")
        )  # fmt: skip
        console.print(Sheet(headings, tuple(lines), f"{path}, example {k}: {example.prompt}"))
    if published.examples:
        count = sum(len(example.scores) for example in published.examples)
        console.print(f"{count - off} of {count} scores within {tolerance} of the card's, as {rm.report.scheme}")
    if published.results:
        sides = dict(published.results)
        if data is not None:
            source = source_of(data)
            questions = read_questions(source, tell)
            mine = measurement.evaluate(rm, questions, model=model, data=source.name, progress=on_terminal(quiet))
            sides[source.name] = mine.fields
        names = dict.fromkeys(name for fields in published.results.values() for name in fields)
        rows = ((name, *(f"{f[name]:.4f}" if name in f else "-" for f in sides.values())) for name in names)
        names_of = (Column("", words=True), *(Column(side) for side in sides))
        console.print(Sheet(names_of, tuple(rows), f"{path}: evaluations"))
        if data is None:
            console.print(
                "pass --data with labelled pairs to see this machine's beside them; the card's are not public"
            )
    if off:
        raise SystemExit(1)
