"""Files of auto-gptq, GPTQModel and optimum: weights of 2, 3, 4 or 8 bits in groups, widened or kept as they are.

For each linear layer X of O x I, with G groups along I (the format is auto-gptq's; the rounding is arXiv 2210.17323):

    X.qweight  int32 (I * bits / 32, O)   values of one column, bit after bit, lowest first, along I
    X.qzeros   int32 (G, O * bits / 32)   zero points, packed along O; version 1 stores them minus one
    X.scales   float (G, O)
    X.g_idx    int32 (I,)                 group of each input channel; shuffled under activation order; may be absent

    weight[o, i] = scales[g_idx[i], o] * (q[i, o] - zero[g_idx[i], o])

A config says the version, and whether the values are symmetric (`Terms`, from `quantized`). Tensors that contradict it
are refused. A symmetric file shows its version by itself: its zero points are 2^(bits-1).

The product is rounded to the dtype of the scales, as in those tools' own layers: fp16 files give fp16 weights, and
scores in fp32 then agree with theirs to 1e-5 instead of 1e-2. `read` dequantizes one tensor at a time; `packed` returns
the values as they are, for w4a16; those of 3 bits take 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightrm.checkpoints.source import PackedSource, TensorSource
from lightrm.errors import TensorMismatchError, UnsupportedModelError
from lightrm.schemes.grouped import WORD, Grouped, pack_words, unpack, unpack_dense

MARK, WEIGHT = ".qweight", ".weight"
PARTS = ("qweight", "qzeros", "scales", "g_idx")
READ, ACROSS = (2, 3, 4, 8), 3  # bits of a value; these lie across two words


@dataclass(frozen=True, slots=True)
class Terms:
    """What a config says of the packed layers; None for what it does not say.

    version: of the zero points. bits, group (-1: all inputs), symmetric: of the values. ordered: whether activation
    order spreads channels over groups. uniform: whether all this holds for every layer. where: the file that says it.
    """

    where: str
    version: int | None = None
    bits: int | None = None
    group: int | None = None
    symmetric: bool | None = None
    ordered: bool = False
    uniform: bool = True


class GptqSource(PackedSource):
    """A source in which each `X.qweight` of a file appears as `X.weight`."""

    holds = "w4a16"

    def __init__(self, stored: TensorSource, terms: Terms) -> None:
        super().__init__(stored)
        self.terms = terms
        for name in stored.names:
            if name.endswith(MARK):
                self.hide(name.removesuffix(MARK))

    def packs(self, name: str) -> bool:
        return name.endswith(WEIGHT) and name.removesuffix(WEIGHT) + MARK in self.stored.names

    def hide(self, stem: str) -> None:
        """Replace the parts of a layer by its weight. auto-gptq writes a bias of zeros if the model has none; it is
        hidden too."""
        absent = [part for part in PARTS[:3] if f"{stem}.{part}" not in self.stored.names]
        if absent:
            raise TensorMismatchError(f"GPTQ layer {stem!r} lacks {', '.join(absent)}")
        self.check(stem)
        for part in PARTS:
            self.names.pop(f"{stem}.{part}", None)
        bias = f"{stem}.bias"
        if bias in self.names and not self.stored.read(bias).any():
            del self.names[bias]
        self.names[stem + WEIGHT] = self.stored.names[stem + MARK]

    def check(self, stem: str) -> None:
        """Check shapes against each other and against the config. Raises TensorMismatchError or
        UnsupportedModelError."""
        packed, zeros, scales = (self.stored.shape(f"{stem}.{part}") for part in PARTS[:3])
        terms, bits = self.terms, self.bits(stem)
        inputs, groups = packed[0] * WORD // bits, scales[0]
        if scales != (zeros[0], packed[1]) or not 0 < groups <= inputs:
            raise TensorMismatchError(
                f"GPTQ layer {stem!r}: qweight {packed}, qzeros {zeros} and scales {scales} do not fit each other"
            )
        if not terms.uniform:
            return
        if terms.bits is not None and terms.bits != bits:
            raise TensorMismatchError(
                f"GPTQ layer {stem!r} has {bits} bits, {terms.where} says {terms.bits}: are they of one model?"
            )
        if terms.group is not None and groups != (1 if terms.group < 1 else -(-inputs // terms.group)):
            raise TensorMismatchError(
                f"GPTQ layer {stem!r} has {groups} groups of its {inputs} inputs, {terms.where} says groups of "
                f"{terms.group}: are they of one model?"
            )
        if terms.ordered and groups > 1 and f"{stem}.g_idx" not in self.stored.names:
            raise TensorMismatchError(
                f"GPTQ layer {stem!r} lacks g_idx, and {terms.where} says desc_act: its groups are not known"
            )

    def packed(self, name: str) -> Grouped | None:
        if not self.packs(name):
            return None
        stem = name.removesuffix(WEIGHT)
        packed, zeros, scales = (self.stored.read(f"{stem}.{part}") for part in PARTS[:3])
        if packed.dtype != torch.int32 or zeros.dtype != torch.int32:
            raise UnsupportedModelError(
                f"GPTQ layer {stem!r} is packed in {packed.dtype} and {zeros.dtype}; lightrm reads int32"
            )
        bits = self.bits(stem)
        group = self.groups(stem, packed.shape[0] * WORD // bits, scales.shape[0])
        if bits == ACROSS:
            zero_GO = self.zero_points(stem, unpack_dense(zeros, bits), bits)
            wider = pack_words(unpack_dense(packed.T, bits), bits + 1).T
            return Grouped(wider, zero_GO.to(torch.int16), scales, group, bits + 1)
        zero_GO = self.zero_points(stem, unpack(zeros, bits), bits)
        return Grouped(packed, zero_GO.to(torch.int16), scales, group, bits)

    def packed_shape(self, name: str) -> tuple[int, int] | None:
        if not self.packs(name):
            return None
        stem = name.removesuffix(WEIGHT)
        rows, outputs = self.stored.shape(stem + MARK)
        return outputs, rows * WORD // self.bits(stem)

    def bits(self, stem: str) -> int:
        """Return the bits of a value, from the shapes. Raises UnsupportedModelError on any that lightrm does not
        read."""
        shapes = [self.stored.shape(f"{stem}.{part}") for part in PARTS[:3]]
        if any(len(shape) != 2 or 0 in shape for shape in shapes):
            raise TensorMismatchError(f"GPTQ layer {stem!r} has parts of shapes {shapes}, expected matrices")
        outputs, words = shapes[0][1], shapes[1][1]
        if outputs == words:
            raise UnsupportedModelError(
                f"layer {stem!r} is packed along its outputs, as AWQ packs, and {self.terms.where} does not say awq: "
                "take the model's GPTQ or full-precision files, or its own config.json"
            )
        bits = words * WORD / outputs
        if bits not in READ or (bits == ACROSS and (words % ACROSS or shapes[0][0] % ACROSS)):
            raise UnsupportedModelError(
                f"GPTQ layer {stem!r} has {bits:g}-bit weights; lightrm reads {', '.join(map(str, READ))} bits"
            )
        return int(bits)

    def groups(self, stem: str, inputs: int, count: int) -> torch.Tensor:
        """Return the group of each input channel (I,). Raises TensorMismatchError if one is outside the groups."""
        if f"{stem}.g_idx" not in self.stored.names:
            return torch.arange(inputs) // -(-inputs // count)
        group = self.stored.read(f"{stem}.g_idx").long()
        if group.shape != (inputs,) or int(group.min()) < 0 or int(group.max()) >= count:
            raise TensorMismatchError(
                f"GPTQ layer {stem!r}: g_idx {tuple(group.shape)} up to {int(group.max())} does not fit "
                f"{inputs} inputs in {count} groups"
            )
        return group

    def zero_points(self, stem: str, stored_GO: torch.Tensor, bits: int) -> torch.Tensor:
        """Return the real zero points of the stored ones.

        Raises TensorMismatchError if the config calls them symmetric and they are not, UnsupportedModelError if nothing
        tells their version.
        """
        terms, middle = self.terms, 2 ** (bits - 1)
        known = terms.symmetric if terms.uniform else None
        told = next((version for version in (1, 2) if bool((stored_GO == middle - 2 + version).all())), None)
        if known and told is None:
            raise TensorMismatchError(
                f"GPTQ layer {stem!r} has zero points {int(stored_GO.min())} to {int(stored_GO.max())}, "
                f"{terms.where} says that its grid is symmetric"
            )
        version = terms.version if known is False or told is None else told
        if version is None:
            raise UnsupportedModelError(
                f"GPTQ layer {stem!r}: {terms.where} does not say how its zero points are stored (packing_format)"
            )
        return stored_GO + int(version == 1)


def is_gptq(source: TensorSource) -> bool:
    return any(name.endswith(MARK) for name in source.names)
