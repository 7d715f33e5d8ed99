"""The command line: score, demo, inspect, plan, quantize, doctor. Parses, prints, and leaves the work to the scorer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

import lightrm
from lightrm.errors import InputError, LightRMError

SINK = click.Path(dir_okay=False, writable=True, allow_dash=True)


class Group(click.Group):
    """Shows a LightRMError as one sentence, not as a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LightRMError as error:
            raise click.ClickException(f"{type(error).__name__}: {error}") from error


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(lightrm.__version__)
def main() -> None:
    """Score answers with reward models, on one GPU or a CPU, without remote code."""


@main.command()
@click.argument("source", default="-", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option("-m", "--model", default="demo", show_default=True, help="Folder, hub id, or 'demo'.")
@click.option("-o", "--output", default="-", show_default=True, type=SINK, help="JSONL or .parquet file to write.")
@click.option(
    "--scheme", default="auto", show_default=True, help="auto, fp32, bf16, fp16, w8a8, w4a8, w4a8-g32, w4a16, nf4, ..."
)
@click.option("--device", default="auto", show_default=True)
@click.option("--memory", default=None, help="What may be used, such as 8GiB; what is free if not given.")
@click.option("--template", default=None, help="Prompt template; the model's own if not given.")
@click.option("--strict", is_flag=True, help="Refuse texts that are too long instead of cutting them.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def score(
    source: str,
    model: str,
    output: str,
    scheme: str,
    device: str,
    memory: str | None,
    template: str | None,
    strict: bool,
    quiet: bool,
) -> None:
    """Score records {"prompt": ..., "responses": [...]} from SOURCE, JSONL (also gzipped) or Parquet; '-' is stdin.

    A prompt is a string or a list of {"role", "content"} turns. Each record is written back with "scores" and
    "scored_by" added. With -o, a run that was stopped goes on where it was when it is started again. Records that
    cannot be scored are reported by number and left out; the exit status is then 1.
    """
    from lightrm import jobs, records
    from lightrm.checkpoints.stored import UNFINISHED
    from lightrm.progress import token_progress

    def tell(problem: str) -> None:
        click.echo(problem, err=True)

    if output != "-" and not Path(output).parent.is_dir():
        raise click.BadParameter(f"the folder {Path(output).parent} does not exist", param_hint="--output")
    rm = lightrm.load(model, scheme=scheme, device=device, template=template, strict=strict, memory=memory)
    with token_progress(None, not quiet) as advance:
        if output != "-":
            try:
                with jobs.as_file(source, Path(output)) as path:
                    counts = jobs.score_file(rm, model, path, Path(output), tell, advance)
            except KeyboardInterrupt:
                tell(f"stopped; the same command goes on from {output}{UNFINISHED}")
                raise
        else:
            rows = records.json_rows(click.open_file("-", "rb")) if source == "-" else records.read_rows(Path(source))
            with click.open_file("-", "w", encoding="utf-8") as sink:
                counts = jobs.score_stream(rm, model, rows, sink, tell, advance)
    if counts.resumed:
        tell(f"{counts.resumed} records were scored by an earlier run")
    if counts.cut:
        tell(f"{counts.cut} answers were longer than {rm.max_length} tokens with their prompt and were cut")
    if counts.bad:
        tell(f"{counts.bad} of {counts.good + counts.bad} lines were not scored")
        raise SystemExit(1)


@main.command()
def demo() -> None:
    """Score a few answers with the bundled model."""
    from lightrm.demonstration import EXAMPLES

    rm = lightrm.load("demo")
    console = Console()
    for prompt, responses in EXAMPLES:
        table = Table(title=prompt, title_justify="left", title_style="bold", expand=True)
        for column in ("score", "the answer", "says"):
            table.add_column(column, overflow="fold")  # Chinese has no spaces to wrap at
        ranked = rm.rank(prompt, [text for _, text in responses])
        for row in ranked:
            note, text = responses[row.position]
            table.add_row(f"{row.score:+.2f}", note, text)
        console.print(table)
    console.print(repr(rm), style="dim", markup=False, highlight=False)


@main.command()
@click.argument("path")
@click.option("--revision", default=None, help="Commit, tag or branch of a hub id.")
def inspect(path: str, revision: str | None) -> None:
    """Say what the checkpoint at PATH is, without loading weights (a hub id is fetched first)."""
    table = Table(show_header=False, box=None)
    for name, value in describe(path, revision):
        table.add_row(name, value)
    Console().print(table, markup=False)


def describe(path: str, revision: str | None) -> Iterator[tuple[str, str]]:
    import torch

    from lightrm import native
    from lightrm.checkpoints.detect import listed, open_checkpoint
    from lightrm.checkpoints.hub import resolve
    from lightrm.checkpoints.inventory import check_tensors
    from lightrm.opening import text_side
    from lightrm.plan import schemes_of, weight_bytes
    from lightrm.schemes.grammar import size_text

    folder = resolve(path, revision)
    if native.is_native(folder):
        manifest, checkpoint = native.open_native(folder)
        yield "quantized", f"{manifest.scheme}, by lightrm; {size_text(manifest.bytes)}"
    else:
        checkpoint = open_checkpoint(folder)
        check_tensors(checkpoint)
        if checkpoint.holds is not None:
            yield "quantized", f"its own values run under {checkpoint.holds}"
    a = checkpoint.architecture
    tokens, template, no_text = text_side(checkpoint, None, parse_specials=False)
    heads = {name: checkpoint.shape(name) for name in checkpoint.tensors if name.startswith("head.")}
    yield "folder", str(checkpoint.folder)
    yield "layout", f"{checkpoint.layout.name} ({checkpoint.layout.describes})"
    if checkpoint.adapter is not None:
        yield "adapter", f"LoRA on {len(checkpoint.adapter.pairs)} weights of {checkpoint.base_folder}"
    yield "architecture", str(a)
    yield "positions", f"{a.positions}, at most {a.max_positions}"
    if heads:
        yield "head", ", ".join(f"{checkpoint.tensors[name][1]} {shape}" for name, shape in heads.items())
    yield "template", template.name if template is not None else f"none: {no_text}"
    if tokens is not None:
        yield (
            "tokenizer",
            f"{type(tokens.vocabulary).__name__}, {tokens.vocabulary.size} ids, bos {tokens.bos!r}, eos {tokens.eos!r}",
        )
    yield "parameters", f"{a.parameters:,} (without output layer)"
    if checkpoint.sources:
        yield "on disk", size_text(checkpoint.bytes())
    planned = schemes_of(torch.device("cpu"))
    yield "in memory", ", ".join(f"{scheme} {size_text(weight_bytes(a, scheme))}" for scheme in planned)
    if checkpoint.ignored:
        yield "ignored", listed(checkpoint.ignored)


@main.command()
@click.argument("source")
@click.argument("destination", type=click.Path(path_type=Path))
@click.option("--scheme", default=None, help="w8a8, w4a8 (default), w4a16 (default for gptq); -g64 or -g32 after w4.")
@click.option("--format", "form", type=click.Choice(["lightrm", "gptq"]), default="lightrm", show_default=True)
@click.option("--calibrate", type=click.Path(exists=True, dir_okay=False), help="JSONL of prompts and responses.")
@click.option("--tokens", default=16384, show_default=True, help="Tokens of calibration text to use.")
@click.option("--template", default=None, help="Prompt template; the model's own if not given.")
@click.option("--device", default="auto", show_default=True)
@click.option("--revision", default=None, help="Commit, tag or branch of a hub id.")
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
) -> None:
    """Write the model at SOURCE, a folder or hub id, as a quantized folder that loads at once.

    With --calibrate, 4-bit rounding compensates its own error on the texts of a file in `lightrm score`'s format:
    slower to make, closer to the original. --format gptq writes files for auto-gptq, GPTQModel and optimum.
    """
    from lightrm import native
    from lightrm.checkpoints.stored import check_free

    check_free(destination)  # before the minutes of work, not after
    pairs = list(calibration_pairs(calibrate, tokens)) if calibrate else None
    if form == "gptq":
        from lightrm.exporting import export_gptq

        report = export_gptq(
            source, destination, scheme=scheme or "w4a16", device=device, template=template, revision=revision,
            calibration=pairs,
        )  # fmt: skip
    else:
        rm = lightrm.load(
            source, scheme=scheme or "w4a8", device=device, template=template, revision=revision, calibration=pairs
        )
        name = rm.template.name if rm.template is not None else None
        native.write(destination, rm.checkpoint, rm.decoder, rm.head, rm.report, name)
        report = rm.report
    click.echo(f"{destination}: {report}")


