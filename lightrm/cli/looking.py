"""lightrm inspect, plan, doctor: facts about a model and about a machine, before anything is scored."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

import lightrm
from lightrm.cli.shared_options import load_options
from lightrm.display.tables import Column, Sheet, terminal
from lightrm.loading.options import LoadOptions

if TYPE_CHECKING:
    from lightrm.checkpoints.hub_headers import Outline
    from lightrm.loading.sources import Published, Quantized

NAMED = (Column("", words=True), Column("", words=True))
PLANNED = (
    Column("scheme", words=True), Column("weights"), Column("resident from"), Column("streamed from"),
    Column("at most"), Column("runs", words=True),
)  # fmt: skip


@click.command()
@click.argument("path")
@load_options("engine", "revision", "layout")
@click.option("--weights", is_flag=True, help="Fetch the weights of a hub id, too, as scoring does.")
def inspect(path: str, options: LoadOptions, weights: bool) -> None:
    """Describe the checkpoint at PATH without loading its weights. Of a hub id, only its small files and the headers of
    its weight files are fetched."""
    from lightrm.checkpoints.hub import resolve
    from lightrm.checkpoints.hub_headers import Outline, outlined

    if weights:
        lines = tuple(describe(Outline(resolve(path, options.revision)), options))
    else:
        with outlined(path, options.revision) as outline:
            lines = tuple(describe(outline, options))
    terminal().print(Sheet(NAMED, lines))


def describe(outline: Outline, options: LoadOptions) -> Iterator[tuple[str, str]]:
    from lightrm.cli.class_facts import describe_class
    from lightrm.loading.sources import open_source
    from lightrm.loading.through_transformers import ThroughTransformers

    source = open_source(outline.folder, base=outline.base, layout=options.layout, engine=options.engine)
    if isinstance(source, ThroughTransformers):
        yield from describe_class(source, options)
    else:
        yield from describe_decoder(source, outline, options)


def describe_decoder(
    source: Published | Quantized, outline: Outline, options: LoadOptions
) -> Iterator[tuple[str, str]]:
    import torch

    from lightrm.checkpoints.detect import listed
    from lightrm.checkpoints.source import PackedSource
    from lightrm.display.sizes import size_text
    from lightrm.engine.memory import schemes_of, weight_bytes
    from lightrm.errors import LightRMError
    from lightrm.loading.head_loader import said_outputs
    from lightrm.loading.sources import Quantized
    from lightrm.loading.text_side import text_side

    checkpoint, a = source.checkpoint, source.checkpoint.architecture
    if isinstance(source, Quantized):
        yield "quantized", f"{source.manifest.scheme}, by lightrm; {size_text(source.manifest.bytes)}"
    elif checkpoint.holds is not None:
        yield "quantized", f"its own values run under {checkpoint.holds}"
    elif any(isinstance(one, PackedSource) for one in checkpoint.sources):
        yield "quantized", "by another tool; widened while loading, then rounded as the scheme asks"
    try:
        text = text_side(checkpoint, a, options)
        tokens, template, missing = text.tokens, text.template, text.missing
    except LightRMError as error:  # a tokenizer that cannot be read stops no inspection
        tokens, template, missing = None, None, str(error)
    heads = [name for name in checkpoint.tensors if name.startswith("head.")]
    shapes = [str(checkpoint.shape(name)) if checkpoint.shaped else "of unknown shape" for name in heads]
    yield ("fetched", outline.fetched) if outline.fetched else ("folder", str(checkpoint.folder))
    yield "layout", checkpoint.layout.name
    yield "models", checkpoint.layout.models
    if checkpoint.adapter is not None:
        base = checkpoint.adapter.base if outline.base is not None else checkpoint.base_folder
        taken = f", whose {checkpoint.adapter.taken_off} factors are taken off" if checkpoint.adapter.taken_off else ""
        yield "adapter", f"LoRA on {len(checkpoint.adapter.pairs)} weights of {base}{taken}"
    yield "engine", "lightrm"
    yield "architecture", str(a)
    yield "positions", f"{a.positions}, at most {a.max_positions}"
    if heads:
        yield "head", ", ".join(
            f"{checkpoint.tensors[name][1]} {shape}" for name, shape in zip(heads, shapes, strict=True)
        )  # fmt: skip
    yield "gives", said_outputs(checkpoint)
    yield "read at", str(checkpoint.reading)
    yield "template", str(template) if template is not None else f"none: {missing}"
    if tokens is not None:
        yield (
            "tokenizer",
            f"{type(tokens.vocabulary).__name__}, {tokens.size} ids, bos {tokens.bos!r}, eos {tokens.eos!r}",
        )
    yield "parameters", f"{a.parameters:,} (without output layer)"
    if checkpoint.sources:
        yield "on disk", size_text(checkpoint.bytes())
    planned = schemes_of(torch.device("cpu"))
    yield "in memory", ", ".join(f"{scheme} {size_text(weight_bytes(a, scheme))}" for scheme in planned)
    if checkpoint.ignored:
        yield "ignored", listed(checkpoint.ignored)
    yield "config read", ", ".join(checkpoint.fields.read)
    if checkpoint.fields.harmless:
        yield "config ignored", ", ".join(checkpoint.fields.harmless)


@click.command()
@click.argument("path")
@click.option("--memory", "--vram", help="Memory to plan for, such as 8GiB; default: what is free now.")
@click.option("--token-budget", type=int, help="Tokens computed at once; default: as many as pay.")
@load_options("engine", "device", "revision")
def plan(path: str, memory: str | None, token_budget: int | None, options: LoadOptions) -> None:
    """Show how each scheme would run the model at PATH, and which one 'auto' chooses. Needs no weights."""
    from lightrm.checkpoints.config import read_config
    from lightrm.checkpoints.detect import check_promises, open_gguf, said_to_store
    from lightrm.checkpoints.families import read_architecture
    from lightrm.checkpoints.gguf_file import gguf_in
    from lightrm.checkpoints.hub import resolve_config
    from lightrm.checkpoints.quantized import said_to_hold
    from lightrm.cli.class_facts import plan_class
    from lightrm.display.sizes import parse_size, size_text
    from lightrm.engine.devices import choose_device, free_bytes
    from lightrm.engine.memory import choose_scheme, room_for, schemes_of, weight_bytes
    from lightrm.engine.residence import LEAST_TOKENS, choose_residence, resident_bytes, streamed_bytes
    from lightrm.errors import SchemeError
    from lightrm.loading import quantized_folder
    from lightrm.loading.through_transformers import class_of

    place = choose_device(options.device)
    folder = resolve_config(path, options.revision)
    if not quantized_folder.is_native(folder) and (found_class := class_of(folder, options.engine)) is not None:
        plan_class(found_class, memory, token_budget, place)
        return
    alone = None if (file := gguf_in(folder)) is None else open_gguf(file)
    config = read_config(folder) if alone is None else alone.config
    a = read_architecture(config)
    check_promises(config)
    manifest = quantized_folder.read_manifest(folder) if quantized_folder.is_native(folder) else None
    room = room_for(place, None if memory is None else parse_size(memory), free_bytes(place))
    least = token_budget or LEAST_TOKENS
    lines = []
    for scheme in schemes_of(place):
        needs = resident_bytes(a, scheme, least), streamed_bytes(a, scheme, least, least)
        try:
            if manifest is not None:
                quantized_folder.chosen_scheme(manifest, scheme.name, place)
            found = choose_residence(a, scheme, place, room, token_budget)
            packs = f"packs of {found.tokens}"
            runs = f"streamed, {found.window} tokens in {packs}" if found.streamed else f"resident, {packs}"
            bound = size_text(found.bytes)
        except SchemeError:
            runs, bound = "no", "-"
        lines.append((str(scheme), *map(size_text, (weight_bytes(a, scheme), *needs)), bound, runs))
    terminal().print(Sheet(PLANNED, tuple(lines), f"{a}, {room.of} on {place}"))
    if manifest is not None:
        chosen = quantized_folder.chosen_scheme(manifest, "auto", place)
    else:
        holds, stored = said_to_hold(config, folder), said_to_store(config)
        if alone is not None:
            holds, stored = alone.holds, alone.stored
        chosen = choose_scheme("auto", place, a, room, token_budget, holds, stored)
    click.echo(f"auto takes {chosen}: {chosen.reason}")


@click.command()
def doctor() -> None:
    """Show which kernels run on this machine, and why."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from lightrm.display.sizes import size_text
    from lightrm.engine.devices import choose_device, free_bytes
    from lightrm.kernels.dispatch import kernels_for

    lines = [("lightrm", f"{lightrm.__version__} on Python {platform.python_version()}, {platform.platform()}")]
    for name in ("torch", "numba", "triton", "transformers", "bitsandbytes"):
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "not installed"
        lines.append((name, found))
    cores = f"{torch.get_num_threads()} of {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    lines.append(("threads", cores))
    for device in dict.fromkeys((choose_device("cpu"), choose_device("auto"))):
        lines += [
            (f"{device}, free", size_text(free_bytes(device))),
            (f"{device}, fp32 bf16 fp16", str(kernels_for(device))),
            (f"{device}, w8a8 w4a8", str(kernels_for(device, "integer"))),
            (f"{device}, nf4 bnb-int8", str(kernels_for(device, "bitsandbytes"))),
        ]
    terminal().print(Sheet(NAMED, tuple(lines)))
