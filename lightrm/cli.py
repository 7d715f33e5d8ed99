"""The command line: score, demo, inspect, plan, quantize, doctor. Parses, prints, and leaves the work to the scorer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

import lightrm
from lightrm.errors import InputError, LightRMError, TemplateError

if TYPE_CHECKING:
    from lightrm.scorer import RewardModel

SINK = click.Path(dir_okay=False, writable=True, allow_dash=True)
WINDOW = 64  # lines scored together: large enough to fill packs, small enough to see output grow


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
@click.option("-o", "--output", default="-", show_default=True, type=SINK, help="JSONL file to write.")
@click.option(
    "--scheme", default="auto", show_default=True, help="auto, fp32, bf16, fp16, w8a8, w4a8, w4a8-g32, w4a16, nf4, ..."
)
@click.option("--device", default="auto", show_default=True)
@click.option("--template", default=None, help="Prompt template; the model's own if not given.")
@click.option("--strict", is_flag=True, help="Refuse texts that are too long instead of cutting them.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def score(
    source: str, model: str, output: str, scheme: str, device: str, template: str | None, strict: bool, quiet: bool
) -> None:
    """Score JSONL lines {"prompt": ..., "responses": [...]} from SOURCE ('-' is standard input).

    A prompt is a string or a list of {"role", "content"} turns. Each line is written back with "scores" added.
    Lines that cannot be scored are reported by number and left out; the exit status is then 1.
    """
    rm = lightrm.load(model, scheme=scheme, device=device, template=template, strict=strict)
    if output == "-":
        with click.open_file("-", "w", encoding="utf-8") as sink:
            good, bad = score_lines(rm, source, sink, quiet)
    else:
        if not Path(output).parent.is_dir():
            raise click.BadParameter(f"the folder {Path(output).parent} does not exist", param_hint="--output")
        unfinished = Path(f"{output}.unfinished")  # renamed when whole: a stopped run leaves no finished-looking file
        with unfinished.open("w", encoding="utf-8") as sink:
            good, bad = score_lines(rm, source, sink, quiet)
        os.replace(unfinished, output)
    if bad:
        click.echo(f"{bad} of {good + bad} lines were not scored", err=True)
        raise SystemExit(1)


def score_lines(rm: RewardModel, source: str, sink: IO[str], quiet: bool) -> tuple[int, int]:
    """Score every readable line of the source; returns how many lines were scored and how many were not."""
    from lightrm.progress import token_progress

    good = bad = cut = 0
    with (
        click.open_file(source, encoding="utf-8", errors="surrogateescape") as lines,
        token_progress(None, not quiet) as advance,
    ):
        numbered = enumerate(lines, 1)
        while window := list(islice(numbered, WINDOW)):
            ready = []
            for number, line in window:
                if not line.strip():
                    continue
                try:
                    record = parse(line)
                    encoded = [rm.encode_one(record["prompt"], response) for response in record["responses"]]
                    ready.append((record, [e.token_ids for e in encoded]))
                    cut += sum(e.cut > 0 for e in encoded)
                except (InputError, TemplateError) as error:
                    bad += 1
                    click.echo(f"line {number}: {error}", err=True)
            scores = iter(rm.score_ids([ids for _, rows in ready for ids in rows]).tolist())
            for record, rows in ready:
                record["scores"] = list(islice(scores, len(rows)))
                sink.write(to_line(record))
                good += 1
            sink.flush()
            advance(sum(len(ids) for _, rows in ready for ids in rows))
    if cut:
        click.echo(f"{cut} answers were longer than {rm.max_length} tokens with their prompt and were cut", err=True)
    return good, bad


def to_line(record: dict[str, Any]) -> str:
    """Readable JSON; escaped where another field of the record holds bytes that are no text."""
    line = json.dumps(record, ensure_ascii=False)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        line = json.dumps(record)
    return line + "\n"


def parse(line: str) -> dict[str, Any]:
    """One input line. Raises InputError if it is not an object with prompt and responses."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"not JSON: {error}") from error
    if not isinstance(record, dict) or "prompt" not in record:
        raise InputError('expected an object with "prompt" and "responses"')
    from lightrm.conversation import responses_of

    record["responses"] = responses_of(record.get("responses"))  # type: ignore[arg-type]
    return record


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
    characters = 0
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            record = parse(line)
            for response in record["responses"]:
                yield record["prompt"], response
                characters += len(response) + len(str(record["prompt"]))
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
