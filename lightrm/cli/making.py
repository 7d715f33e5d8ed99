"""lightrm quantize: a checkpoint in, a quantized folder out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from lightrm.cli.shared_options import calibrate, calibration_tokens, load_options, quiet
from lightrm.display.progress import on_terminal
from lightrm.loading.options import LoadOptions


@click.command()
@click.argument("source")
@click.argument("destination", type=click.Path(path_type=Path))
@click.option(
    "--scheme",
    default=None,
    help="w8a8, w4a8 (default), w4a16 (default for gptq), w8a16 (gptq); -g64 or -g32 after w4.",
)
@click.option("--format", "form", type=click.Choice(["lightrm", "gptq"]), default="lightrm", show_default=True)
@calibrate
@calibration_tokens
@load_options("template", "device", "revision", "layout")
@quiet
def quantize(
    source: str,
    destination: Path,
    scheme: str | None,
    form: str,
    calibrate: str | None,
    tokens: int,
    options: LoadOptions,
    quiet: bool,
) -> None:
    """Write the model at SOURCE, a folder or hub id, as a quantized folder, which loads quickly.

    With --calibrate, rounding to 8 or 4 bits compensates its error on the texts of a file of prompts with answers. This
    takes longer, and the result is closer to the original. If it is stopped, the same command goes on after the last
    layer that was finished. --format gptq writes files for auto-gptq, GPTQModel and optimum.
    """
    from lightrm.checkpoints.stored import check_free
    from lightrm.data.preferences import calibration_pairs
    from lightrm.loading.calibration_draft import draft_of, remove
    from lightrm.opening import open_model

    check_free(destination)  # before the minutes of work, not after
    pairs = None if calibrate is None else calibration_pairs(calibrate)
    draft = None if pairs is None else draft_of(destination)
    if form == "gptq" and options.layout is not None:
        raise click.UsageError(
            "--layout is for lightrm's own folders: a GPTQ file does not say where its score is read"
        )
    if form == "gptq":
        from lightrm.loading.gptq_export import export_gptq

        report = export_gptq(
            source, destination, scheme=scheme or "w4a16", device=options.device, template=options.template,
            revision=options.revision, calibration=pairs, calibration_tokens=tokens, progress=on_terminal(quiet),
            draft=draft,
        )  # fmt: skip
    else:
        ids_of = None if pairs is None else lambda text: text.first_texts(pairs, tokens)
        asked = replace(options, scheme=scheme or "w4a8")
        rm = open_model(source, asked, ids_of, progress=on_terminal(quiet), draft=draft)
        rm.save(destination)
        report = rm.report
    if draft is not None:
        remove(draft)
    click.echo(f"{destination}: {report}")
