"""How the matrix of a linear layer is held, and its product with a block of rows.

    PlainWeight     a float tensor
    Int8Weight      int8 with a float scale for each output channel
    Int4Weight      int4 in groups with integer multipliers (`schemes.int4`), widened block by block
    ForeignWeight   in another program's 4 or 8 bits: GPTQ's (`schemes.grouped`), bitsandbytes' (`schemes.blockwise`)

Each knows its size in memory, and multiplies int8 rows (`integer_product`), float rows (`product`), or either; nothing
here knows layers, files or models. O x I a weight, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightrm import ops
from lightrm.schemes import int4, int8
from lightrm.schemes.blockwise import Blockwise
from lightrm.schemes.grouped import Grouped


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

    def product(self, x_TI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        """LLM.int8: the way of bitsandbytes, which decides for itself what becomes int8."""
        return ops.mixed_product(x_TI, self.values_OI, self.scale_O, bias_O)

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
class ForeignWeight:
    """Matrices one below the other: a fused layer's parts may have groups of their own."""

    parts: tuple[Grouped | Blockwise, ...]

    def product(self, x_TI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        y_TO = x_TI.new_empty(len(x_TI), sum(part.shape[0] for part in self.parts))
        at = 0
        for part in self.parts:
            step = ops.WIDENED_ROWS if isinstance(part, Grouped) else part.shape[0]
            for start in range(0, part.shape[0], step):
                end = min(start + step, part.shape[0])
                rows = slice(at, at + end - start)
                bias = None if bias_O is None else bias_O[rows]
                if isinstance(part, Blockwise):
                    y_TO[:, rows] = ops.blockwise_product(x_TI, part, bias)
                else:
                    y_TO[:, rows] = ops.linear(x_TI, part.rows(start, end).to(x_TI.dtype), bias)
                at += end - start
        return y_TO

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


Held = PlainWeight | Int8Weight | Int4Weight | ForeignWeight
