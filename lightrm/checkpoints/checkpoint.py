"""A model folder, read as far as it can be without its weights: what it is, and where its tensors lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lightrm.architecture import Architecture
from lightrm.checkpoints.adapter import Adapter
from lightrm.checkpoints.config import Config
from lightrm.checkpoints.config_fields import Fields, check_fields
from lightrm.checkpoints.gguf_files import GgufSource
from lightrm.checkpoints.head_outputs import check_outputs
from lightrm.checkpoints.layout import Layout
from lightrm.checkpoints.score_position import Reading
from lightrm.checkpoints.source import PackedSource, TensorSource
from lightrm.schemes.blockwise import Blockwise
from lightrm.schemes.grouped import Grouped
from lightrm.schemes.int8 import Rowwise
from lightrm.text.gguf_tokenizer import NAMED, folder_of
from lightrm.text.tokenizer_files import has_tokenizer


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
        rows = self.layout.rows(self.tokenizer_folder()) if ours == "head.0.weight" and self.layout.rows else None
        if rows is not None and self.adapter is None:
            return source.rows(foreign, rows)
        tensor = source.read(foreign)
        if self.adapter is not None:
            tensor = self.adapter.merge(foreign, tensor)
        if rows is not None:
            return tensor[torch.tensor(rows)]
        order_O = self.order(ours)
        return tensor if order_O is None else tensor[order_O]

    @property
    def holds(self) -> str | None:
        """The scheme that keeps the values of an already quantized file; None for others, and if the values must be
        changed."""
        found = next((source.holds for source in self.sources if isinstance(source, PackedSource)), None)
        changed = self.adapter is not None or (self.layout.regroup is not None and found == "nf4")
        return None if changed else found

    def packed(self, ours: str) -> Grouped | Blockwise | Rowwise | None:
        """Return the quantized values of a weight, by our name; None if the file does not pack it."""
        source, foreign = self.tensors[ours]
        packed = source.packed(foreign) if isinstance(source, PackedSource) else None
        order_O = self.order(ours)
        if packed is None or order_O is None:
            return packed
        assert not isinstance(packed, Blockwise), "its blocks run across rows: see `holds`"
        return packed.reordered(order_O)

    def order(self, ours: str) -> torch.Tensor | None:
        """Return which rows of the file's weight are query, key and value in turn, int64 (O,); None if all are in this
        order."""
        if self.layout.regroup is None or not ours.endswith(".qkv.weight"):
            return None
        return self.layout.regroup(torch.arange(self.architecture.linears["qkv"][0]), self.architecture)

    @property
    def shaped(self) -> bool:
        """Whether the shapes of the tensors are known."""
        return all(source.shaped for source in self.sources)

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
        rows = self.shape(heads[-1])[0] if heads and self.shaped and self.shape(heads[-1]) else rows
        check_outputs(self.config, last, rows, self.layout)
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
