"""Which layout a folder has: everything about a checkpoint that can be said without reading a weight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from lightrm.architecture import Architecture
from lightrm.checkpoints import (
    athene,
    beaver,
    deepspeed_chat,
    gated_heads,
    internlm2_reward,
    openrlhf_reward,
    output_layer_heads,
    process_heads,
    sequence_classification,
    ultrarm,
    value_head,
    ziya,
)  # fmt: skip
from lightrm.checkpoints.adapter import Adapter, is_adapter, read_adapter
from lightrm.checkpoints.checkpoint import Checkpoint
from lightrm.checkpoints.config import Config, read_config
from lightrm.checkpoints.config_fields import check_fields
from lightrm.checkpoints.families import read_architecture
from lightrm.checkpoints.gguf_config import gguf_config
from lightrm.checkpoints.gguf_file import GgufFile, gguf_in
from lightrm.checkpoints.gguf_files import GgufSource
from lightrm.checkpoints.head_outputs import check_kind, promised
from lightrm.checkpoints.hub import local, resolve
from lightrm.checkpoints.layout import IGNORED, Layout
from lightrm.checkpoints.quantized import seen_through
from lightrm.checkpoints.source import TensorSource, check_index, main_files
from lightrm.checkpoints.stored import check_finished
from lightrm.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    MissingHeadError,
    TensorMismatchError,
    UnsupportedModelError,
)

# The first that matches wins: the more particular ones come first.
LAYOUTS: tuple[Layout, ...] = (
    process_heads.QWEN,
    process_heads.SKYWORK,
    gated_heads.ARMORM,
    gated_heads.QRM,
    gated_heads.URM,
    *(
        module.LAYOUT
        for module in (
            openrlhf_reward, ziya, internlm2_reward, value_head, ultrarm, beaver, sequence_classification, athene,
            deepspeed_chat,
        )
    ),
    output_layer_heads.NEMOTRON,
    output_layer_heads.SHEPHERD,
    output_layer_heads.RLHFLOW,
)  # fmt: skip
HEAD_FILES = ("value_head.safetensors", "value_head.bin")


Names = dict[str, tuple[TensorSource, str]]  # a tensor's name -> where it lies, and its name there


def open_checkpoint(folder: Path, base: str | Path | None = None, asked: str | None = None) -> Checkpoint:
    """Read configs and tensor names, and choose the layout. base: the base model of an adapter, if it has moved. asked:
    a layout by name, of those that are not told by their files.

    Raises a CheckpointError that says what was found and what was expected.
    """
    check_finished(folder)
    if (alone := gguf_in(folder)) is not None:
        return open_gguf(alone)
    adapter = read_adapter(folder) if is_adapter(folder) else None
    base_folder = folder if adapter is None else base_of(folder, adapter, base)
    config = read_config(folder if (folder / "config.json").is_file() else base_folder)
    architecture = read_architecture(config)
    check_kind(config)
    base_config = config if base_folder == folder else read_config(base_folder)
    check_same(architecture, config, base_config)
    sources, names = tensors_in(folder, base_folder, base_config, adapter)
    layout = choose(config, names) if asked is None else asked_layout(config, names, asked)
    tensors, ignored = placed(folder, config, layout, names)
    if adapter is not None:
        check_adapter(folder, config, layout, adapter, names)
    found = Checkpoint(folder, base_folder, config, architecture, layout, tensors, sources, adapter, ignored)
    found.check_config()
    return found


def open_gguf(path: Path) -> Checkpoint:
    """As `open_checkpoint`, for one file that holds everything. Tokenizer files beside it come before its own."""
    file = GgufFile(path)
    config = gguf_config(file)
    architecture, source = read_architecture(config), GgufSource(file)
    names: Names = {name: (source, name) for name in source.names}
    layout = choose(config, names)
    tensors, ignored = placed(path, config, layout, names)
    found = Checkpoint(path, path.parent, config, architecture, layout, tensors, (source,), None, ignored)
    found.check_config()
    return found


def tensors_in(
    folder: Path, base_folder: Path, base_config: Config, adapter: Adapter | None
) -> tuple[tuple[TensorSource, ...], Names]:
    """Return the weight files of a checkpoint, and every tensor in them.

    Of tensors with the same name the later file's counts. The order is: the model, a head in a file of its own, tensors
    that an adapter replaces.
    """
    main = main_source(base_folder, base_config)
    sources = [main]
    names = {name: (main, name) for name in main.names}
    for place in dict.fromkeys((base_folder, folder)):
        head_file = next((place / name for name in HEAD_FILES if (place / name).is_file()), None)
        if head_file is not None:
            sources.append(TensorSource([head_file]))
            names |= {name: (sources[-1], name) for name in sources[-1].names}
    if adapter is not None:
        sources.append(adapter.source)
        names |= {name: (adapter.source, stored) for name, stored in adapter.replaced.items()}
    return tuple(sources), names


def placed(folder: Path, config: Config, layout: Layout, names: Names) -> tuple[Names, tuple[str, ...]]:
    """Return the tensors under our names, and the names of those that a scorer does not need.

    Raises TensorMismatchError on a tensor that the layout does not know, or that two files hold with different values.
    """
    tensors: Names = {}
    ignored, unexpected = [], []
    for name, place in names.items():
        ours = layout.ours(name, config)
        if ours is None:
            unexpected.append(name)
        elif ours == IGNORED:
            ignored.append(name)
        elif ours in tensors and not same(tensors[ours], place):
            raise TensorMismatchError(f"{folder}: {name} and {tensors[ours][1]} are the same weight with other values")
        else:
            tensors[ours] = place
    if unexpected:
        raise TensorMismatchError(
            f"{folder}: layout {layout.name} has no place for {listed(unexpected)}; "
            "is this another architecture, or are its files mixed with another model's?"
        )
    return tensors, tuple(ignored)


def check_adapter(folder: Path, config: Config, layout: Layout, adapter: Adapter, names: Names) -> None:
    """Raise TensorMismatchError if an adapter changes a weight that its base does not have."""
    changed = {*adapter.pairs, *adapter.shifts, *adapter.rows} - names.keys() - adapter.source.names.keys()
    strays = sorted(name for name in changed if layout.ours(name, config) != IGNORED)  # such as the output layer
    if strays:
        raise TensorMismatchError(f"{folder}: the adapter changes {listed(strays)}, which the base does not have")


def main_source(folder: Path, config: Config) -> TensorSource:
    """Return the model's own weights, dequantized on reading if they are packed. Raises UnsupportedModelError on a
    format that lightrm cannot read."""
    source = TensorSource(main_files(folder))
    check_index(folder, source)
    return seen_through(source, config, folder)


def check_same(architecture: Architecture, config: Config, base: Config) -> None:
    """Raise ConfigError if an adapter's own config.json describes another decoder than its base's does."""
    theirs = replace(read_architecture(base), vocabulary=architecture.vocabulary)
    if theirs != architecture:
        raise ConfigError(
            f"{config.path} describes {architecture}, its base's {base.path} {theirs}: one of them is another model's"
        )


def check_promises(config: Config) -> None:
    """Check what config.json alone tells of whether `load` accepts a model. Raises as `Checkpoint.check_config`."""
    check_fields(config, frozenset().union(*(layout.fields for layout in LAYOUTS)))
    check_kind(config)
    promised(config)


def said_to_store(config: Config) -> torch.dtype | None:
    """Return the dtype of the weights that config.json names, under either spelling; None if it names none."""
    found = getattr(torch, str(config.raw.get("dtype") or config.raw.get("torch_dtype")).removeprefix("torch."), None)
    return found if isinstance(found, torch.dtype) else None


def same(a: tuple[TensorSource, str], b: tuple[TensorSource, str]) -> bool:
    return torch.equal(a[0].read(a[1]), b[0].read(b[1]))


def base_of(folder: Path, adapter: Adapter, asked: str | Path | None) -> Path:
    """Return the folder of an adapter's base model. A relative path is also looked for beside the adapter."""
    base = asked or adapter.base
    revision = adapter.revision if asked is None else None
    if base is None:
        raise CheckpointError(f"{folder}: its adapter_config.json names no base model: pass base=... to load")
    beside = local(folder.parent / base)
    return resolve(base if beside is None or local(base) is not None else beside, revision)


