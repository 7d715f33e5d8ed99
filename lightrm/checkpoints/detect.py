"""Which layout a folder has: everything about a checkpoint that can be said without reading a weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lightrm.architecture import Architecture
from lightrm.checkpoints import (
    athene,
    beaver,
    deepspeed_chat,
    internlm2,
    openrlhf,
    sequence_classification,
    ultrarm,
    value_head,
    ziya,
)  # fmt: skip
from lightrm.checkpoints.adapter import Adapter, is_adapter, read_adapter
from lightrm.checkpoints.config import Config, read_architecture, read_config
from lightrm.checkpoints.config_fields import Fields, check_fields
from lightrm.checkpoints.gguf_config import gguf_config
from lightrm.checkpoints.gguf_file import GgufFile, gguf_in
from lightrm.checkpoints.gguf_files import GgufSource
from lightrm.checkpoints.head_outputs import check_kind, check_outputs
from lightrm.checkpoints.hub import local, resolve
from lightrm.checkpoints.layout import IGNORED, Layout
from lightrm.checkpoints.quantized import seen_through
from lightrm.checkpoints.score_position import Reading
from lightrm.checkpoints.source import PackedSource, TensorSource, check_index, main_files
from lightrm.checkpoints.stored import check_finished
from lightrm.errors import CheckpointError, ConfigError, MissingHeadError, TensorMismatchError
from lightrm.schemes.blockwise import Blockwise
from lightrm.schemes.grouped import Grouped
from lightrm.schemes.int8 import Rowwise
from lightrm.text.gguf_tokenizer import NAMED, folder_of
from lightrm.text.tokenizer_files import has_tokenizer

# The first that matches wins: the more particular ones come first.
LAYOUTS: tuple[Layout, ...] = tuple(
    module.LAYOUT
    for module in (
        openrlhf, ziya, internlm2, value_head, ultrarm, beaver, sequence_classification, athene, deepspeed_chat,
    )
)  # fmt: skip
HEAD_FILES = ("value_head.safetensors", "value_head.bin")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model folder, read as far as it can be without its weights.

    tensors: our name -> (source, the file's name). ignored: tensors that a scorer does not need.
    """

    folder: Path
    base_folder: Path
    config: Config
    architecture: Architecture
    layout: Layout
    tensors: dict[str, tuple[TensorSource, str]]
    sources: tuple[TensorSource, ...]
    adapter: Adapter | None = None
    ignored: tuple[str, ...] = field(default=())

    def read(self, ours: str) -> torch.Tensor:
        """Return one tensor by our name, with LoRA merged, in the file's dtype."""
        source, foreign = self.tensors[ours]
        tensor = source.read(foreign)
        if self.adapter is not None:
            tensor = self.adapter.merge(foreign, tensor)
        if ours.endswith(".qkv.weight") and self.layout.regroup is not None:
            tensor = self.layout.regroup(tensor, self.architecture)
        return tensor

    @property
    def holds(self) -> str | None:
        """The scheme that keeps the values of an already quantized file; None for others, and if the values must be
        changed."""
        if self.adapter is not None or self.layout.regroup is not None:
            return None
        return next((source.holds for source in self.sources if isinstance(source, PackedSource)), None)

    def packed(self, ours: str) -> Grouped | Blockwise | Rowwise | None:
        """Return the quantized values of a weight, by our name; None if the file does not pack it."""
        source, foreign = self.tensors[ours]
        return source.packed(foreign) if isinstance(source, PackedSource) else None

    def shape(self, ours: str) -> tuple[int, ...]:
        source, foreign = self.tensors[ours]
        return source.shape(foreign)

    @property
    def template(self) -> str | None:
        return self.layout.template(self.config)

    @property
    def reward_id(self) -> int | None:
        """The token that the model's own code puts behind every text; None if there is none."""
        return None if self.layout.appended is None else self.layout.appended(self.config)

    @property
    def reading(self) -> Reading:
        """Where in a sequence the score is read."""
        return self.layout.reading(self.config)

    @property
    def fields(self) -> Fields:
        """The fields of config.json. Raises UnsupportedModelError on one that may change the model."""
        return check_fields(self.config, self.layout.fields)

    @property
    def stored(self) -> torch.dtype | None:
        """The dtype of the layers' matrices in the file, or that they are widened to; None if the file's own values can
        be kept."""
        for ours, (source, foreign) in self.tensors.items():
            if ours.endswith(".down.weight"):
                kept = isinstance(source, PackedSource) and source.holds is not None
                return None if kept else source.dtype(foreign)
        return None

    def check_config(self, rows: int | None = None) -> None:
        """Check that every field of config.json is understood, and that the head has one output.

        rows: of the head, if its tensor is not among these. Raises UnsupportedModelError, ConfigError or
        TensorMismatchError.
        """
        heads = sorted(name for name in self.tensors if name.startswith("head.") and name.endswith(".weight"))
        last = self.tensors[heads[-1]][1] if heads else "the head"
        rows = self.shape(heads[-1])[0] if heads and self.shape(heads[-1]) else rows
        check_outputs(self.config, last, rows, self.layout.averages)
        _ = self.fields, self.reading, self.reward_id

    @property
    def inner(self) -> Mapping[str, Any] | None:
        """The settings of a GGUF file that names a tokenizer; None for any other model."""
        settings = next((one.file.settings for one in self.sources if isinstance(one, GgufSource)), {})
        return settings if NAMED in settings else None

    def tokenizer_folder(self) -> Path:
        """Return the adapter's folder if it holds a tokenizer, otherwise the base's. A GGUF file's own tokenizer is
        written into a folder, unless there is one beside it.

        Raises TokenizerError on a GGUF file's tokenizer that lightrm does not read.
        """
        if self.inner is not None and not has_tokenizer(self.base_folder):
            return folder_of(self.inner, self.folder)
        here = any((self.folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
        return self.folder if here else self.base_folder

    def bytes(self) -> int:
        return sum(source.bytes() for source in self.sources)


Names = dict[str, tuple[TensorSource, str]]  # a tensor's name -> where it lies, and its name there


def open_checkpoint(folder: Path, base: str | Path | None = None) -> Checkpoint:
    """Read configs and tensor names, and choose the layout. base: the base model of an adapter, if it has moved.

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
    layout = choose(config, names)
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
    check_outputs(config, "the head", None, averages=False)


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
        f"Expected one of: {'; '.join(layout.describes for layout in LAYOUTS)}. A plain language model is not a reward "
        "model; if the head lies in a file of its own (value_head.bin), copy it beside the weights"
    )


def listed(names: Iterable[str], most: int = 6) -> str:
    names = list(names)
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