def calibration_pairs(path: str, tokens: int) -> Iterator[tuple[Any, str]]:
    """Prompts with responses until there is text enough, at four characters a token at most."""
    from lightrm.records import read_rows

    characters = 0
    for row in read_rows(Path(path)):
        if row.record is None:
            raise InputError(f"{path}, line {row.number}: {row.error}")
        for response in row.record["responses"]:
            yield row.record["prompt"], response
            characters += len(response) + len(str(row.record["prompt"]))
        if characters > 4 * tokens:
            return


@main.command()
@click.argument("path")
@click.option("--memory", "--vram", default=None, help="To plan for, such as 8GiB; what is free now if not given.")
@click.option("--token-budget", default=None, type=int, help="Tokens computed at once; what pays if not given.")
@click.option("--device", default="auto", show_default=True)
@click.option("--revision", default=None, help="Commit, tag or branch of a hub id.")
def plan(path: str, memory: str | None, token_budget: int | None, device: str, revision: str | None) -> None:
    """Say how each scheme would run the model at PATH, and what 'auto' takes, by its config.json alone."""
    from lightrm.checkpoints.config import read_architecture, read_config
    from lightrm.checkpoints.detect import said_to_hold
    from lightrm.checkpoints.hub import resolve_config
    from lightrm.errors import SchemeError
    from lightrm.opening import PLANNED_TOKENS, choose_device, free_bytes
    from lightrm.plan import choose_scheme, room_for, schemes_of, weight_bytes
    from lightrm.residence import LEAST_TOKENS, choose_residence, resident_bytes, streamed_bytes
    from lightrm.schemes.grammar import parse_size, size_text

    place = choose_device(device)
    config = read_config(resolve_config(path, revision))
    a = read_architecture(config)
    room = room_for(place, None if memory is None else parse_size(memory), free_bytes(place))
    least = token_budget or LEAST_TOKENS
    table = Table(title=f"{a}, {room.of} on {place}", title_justify="left")
    for column in ("scheme", "weights", "resident from", "streamed from", "runs", "at most"):
        table.add_column(column, justify="left" if column in ("scheme", "runs") else "right")
    for scheme in schemes_of(place):
        needs = resident_bytes(a, scheme, least), streamed_bytes(a, scheme, least, least)
        try:
            found = choose_residence(a, scheme, place, room, token_budget)
            packs = f"packs of {found.tokens}"
            runs = f"streamed, {found.window} tokens in {packs}" if found.streamed else f"resident, {packs}"
            bound = size_text(found.bytes)
        except SchemeError:
            runs, bound = "no", "-"
        table.add_row(str(scheme), *map(size_text, (weight_bytes(a, scheme), *needs)), runs, bound)
    Console().print(table)
    chosen = choose_scheme("auto", place, a, room, token_budget or PLANNED_TOKENS, said_to_hold(config))
    click.echo(f"auto takes {chosen}: {chosen.reason}")


@main.command()
def doctor() -> None:
    """Say which kernels run on this machine, and why."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from lightrm.dispatch import kernels_for
    from lightrm.opening import choose_device, free_bytes
    from lightrm.schemes.grammar import size_text

    table = Table(show_header=False, box=None)
    table.add_row("lightrm", f"{lightrm.__version__} on Python {platform.python_version()}, {platform.platform()}")
    for name in ("torch", "numba", "triton", "transformers", "bitsandbytes"):
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "not installed"
        table.add_row(name, found)
    table.add_row(
        "threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    )
    for device in dict.fromkeys((choose_device("cpu"), choose_device("auto"))):
        table.add_row(f"{device}, free", size_text(free_bytes(device)))
        table.add_row(f"{device}, fp32 bf16 fp16", str(kernels_for(device)))
        table.add_row(f"{device}, w8a8 w4a8", str(kernels_for(device, "integer")))
        table.add_row(f"{device}, nf4 bnb-int8", str(kernels_for(device, "bitsandbytes")))
    Console().print(table, markup=False)
