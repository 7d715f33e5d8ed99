"""What `inspect` and `plan` say of a model that runs through transformers."""

from __future__ import annotations

from collections.abc import Iterator

import click
import torch

from lightrm.checkpoints.class_checkpoint import ClassLayout, holds_gptq
from lightrm.checkpoints.config import Config
from lightrm.checkpoints.detect import said_to_store
from lightrm.checkpoints.head_outputs import check_outputs
from lightrm.checkpoints.named_class import NamedClass
from lightrm.display.sizes import parse_size, size_text
from lightrm.display.tables import Column, Sheet, terminal
from lightrm.engine.class_memory import (
    NAMES,
    class_residence,
    class_scheme,
    class_weight_bytes,
    packed_scheme,
    token_bytes,
)
from lightrm.engine.devices import free_bytes
from lightrm.engine.memory import room_for
from lightrm.engine.residence import LEAST_TOKENS
from lightrm.errors import LightRMError, SchemeError
from lightrm.loading.class_outline import outline_of
from lightrm.loading.options import LoadOptions
from lightrm.loading.text_side import text_side
from lightrm.loading.through_transformers import ASKED, ThroughTransformers, stored_parameters
from lightrm.schemes.grammar import Scheme, parse_scheme

PLANNED = (
    Column("scheme", words=True), Column("weights"), Column("resident from"), Column("at most"),
    Column("runs", words=True),
)  # fmt: skip


def describe_class(source: ThroughTransformers, options: LoadOptions) -> Iterator[tuple[str, str]]:
    """Yield the lines of `lightrm inspect`."""
    checkpoint, a = source.checkpoint, source.architecture
    yield "folder", str(checkpoint.folder)
    yield "engine", f"transformers, because {source.why}"
    yield "class", f"{checkpoint.layout.name} ({checkpoint.layout.describes})"
    yield "architecture", str(a)
    yield "positions", f"{a.positions}, at most {a.max_positions}"
    yield "head", ", ".join(f"{name} {a.tensors[name]}" for name in a.head)
    yield "read at", str(checkpoint.reading)
    try:
        text = text_side(checkpoint, a, options)
        tokens, template, missing = text.tokens, text.template, text.missing
    except LightRMError as error:  # a tokenizer that cannot be read stops no inspection
        tokens, template, missing = None, None, str(error)
    yield "template", str(template) if template is not None else f"none: {missing}"
    if tokens is not None:
        kind = type(tokens.vocabulary).__name__
        yield "tokenizer", f"{kind}, {tokens.size} ids, bos {tokens.bos!r}, eos {tokens.eos!r}"
    yield "parameters", f"{a.parameters:,}; the files hold {stored_parameters(checkpoint):,} numbers"
    yield "on disk", size_text(checkpoint.bytes())
    if checkpoint.packed:
        yield "in memory", f"GPTQ's values as they are, {size_text(checkpoint.bytes())}"
        return
    planned = schemes_of(torch.device("cpu"))
    yield "in memory", ", ".join(f"{scheme} {size_text(class_weight_bytes(a, scheme))}" for scheme in planned)


def schemes_of(device: torch.device) -> list[Scheme]:
    return [parse_scheme(name, device) for name in NAMES if name != "fp16" or device.type != "cpu"]


def plan_class(
    found: tuple[Config, NamedClass, str], memory: str | None, tokens: int | None, device: torch.device
) -> None:
    """Print the table of `lightrm plan`. found: config, class, and why transformers runs it."""
    config, named, why = found
    check_outputs(config, "the head", None, ClassLayout(named.name, named.runs))
    a = outline_of(config, named)
    if holds_gptq(config.path.parent, config, why == ASKED):
        chosen = packed_scheme("auto", device, a.name)
        click.echo(f"transformers runs it, because {why}; auto takes {chosen}: {chosen.reason}")
        return
    room = room_for(device, None if memory is None else parse_size(memory), free_bytes(device))
    least = tokens or LEAST_TOKENS
    lines = []
    for scheme in schemes_of(device):
        weights = class_weight_bytes(a, scheme)
        try:
            class_scheme(scheme.name, a, device, room, tokens, set(), a.name)
            residence = class_residence(a, scheme, device, room, tokens)
            runs, bound = f"resident, batches of {residence.tokens}", size_text(residence.bytes)
        except SchemeError:
            runs, bound = "no", "-"
        lines.append(
            (str(scheme), size_text(weights), size_text(weights + least * token_bytes(a, scheme)), bound, runs)
        )
    terminal().print(Sheet(PLANNED, tuple(lines), f"{a}, {a.parameters:,} parameters, {room.of} on {device}"))
    dtype = said_to_store(config)
    stored = set() if dtype is None else {str(dtype).removeprefix("torch.")}
    chosen = class_scheme("auto", a, device, room, tokens, stored, a.name)
    click.echo(f"transformers runs it, because {why}; auto takes {chosen}: {chosen.reason}")
