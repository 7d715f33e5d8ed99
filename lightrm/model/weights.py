"""How the matrix of a linear layer is held, and its product with a block of rows.

    PlainWeight     a float tensor
    Int8Weight      int8 with a float scale for each output channel
    Int4Weight      int4 in groups with integer multipliers (`schemes.int4`), widened block by block
    ForeignWeight   in another program's 4 or 8 bits: GPTQ's (`schemes.grouped`, on a card as
                    `schemes.tiled`), bitsandbytes' (`schemes.blockwise`)

Each knows its size in memory, gives some of its output channels as a weight of their own (`outputs`), and multiplies
float rows (`product`), or is made of integers that the integer path multiplies (`integers`), or both; nothing here
knows layers, files or models. O x I a weight, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightrm.kernels import products
from lightrm.schemes import int4, int8
from lightrm.schemes.blockwise import Blockwise
from lightrm.schemes.grouped import Grouped
from lightrm.schemes.int8 import Rowwise
from lightrm.schemes.tiled import Tiled


@dataclass(frozen=True, slots=True)
class PlainWeight:
    """weight_OI (O, I) in the compute dtype."""

    weight_OI: torch.Tensor

    def product(self, x_TI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        return products.linear(x_TI, self.weight_OI, bias_O)

    def outputs(self, start: int, end: int) -> PlainWeight:
        return PlainWeight(self.weight_OI[start:end])

    @property
    def bytes(self) -> int:
        return self.weight_OI.nbytes


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """values int8 (O, I), scale float32 (O,)."""

    values_OI: torch.Tensor
    scale_O: torch.Tensor

    @property
    def integers(self) -> Rowwise:
        return Rowwise(self.values_OI, self.scale_O)

    def product(self, x_TI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        """LLM.int8: the way of bitsandbytes, which decides for itself what becomes int8."""
        return products.mixed_product(x_TI, self.values_OI, self.scale_O, bias_O)

    def outputs(self, start: int, end: int) -> Int8Weight:
        return Int8Weight(self.values_OI[start:end], self.scale_O[start:end])

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

    @property
    def integers(self) -> int4.Int4:
        return self.held

    def product(self, x_TI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        return products.widened_product(x_TI, self.held, bias_O)

    def outputs(self, start: int, end: int) -> Int4Weight:
        packed, multiplier_OG, scale_O = self.held.packed, self.held.multiplier_OG, self.held.scale_O
        return Int4Weight(int4.Int4(packed[start:end], multiplier_OG[start:end], scale_O[start:end]))

    def float(self) -> torch.Tensor:
        return int4.dequantize(self.held)

    @property
    def bytes(self) -> int:
        return self.held.packed.nbytes + self.held.multiplier_OG.nbytes + self.held.scale_O.nbytes


@dataclass(frozen=True, slots=True)
class ForeignWeight:
    """Matrices one below the other: a fused layer's parts may have groups of their own."""

    parts: tuple[Grouped | Tiled | Blockwise, ...]

    def product(self, x_TI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        y_TO = x_TI.new_empty(len(x_TI), sum(part.shape[0] for part in self.parts))
        at = 0
        for part in self.parts:
            step = products.WIDENED_ROWS if isinstance(part, Grouped) else part.shape[0]
            for start in range(0, part.shape[0], step):
                end = min(start + step, part.shape[0])
                rows = slice(at, at + end - start)
                bias = None if bias_O is None else bias_O[rows]
                if isinstance(part, Blockwise):
                    y_TO[:, rows] = products.blockwise_product(x_TI, part, bias)
                elif isinstance(part, Tiled):
                    y_TO[:, rows] = products.grouped_product(x_TI, part, bias)
                else:
                    y_TO[:, rows] = products.linear(x_TI, part.rows(start, end).to(x_TI.dtype), bias)
                at += end - start
        return y_TO

    def outputs(self, start: int, end: int) -> ForeignWeight | None:
        """None if a part would have to be cut in two."""
        whole, at = [], 0
        for part in self.parts:
            first, at = at, at + part.shape[0]
            if start <= first and at <= end:
                whole.append(part)
            elif first < end and start < at:
                return None
        return ForeignWeight(tuple(whole))

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


Held = PlainWeight | Int8Weight | Int4Weight | ForeignWeight
