"""lightrm quantize: a checkpoint in, a quantized folder out."""

from __future__ import annotations

from pathlib import Path

import click

import lightrm
from lightrm.progress import on_terminal


@click.command()
@click.argument("source")
@click.argument("destination", type=click.Path(path_type=Path))
@click.option("--scheme", default=None, help="w8a8, w4a8 (default), w4a16 (default for gptq); -g64 or -g32 after w4.")
@click.option("--format", "form", type=click.Choice(["lightrm", "gptq"]), default="lightrm", show_default=True)
@click.option("--calibrate", type=click.Path(exists=True, dir_okay=False), help="A file of prompts with answers.")
@click.option(
    "--tokens", type=click.IntRange(1), default=16384, show_default=True, help="Of calibration text to use, at most."
)
@click.option("--template", default=None, help="Prompt template; the model's own if not given.")
@click.option("--device", default="auto", show_default=True)
@click.option("--revision", default=None, help="Commit, tag or branch of a hub id.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def quantize(
    source: str,
    destination: Path,
    scheme: str | None,
    form: str,
    calibrate: str | None,
    tokens: int,
    template: str | None,
    device: str,
    revision: str | None,
    quiet: bool,
) -> None:
    """Write the model at SOURCE, a folder or hub id, as a quantized folder that loads at once.

    With --calibrate, rounding to 8 or 4 bits compensates its own error on the texts of a file of prompts with answers:
    slower to make, closer to the original. --format gptq writes files for auto-gptq, GPTQModel and optimum.
    """
    from lightrm.checkpoints.stored import check_free
    from lightrm.data.preferences import calibration_pairs
    from lightrm.loading import quantized_folder
    from lightrm.loading.text_side import calibration_texts

    check_free(destination)  # before the minutes of work, not after
    pairs = None
    if calibrate is not None:
        pairs, count = calibration_texts(
            source, calibration_pairs(Path(calibrate)), tokens, template, revision=revision
        )
        click.echo(f"calibration: {len(pairs)} texts of {count} tokens", err=True)
    if form == "gptq":
        from lightrm.loading.gptq_export import export_gptq

        report = export_gptq(
            source, destination, scheme=scheme or "w4a16", device=device, template=template, revision=revision,
            calibration=pairs, progress=on_terminal(quiet),
        )  # fmt: skip
    else:
        rm = lightrm.load(
            source, scheme=scheme or "w4a8", device=device, template=template, revision=revision, calibration=pairs,
            progress=on_terminal(quiet),
        )  # fmt: skip
        name = rm.template.name if rm.template is not None else None
        quantized_folder.write(destination, rm.checkpoint, rm.decoder, rm.head, rm.report, name)
        report = rm.report
    click.echo(f"{destination}: {report}")
