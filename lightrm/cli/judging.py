"""lightrm fidelity, evaluate, verify-card: what a scheme does to the scores, and what the scores are worth."""

from __future__ import annotations

import json
from pathlib import Path

import click

import lightrm
from lightrm.progress import on_terminal
from lightrm.tables import Column, Sheet, terminal

DATA = click.Path(exists=True, dir_okay=False, path_type=Path)


def tell(line: str) -> None:
    click.echo(line, err=True)


@click.command()
@click.argument("model")
@click.option("--data", required=True, type=DATA, help="Prompts with answers, in any form `lightrm evaluate` reads.")
@click.option("--schemes", default="w8a8,w4a8", show_default=True, help="Separated by commas; w4a8+cal: calibrated.")
@click.option("--reference", default="fp32", show_default=True, help="What to measure against: fp32, bf16 or fp16.")
@click.option("--reference-model", help="What MODEL was made from, where MODEL is quantized already.")
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), help="Folder for report and scores.")
@click.option("--calibrate", type=DATA, help="Texts for the schemes in +cal; not those of --data.")
@click.option(
    "--tokens", type=click.IntRange(1), default=16384, show_default=True, help="Of calibration text to use, at most."
)
@click.option("--layers", is_flag=True, help="Also measure how far each layer alone moves the scores.")
@click.option("--limit", type=click.IntRange(1), help="Prompts to take, if there are more, spread evenly.")
@click.option("--fail-under", type=float, help="Exit with 1 if Kendall's tau-b of a scheme is lower.")
@click.option("--device", default="auto", show_default=True)
@click.option("--memory", default=None, help="What may be used, such as 8GiB; what is free if not given.")
@click.option("--template", default=None, help="Prompt template; the model's own if not given.")
@click.option("--max-length", type=int, help="Tokens of a text at most.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
def fidelity(
    model: str,
    data: Path,
    schemes: str,
    reference: str,
    reference_model: str | None,
    output: Path | None,
    calibrate: Path | None,
    tokens: int,
    layers: bool,
    limit: int | None,
    fail_under: float | None,
    device: str,
    memory: str | None,
    template: str | None,
    max_length: int | None,
    quiet: bool,
) -> None:
    """Measure how far each scheme moves the scores and the rankings of MODEL, against full precision, on the same ids.

    With -o, the report is written as fidelity.json and fidelity.html, and a run that was stopped goes on where it was.
    Its tokens/s counts the tokens of all texts, a prompt's with each of its answers, and the seconds of scoring alone.
    A MODEL that `lightrm quantize` wrote gets the result into its manifest, for `lightrm.load` to show.
    """
    from lightrm.checkpoints.hub import resolve
    from lightrm.data.preferences import calibration_pairs, read_questions
    from lightrm.loading import quantized_folder
    from lightrm.loading.text_side import calibration_texts
    from lightrm.measure.measurement import measure_fidelity, spread

    folder = resolve(model)
    questions = spread(read_questions(data, tell), limit)
    texts = None
    if calibrate is not None:
        texts, count = calibration_texts(model, calibration_pairs(calibrate), tokens, template, max_length)
        tell(f"calibration: {len(texts)} texts of {count} tokens")
    report = measure_fidelity(
        model, questions, name=data.name, schemes=[name.strip() for name in schemes.split(",")], reference=reference,
        reference_model=reference_model, device=device, template=template, max_length=max_length, memory=memory,
        calibration=texts, layers=layers, keep=output, tell=tell, progress=not quiet,
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
@click.option("--data", required=True, type=DATA, help="Labelled data: JSONL (also gzipped), Parquet or CSV.")
@click.option("--scheme", default="auto", show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--memory", default=None, help="What may be used, such as 8GiB; what is free if not given.")
@click.option("--template", default=None, help="Prompt template; the model's own if not given.")
@click.option("--json", "as_json", is_flag=True, help="Print the fields as JSON.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def evaluate(
    model: str,
    data: Path,
    scheme: str,
    device: str,
    memory: str | None,
    template: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Say how often MODEL agrees with the labels of --data, beside a coin and the longer answer.

    Reads chosen and rejected answers (plain, as turns, as hh-rlhf's dialogues, RewardBench's columns) and lists with
    scores or ranks. Prints the fields that trainers print, with 95 % intervals and a breakdown.
    """
    from lightrm.data.preferences import read_questions
    from lightrm.measure import measurement

    questions = read_questions(data, tell)
    rm = lightrm.load(
        model, scheme=scheme, device=device, template=template, memory=memory, progress=on_terminal(quiet)
    )
    found = measurement.evaluate(rm, questions, model=model, data=data.name, progress=not quiet)
    if as_json:
        click.echo(json.dumps(found.fields))
    else:
        terminal().print(found)


@click.command()
@click.argument("model")
@click.option("--card", type=DATA, help="The card's file; README.md or MODEL_CARD.md beside the weights.")
@click.option("--data", type=DATA, help="Labelled data of your own, to stand beside the card's evaluation.")
@click.option("--scheme", default="auto", show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--memory", default=None, help="What may be used, such as 8GiB; what is free if not given.")
@click.option("--template", default=None, help="Prompt template; the model's own if not given.")
@click.option("--tolerance", default=0.05, show_default=True, help="How far a score may be from the published one.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
def verify_card(
    model: str,
    card: Path | None,
    data: Path | None,
    scheme: str,
    device: str,
    memory: str | None,
    template: str | None,
    tolerance: float,
    quiet: bool,
) -> None:
    """Hold MODEL against the numbers of its own card: published scores, one by one, and published evaluations.

    The default tolerance is for fp32, bf16 and fp16: a card shows two decimals of an fp16 model's scores, which fp16
    itself moves by about 0.01. A quantized scheme moves them further. Exits with 1 if a score is off.
    """
    from lightrm.checkpoints.hub import resolve
    from lightrm.data.preferences import read_questions
    from lightrm.measure import measurement
    from lightrm.measure.model_card import find_card, read_card

    path = card or find_card(resolve(model))
    published = read_card(path)
    rm = lightrm.load(
        model, scheme=scheme, device=device, memory=memory, template=template, progress=on_terminal(quiet)
    )
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
            questions = read_questions(data, tell)
            mine = measurement.evaluate(rm, questions, model=model, data=data.name, progress=on_terminal(quiet))
            sides[data.name] = mine.fields
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
