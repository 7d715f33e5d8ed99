"""The inputs and results of products: rows, weights, sums; and the residual stream that a product is added to. Also
what attention does to a score before the softmax.

Shapes: T tokens, O x I a weight, H query heads, E head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from lightrm.schemes.blockwise import Blockwise
from lightrm.schemes.grouped import Grouped
from lightrm.schemes.int4 import Int4
from lightrm.schemes.int8 import Rowwise
from lightrm.schemes.tiled import Tiled

WIDENED_ROWS = 1024  # output channels of a 4-bit weight that are widened at one time
Rotation = tuple[torch.Tensor, torch.Tensor] | None  # RoPE's cos and sin, float32 (T, E / 2)
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # query, key, value, each (T, heads, E)
Activation = Literal["silu", "gelu_tanh"]  # of a gated MLP
# Both are g * sigmoid(factor * (g + cubic * g^3)). For GELU by tanh (arXiv 1606.08415) since 1 + tanh(z) = 2
# sigmoid(2z).
CURVES: dict[Activation, tuple[float, float]] = {"silu": (1.0, 0.0), "gelu_tanh": (2 * (2 / math.pi) ** 0.5, 0.044715)}


class HeadNorms(NamedTuple):
    """RMSNorm over each head of query and of key, before RoPE. Weights float32 (E,)."""

    query_E: torch.Tensor
    key_E: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class ScoreRule:
    """From the product of a query and a key to what the softmax sees: cap(scale * q k) + slope * (j - i).

    slopes_H: of ALiBi, float32 (H,), or None. softcap: cap(x) = softcap * tanh(x / softcap) (Gemma 2, arXiv
    2408.00118); None for no cap. window: a query at position i sees the keys at i - window + 1 .. i; None for all keys
    up to i.
    """

    scale: float
    slopes_H: torch.Tensor | None = None
    softcap: float | None = None
    window: int | None = None

    def first_key(self, query: int) -> int:
        """Return the position of the first key that a query sees."""
        return 0 if self.window is None else max(0, query - self.window + 1)


class Rows(NamedTuple):
    """The input of a product: float (T, I) without a scale, or int8 (T, I) with a scale float32 (T,), meaning values *
    scale."""

    values_TI: torch.Tensor
    scale_T: torch.Tensor | None = None

    def select(self, rows_S: torch.Tensor) -> Rows:
        """Return some of the rows."""
        return Rows(self.values_TI[rows_S], None if self.scale_T is None else self.scale_T[rows_S])


class Sums(NamedTuple):
    """The result of a product: floats (T, O) and None for the rest, or int32 (T, O), which stands for acc * row_scale_T
    * scale_O + bias_O (no bias means 0). The pass that reads it applies the scales."""

    acc_TO: torch.Tensor
    row_scale_T: torch.Tensor | None = None
    scale_O: torch.Tensor | None = None
    bias_O: torch.Tensor | None = None

    def float(self) -> torch.Tensor:
        """Return the product itself, float32 (T, O)."""
        if self.row_scale_T is None or self.scale_O is None:
            return self.acc_TO.float()
        product_TO = self.acc_TO.float() * (self.row_scale_T[:, None] * self.scale_O)
        return product_TO if self.bias_O is None else product_TO + self.bias_O


@dataclass(slots=True)
class Residual:
    """The residual stream. pending: a product that was not added yet; the next pass over the stream adds it."""

    x_TD: torch.Tensor
    pending: Sums | None = None

    def take_pending(self) -> Sums | None:
        """Return the pending product and forget it: the caller adds it."""
        pending, self.pending = self.pending, None
        return pending


@dataclass(frozen=True, slots=True)
class Parts:
    """The matrices of one fused layer in another program's format, stacked: each has groups of its own."""

    parts: tuple[Grouped | Tiled | Blockwise, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def outputs(self, start: int, end: int) -> Parts | None:
        """Return output channels start .. end; None if a matrix would have to be divided."""
        whole, at = [], 0
        for part in self.parts:
            first, at = at, at + part.shape[0]
            if start <= first and at <= end:
                whole.append(part)
            elif first < end and start < at:
                return None
        return Parts(tuple(whole))


Held = torch.Tensor | Rowwise | Int4 | Parts  # a weight: float, int8, int4, or as another program's file has it


def outputs(weight: Held, start: int, end: int) -> Held | None:
    """Return output channels start .. end of a weight without a copy; None if its format cannot be divided so."""
    return weight[start:end] if isinstance(weight, torch.Tensor) else weight.outputs(start, end)