def choose(config: Config, names: Iterable[str]) -> Layout:
    """Return the layout. Raises MissingHeadError if no layout finds its head among the names."""
    names = set(names)
    for layout in LAYOUTS:
        if layout.matches(config, names):
            return layout
    tops = sorted({name for name in names if "layers." not in name})
    raise MissingHeadError(
        f"{config.path.parent}: no value head among {len(names)} tensors (outside the layers: {listed(tops)}). "
        f"Expected one of: {'; '.join(layout.describes for layout in LAYOUTS if not layout.asked)}. A plain language "
        "model is not a reward model; if the head lies in a file of its own (value_head.bin), copy it beside the "
        "weights; if the model is one that reads its output layer, pass layout="
        f"{' or '.join(repr(layout.name) for layout in LAYOUTS if layout.asked)} to load"
    )


def asked_layout(config: Config, names: Iterable[str], asked: str) -> Layout:
    """Return a layout that the caller names. Raises InputError if there is none, MissingHeadError without its head."""
    layouts = {layout.name: layout for layout in LAYOUTS if layout.asked}
    if asked not in layouts:
        raise InputError(
            f"layout must be one of {', '.join(layouts)}, found {asked!r}: all other layouts are told by their files"
        )
    if output_layer_heads.HEAD not in names:
        raise MissingHeadError(
            f"{config.path.parent}: layout {asked} reads {output_layer_heads.HEAD}, which the weights do not hold"
        )
    if config.has("final_logit_softcapping"):
        raise UnsupportedModelError(
            f"{config.path}: the scores of layout {asked} are logits, which final_logit_softcapping caps; lightrm does "
            "not"
        )
    return layouts[asked]


def listed(names: Iterable[str], most: int = 6) -> str:
    names = list(names)
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
