"""What an implementation of the passes, of attention and of the products has: each is a module with these functions.

Declared once, for all of them: `dispatch` names the modules, and mypy holds each against its protocol. Shapes as in
`passes` and `products`, where it is said what each function does; where one changes its input, that is said here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from lightrm.kernels.operands import Heads, Rotation, Rows, Sums
from lightrm.kernels.paths import Paths
from lightrm.kernels.segments import Segment
from lightrm.schemes.blockwise import Blockwise
from lightrm.schemes.int4 import Int4
from lightrm.schemes.int8 import Rowwise
from lightrm.schemes.tiled import Tiled


class Passes(Protocol):
    """Between products, a row read and written once."""

    def rms_norm(self, x_TD: torch.Tensor, weight_D: torch.Tensor | None, eps: float, /) -> torch.Tensor: ...
    def norm_each(self, x_SD: torch.Tensor, weight_D: torch.Tensor | None, eps: float, /) -> torch.Tensor: ...
    def value_head(
        self, x_SD: torch.Tensor, weight_KD: torch.Tensor, bias_K: torch.Tensor | None, /
    ) -> torch.Tensor: ...
    def silu_mul(self, gate_up_TF2: torch.Tensor, block: int, /) -> torch.Tensor: ...
    def quantize(self, x_TI: torch.Tensor, /) -> Rows: ...
    def norm_quantize(self, x_TD: torch.Tensor, eps: float, shift_D: torch.Tensor | None, /) -> Rows: ...
    def add_norm_quantize(self, x_TD: torch.Tensor, sums: Sums, eps: float, shift_D: torch.Tensor | None, /) -> Rows:
        """x += sums, in place, on the way."""

    def add_sums(self, x_TD: torch.Tensor, sums: Sums, /) -> None:
        """x += sums, in place."""

    def silu_mul_quantize(self, sums: Sums, block: int, /) -> Rows: ...
    def split_heads(self, sums: Sums, widths: tuple[int, int], head_width: int, rotation: Rotation, /) -> Heads:
        """Float sums may be used up."""

    def widen(self, packed: torch.Tensor, multiplier_OG: torch.Tensor, /) -> torch.Tensor: ...


class Attention(Protocol):
    """Over a pack. paths: of the segments, for the kernel's own tiles."""

    def paths(self, segments: Sequence[Segment], device: torch.device, picked: Sequence[int] | None, /) -> Paths: ...
    def attention(
        self, query_THE: torch.Tensor, key_TJE: torch.Tensor, value_TJE: torch.Tensor, paths: Paths,
        slopes_H: torch.Tensor | None, /,
    ) -> torch.Tensor: ...  # fmt: skip


class CardAttention(Attention, Protocol):
    """Whose rows may leave as int8."""

    def attention_quantize(
        self, query_THE: torch.Tensor, key_TJE: torch.Tensor, value_TJE: torch.Tensor, paths: Paths,
        slopes_H: torch.Tensor | None, /,
    ) -> Rows: ...  # fmt: skip


class Products(Protocol):
    """Of int8 rows, and of float rows with 4-bit weights."""

    def multiply(self, rows: Rows, weight: Rowwise | Int4, bias_O: torch.Tensor | None, /) -> Sums: ...
    def multiply_onto(
        self, x_TO: torch.Tensor, rows: Rows, weight: Rowwise | Int4, bias_O: torch.Tensor | None, /
    ) -> Sums | None:
        """x += product, in place; or the product, which is then still to be added."""

    def widened_product(self, x_TI: torch.Tensor, weight: Int4, bias_O: torch.Tensor | None, /) -> torch.Tensor: ...


class CardProducts(Products, Protocol):
    """And of 4-bit weights of other programs' grids, laid out for the kernel."""

    def grouped_product(self, x_TI: torch.Tensor, weight: Tiled, bias_O: torch.Tensor | None, /) -> torch.Tensor: ...


class BlockwiseProducts(Protocol):
    """Of bitsandbytes' formats."""

    def quantize_blockwise(self, weight_OI: torch.Tensor, /) -> Blockwise: ...

    def blockwise_product(
        self, x_TI: torch.Tensor, weight: Blockwise, bias_O: torch.Tensor | None, /
    ) -> torch.Tensor: ...
    def mixed_product(self, x_TI: torch.Tensor, weight: Rowwise, bias_O: torch.Tensor | None, /) -> torch.Tensor: ...


class Rounding(Protocol):
    """Of columns, one after the other."""

    def round_columns(
        self, weight_OI: torch.Tensor, run: range, end: int, step_O: torch.Tensor, factor_II: torch.Tensor,
        bounds: tuple[int, int], /,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip
