"""Files of auto-gptq, GPTQModel and optimum: 4- or 8-bit weights in groups, presented as plain weights or as they are.

For each linear layer X of O x I, with G groups along I (the format is auto-gptq's; the rounding is arXiv 2210.17323):

    X.qweight  int32 (I * bits / 32, O)   32 / bits values of one column in a word, lowest bits first, along I
    X.qzeros   int32 (G, O * bits / 32)   zero points, packed along O; version 1 stores them minus one
    X.scales   float (G, O)
    X.g_idx    int32 (I,)                 group of each input channel; shuffled under activation order; may be absent

    weight[o, i] = scales[g_idx[i], o] * (q[i, o] - zero[g_idx[i], o])

The product is rounded to the dtype of the scales, as those tools' own layers do: fp16 files give fp16 weights, and
scores in fp32 then agree with theirs to 1e-5 instead of 1e-2. `read` widens one tensor at a time; `packed` gives the
values as they are, for w4a16.
"""

from __future__ import annotations

from pathlib import Path

import torch

from lightrm.checkpoints.config import Config, read_config
from lightrm.checkpoints.source import PackedSource, TensorSource
from lightrm.errors import TensorMismatchError, UnsupportedModelError
from lightrm.schemes.grouped import WORD, Grouped, unpack, zero_points

MARK, WEIGHT = ".qweight", ".weight"
PARTS = ("qweight", "qzeros", "scales", "g_idx")


class GptqSource(PackedSource):
    """Each `X.qweight` of a file appears as `X.weight`."""

    holds = "w4a16"

    def __init__(self, stored: TensorSource, version: int) -> None:
        super().__init__(stored)
        self.version = version
        for name in stored.names:
            if name.endswith(MARK):
                self.hide(name.removesuffix(MARK))

    def packs(self, name: str) -> bool:
        return name.endswith(WEIGHT) and name.removesuffix(WEIGHT) + MARK in self.stored.names

    def hide(self, stem: str) -> None:
        """Replace a layer's parts by its weight. auto-gptq writes a bias of zeros where the model has none."""
        absent = [part for part in PARTS[:3] if f"{stem}.{part}" not in self.stored.names]
        if absent:
            raise TensorMismatchError(f"GPTQ layer {stem!r} lacks {', '.join(absent)}")
        for part in PARTS:
            self.names.pop(f"{stem}.{part}", None)
        bias = f"{stem}.bias"
        if bias in self.names and not self.stored.read(bias).any():
            del self.names[bias]
        self.names[stem + WEIGHT] = self.stored.names[stem + MARK]

    def packed(self, name: str) -> Grouped | None:
        if not self.packs(name):
            return None
        stem = name.removesuffix(WEIGHT)
        packed, zeros, scales = (self.stored.read(f"{stem}.{part}") for part in PARTS[:3])
        bits = self.bits(stem)
        group = self.groups(stem, packed.shape[0] * WORD // bits, scales.shape[0])
        zero_GO = zero_points(unpack(zeros, bits), bits, self.version)
        return Grouped(packed, zero_GO.to(torch.int16), scales, group, bits)

    def packed_shape(self, name: str) -> tuple[int, int] | None:
        if not self.packs(name):
            return None
        stem = name.removesuffix(WEIGHT)
        rows, outputs = self.stored.shape(stem + MARK)
        return outputs, rows * WORD // self.bits(stem)

    def bits(self, stem: str) -> int:
        """From the shapes: metadata is often wrong. Raises UnsupportedModelError unless 4 or 8."""
        outputs = self.stored.shape(stem + MARK)[1]
        bits = self.stored.shape(f"{stem}.qzeros")[1] * WORD / outputs
        if bits not in (4, 8):
            raise UnsupportedModelError(f"GPTQ layer {stem!r} has {bits:g}-bit weights; lightrm reads 4 and 8 bits")
        return int(bits)

    def groups(self, stem: str, inputs: int, count: int) -> torch.Tensor:
        """Group of each input channel (I,). Raises TensorMismatchError if it points outside the groups."""
        if f"{stem}.g_idx" not in self.stored.names:
            return torch.arange(inputs) // -(-inputs // count)
        group = self.stored.read(f"{stem}.g_idx").long()
        if group.shape != (inputs,) or int(group.min()) < 0 or int(group.max()) >= count:
            raise TensorMismatchError(
                f"GPTQ layer {stem!r}: g_idx {tuple(group.shape)} up to {int(group.max())} does not fit "
                f"{inputs} inputs in {count} groups"
            )
        return group


def is_gptq(source: TensorSource) -> bool:
    return any(name.endswith(MARK) for name in source.names)


def format_version(config: Config, folder: Path) -> int:
    """1 or 2, from `checkpoint_format` in config.json or quantize_config.json; 1 where neither says."""
    settings = config.raw.get("quantization_config")
    if not isinstance(settings, dict) and (folder / "quantize_config.json").is_file():
        settings = read_config(folder, "quantize_config.json").raw
    settings = settings if isinstance(settings, dict) else {}
    return 2 if settings.get("checkpoint_format") == "gptq_v2" else 1
