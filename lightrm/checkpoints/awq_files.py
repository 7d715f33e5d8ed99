"""Files of AutoAWQ (arXiv 2306.00978), version "gemm": 4-bit weights in groups.

For each linear layer X of O x I, with G groups along I (the format is AutoAWQ's):

    X.qweight  int32 (I, O / 8)    eight values of one row in a word, of the outputs 0 2 4 6 1 3 5 7, lowest bits first
    X.qzeros   int32 (G, O / 8)    zero points, packed alike and stored as they are
    X.scales   float (G, O)

    weight[o, i] = scales[i / group, o] * (q[i, o] - zero[i / group, o])      rounded to the dtype of the scales

That is `schemes.grouped` in another order, so the values are packed again, along I, and stay exactly what they are.
The other versions (gemv, gemv_fast, marlin ...) store the same names in other orders, which no shape tells for certain:
they are refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightrm.checkpoints.config import Config, shown
from lightrm.checkpoints.source import PackedSource, TensorSource
from lightrm.errors import TensorMismatchError, UnsupportedModelError
from lightrm.schemes.grouped import WORD, Grouped, pack_words, unpack

MARK, WEIGHT = ".qweight", ".weight"
PARTS = ("qweight", "qzeros", "scales")
BITS = 4
IN_WORD = WORD // BITS
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of outputs 0 .. 7 in their word


# Older files beside the weights, and newer configs, spell a setting differently.
SPELLINGS = {"version": ("version", "format", "checkpoint_format"), "bits": ("bits", "w_bit"),
             "group": ("group_size", "q_group_size")}  # fmt: skip


@dataclass(frozen=True, slots=True)
class AwqTerms:
    """What a config says of the packed layers. group: inputs of a group, -1 for all, None if it does not say. where:
    the file that says it."""

    where: str
    group: int | None


class AwqSource(PackedSource):
    """A source in which each `X.qweight` of a file appears as `X.weight`."""

    holds = "w4a16"

    def __init__(self, stored: TensorSource, terms: AwqTerms) -> None:
        super().__init__(stored)
        self.terms = terms
        for name in stored.names:
            if name.endswith(MARK):
                self.hide(name.removesuffix(MARK))

    def hide(self, stem: str) -> None:
        """Replace the parts of a layer by its weight. Raises TensorMismatchError or UnsupportedModelError."""
        absent = [part for part in PARTS if f"{stem}.{part}" not in self.stored.names]
        if absent:
            raise TensorMismatchError(f"AWQ layer {stem!r} lacks {', '.join(absent)}")
        self.check(stem)
        for part in PARTS:
            self.names.pop(f"{stem}.{part}")
        self.names[stem + WEIGHT] = self.stored.names[stem + MARK]

    def check(self, stem: str) -> None:
        shapes = [self.stored.shape(f"{stem}.{part}") for part in PARTS]
        dtypes = [self.stored.dtype(f"{stem}.{part}") for part in PARTS]
        packed, zeros, scales = shapes
        if any(len(shape) != 2 or 0 in shape for shape in shapes):
            raise TensorMismatchError(f"AWQ layer {stem!r} has parts of shapes {shapes}, expected matrices")
        groups, outputs = scales
        fits = packed[1] == zeros[1] == outputs / IN_WORD and zeros[0] == groups
        if not fits or packed[0] % groups or packed[0] % IN_WORD:
            raise TensorMismatchError(
                f"AWQ layer {stem!r}: qweight {packed}, qzeros {zeros} and scales {scales} do not fit 4 bits of "
                "version gemm"
            )
        if dtypes[:2] != [torch.int32, torch.int32] or dtypes[2] not in (torch.float16, torch.bfloat16, torch.float32):
            raise UnsupportedModelError(
                f"AWQ layer {stem!r} is stored in {', '.join(map(str, dtypes))}; lightrm reads int32 with float scales"
            )
        group = packed[0] // groups
        if self.terms.group is not None and group != (packed[0] if self.terms.group < 1 else self.terms.group):
            raise TensorMismatchError(
                f"AWQ layer {stem!r} has groups of {group} inputs, {self.terms.where} says {self.terms.group}: are "
                "they of one model?"
            )

    def packs(self, name: str) -> bool:
        return name.endswith(WEIGHT) and name.removesuffix(WEIGHT) + MARK in self.stored.names

    def packed(self, name: str) -> Grouped | None:
        if not self.packs(name):
            return None
        stem = name.removesuffix(WEIGHT)
        packed, zeros, scale_GO = (self.stored.read(f"{stem}.{part}") for part in PARTS)
        values_IO, zero_GO = (in_order(words) for words in (packed, zeros))
        inputs, groups = len(values_IO), len(scale_GO)
        group_I = torch.arange(inputs) // (inputs // groups)
        return Grouped(pack_words(values_IO.T.contiguous(), BITS).T, zero_GO.to(torch.int16), scale_GO, group_I, BITS)

    def packed_shape(self, name: str) -> tuple[int, int] | None:
        if not self.packs(name):
            return None
        inputs, words = self.stored.shape(name.removesuffix(WEIGHT) + MARK)
        return words * IN_WORD, inputs


def in_order(words: torch.Tensor) -> torch.Tensor:
    """Return the values in words (N, O / 8) with the outputs in order, uint8 (N, O)."""
    values = unpack(words, BITS).to(torch.uint8).view(len(words), -1, IN_WORD)
    return values[:, :, list(PLACES)].flatten(1)


def read_awq_terms(values: Config, where: str) -> AwqTerms:
    """Return what a config says. Raises UnsupportedModelError on another version than gemm, or other bits than 4."""
    said = {name: [values.raw[spelling] for spelling in spellings if values.has(spelling)]
            for name, spellings in SPELLINGS.items()}  # fmt: skip
    wrong = [f"version {shown(one)}" for one in said["version"] if str(one).lower() != "gemm"]
    wrong += [f"{shown(one)} bits" for one in said["bits"] if one != BITS]
    wrong += ["no zero points"] if values.has("zero_point") and not values.flag("zero_point") else []
    if wrong:
        raise UnsupportedModelError(
            f"{where} says AWQ with {', '.join(wrong)}; lightrm reads version gemm with 4 bits and zero points: take "
            "the model's full-precision files, or those of that version"
        )
    group = said["group"][0] if said["group"] else None
    return AwqTerms(where, group if isinstance(group, int) and not isinstance(group, bool) else None)
