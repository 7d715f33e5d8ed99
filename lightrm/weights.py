"""How the matrix of a linear layer is held, and its product with a block of rows.

    PlainWeight   a float tensor
    Int8Weight    int8 with a float scale for each output channel
    Int4Weight    int4 in groups with integer multipliers (`schemes.int4`), widened block by block
    FileWeight    a GPTQ file's own 4- or 8-bit values (`schemes.grouped`), widened block by block

Each knows its size in memory; nothing here knows layers, files or models. A `Packer` makes one of them from float rows
that arrive a few at a time. O x I a weight, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from lightrm import ops
from lightrm.schemes import int4, int8
from lightrm.schemes.grammar import Scheme
from lightrm.schemes.grouped import Grouped
from lightrm.schemes.quality import energies

PACKED_AT_ONCE = 2**18  # numbers that a packer rounds at one time


@dataclass(frozen=True, slots=True)
class PlainWeight:
    """weight_OI (O, I) in the compute dtype."""

    weight_OI: torch.Tensor

    def product(self, x_TI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        return ops.linear(x_TI, self.weight_OI, bias_O)

    @property
    def bytes(self) -> int:
        return self.weight_OI.nbytes


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """values int8 (O, I), scale float32 (O,)."""

    values_OI: torch.Tensor
    scale_O: torch.Tensor

    def integer_product(self, values_TI: torch.Tensor) -> torch.Tensor:
        return ops.int8_product(values_TI, self.values_OI)

    def float(self) -> torch.Tensor:
        return int8.dequantize_rows(self.values_OI, self.scale_O)

    @property
    def bytes(self) -> int:
        return self.values_OI.nbytes + self.scale_O.nbytes


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """See `schemes.int4.Int4`."""

    held: int4.Int4

    @property
    def scale_O(self) -> torch.Tensor:
        return self.held.scale_O

    def integer_product(self, values_TI: torch.Tensor) -> torch.Tensor:
        return ops.int4_product(values_TI, self.held.packed, self.held.multiplier_OG)

    def product(self, x_TI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        """Widened to the dtype of x: exact in int8, rounded once by the channel's scale."""
        y_TO = x_TI.new_empty(len(x_TI), len(self.scale_O))
        for start in range(0, len(self.scale_O), ops.WIDENED_ROWS):
            rows = slice(start, start + ops.WIDENED_ROWS)
            widened = ops.widen(self.held.packed[rows], self.held.multiplier_OG[rows])
            weight_OI = widened.to(x_TI.dtype) * self.scale_O[rows, None].to(x_TI.dtype)
            y_TO[:, rows] = ops.linear(x_TI, weight_OI, None if bias_O is None else bias_O[rows])
        return y_TO

    def float(self) -> torch.Tensor:
        return int4.dequantize(self.held)

    @property
    def bytes(self) -> int:
        return self.held.packed.nbytes + self.held.multiplier_OG.nbytes + self.held.scale_O.nbytes


@dataclass(frozen=True, slots=True)
class FileWeight:
    """Matrices one below the other: a fused layer's parts may have groups of their own."""

    parts: tuple[Grouped, ...]

    def product(self, x_TI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        y_TO = x_TI.new_empty(len(x_TI), sum(part.shape[0] for part in self.parts))
        at = 0
        for part in self.parts:
            for start in range(0, part.shape[0], ops.WIDENED_ROWS):
                weight_OI = part.rows(start, min(start + ops.WIDENED_ROWS, part.shape[0])).to(x_TI.dtype)
                rows = slice(at, at + len(weight_OI))
                y_TO[:, rows] = ops.linear(x_TI, weight_OI, None if bias_O is None else bias_O[rows])
                at += len(weight_OI)
        return y_TO

    @property
    def bytes(self) -> int:
        tensors = (t for p in self.parts for t in (p.packed, p.zero_GO, p.scale_GO, p.group_I))
        return sum(tensor.nbytes for tensor in tensors)


class Packer:
    """Float rows in, a held weight out. Signal and noise are counted on the way, while both forms are at hand."""

    def __init__(self, scheme: Scheme, outputs: int, inputs: int, device: torch.device) -> None:
        self.scheme = scheme
        self.signal = self.noise = 0.0
        self.group = int4.group_for(inputs, scheme.group) if scheme.weights == "int4" else inputs
        empty = partial(torch.empty, device=device)
        if scheme.weights == "float":
            self.held = [empty(outputs, inputs, dtype=scheme.dtype)]
        elif scheme.weights == "int8":
            self.held = [empty(outputs, inputs, dtype=torch.int8), empty(outputs)]
        else:
            multipliers = empty(outputs, inputs // self.group, dtype=torch.int8)
            self.held = [empty(outputs, inputs // 2, dtype=torch.uint8), multipliers, empty(outputs)]

    def put(self, start: int, rows_OI: torch.Tensor) -> None:
        """Place rows from `start` on, a few at a time, so that no second copy of the whole is ever held."""
        for part in torch.split(rows_OI, max(1, PACKED_AT_ONCE // rows_OI.shape[1])):
            rows = part.to(self.held[0].device)
            parts, found = self.pack(rows)
            for whole, made in zip(self.held, parts, strict=True):
                whole[start : start + len(rows)] = made
            signal, noise = energies(rows, found)
            self.signal, self.noise = self.signal + signal, self.noise + noise
            start += len(rows)

    def pack(self, rows: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """The held form of some rows, and what it stands for in float32."""
        if self.scheme.weights == "float":
            cast = rows.to(self.scheme.dtype)
            return (cast,), cast.float()
        if self.scheme.weights == "int8":
            values, scale = int8.quantize_rows(rows)
            return (values, scale), int8.dequantize_rows(values, scale)
        made = int4.quantize(rows, self.group)
        return (made.packed, made.multiplier_OG, made.scale_O), int4.dequantize(made)

    def weight(self) -> PlainWeight | Int8Weight | Int4Weight:
        if self.scheme.weights == "float":
            return PlainWeight(self.held[0])
        if self.scheme.weights == "int8":
            return Int8Weight(self.held[0], self.held[1])
        return Int4Weight(int4.Int4(*self.held))
