"""The functions that a module of passes, of attention or of products must have.

Declared once for all implementations: `dispatch` names the modules, and mypy checks each against its protocol. `passes`
and `products` say what each function does and give its shapes; a function that changes its input is marked here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from lightrm.kernels.operands import Activation, HeadNorms, Heads, Rotation, Rows, ScoreRule, Sums
from lightrm.kernels.paths import Paths
from lightrm.kernels.segments import Segment
from lightrm.schemes.blockwise import Blockwise
from lightrm.schemes.int4 import Int4
from lightrm.schemes.int8 import Rowwise
from lightrm.schemes.tiled import Tiled


class Passes(Protocol):
    """The passes between products; each reads and writes a row once."""

    def rms_norm(self, x_TD: torch.Tensor, weight_D: torch.Tensor | None, eps: float, /) -> torch.Tensor: ...
    def norm_each(self, x_SD: torch.Tensor, weight_D: torch.Tensor | None, eps: float, /) -> torch.Tensor: ...
    def value_head(
        self, x_SD: torch.Tensor, weight_KD: torch.Tensor, bias_K: torch.Tensor | None, /
    ) -> torch.Tensor: ...
    def gated(self, gate_up_TF2: torch.Tensor, block: int, activation: Activation, /) -> torch.Tensor: ...
    def quantize(self, x_TI: torch.Tensor, /) -> Rows: ...
    def norm_quantize(
        self, x_TD: torch.Tensor, eps: float, weight_D: torch.Tensor | None, shift_D: torch.Tensor | None, block: int, /
    ) -> Rows: ...
    def add_norm_quantize(
        self, x_TD: torch.Tensor, sums: Sums, eps: float, weight_D: torch.Tensor | None, shift_D: torch.Tensor | None,
        block: int, /,
    ) -> Rows:  # fmt: skip
        """x += sums in place, then RMSNorm, the block Hadamard transform, and int8."""

    def add_normed(self, x_TD: torch.Tensor, sums: Sums, weight_D: torch.Tensor, eps: float, /) -> None:
        """x += RMSNorm(sums) * weight, in place."""

    def add_sums(self, x_TD: torch.Tensor, sums: Sums, /) -> None:
        """x += sums, in place."""

    def gated_quantize(self, sums: Sums, block: int, activation: Activation, /) -> Rows: ...
    def split_heads(
        self, sums: Sums, widths: tuple[int, int], head_width: int, rotation: Rotation, norms: HeadNorms | None, /
    ) -> Heads:
        """Float sums may be overwritten."""

    def widen(self, packed: torch.Tensor, multiplier_OG: torch.Tensor, /) -> torch.Tensor: ...


class Attention(Protocol):
    """Attention over a pack. paths: its segments, as tables for the tiles of this kernel."""

    def paths(
        self, segments: Sequence[Segment], device: torch.device, picked: Sequence[int] | None, head_width: int, /
    ) -> Paths: ...
    def attention(
        self, query_THE: torch.Tensor, key_TJE: torch.Tensor, value_TJE: torch.Tensor, paths: Paths, rule: ScoreRule, /
    ) -> torch.Tensor: ...


class CardAttention(Attention, Protocol):
    """Attention that can also round its rows to int8."""

    def attention_quantize(
        self, query_THE: torch.Tensor, key_TJE: torch.Tensor, value_TJE: torch.Tensor, paths: Paths, rule: ScoreRule, /
    ) -> Rows: ...


class Products(Protocol):
    """Products of int8 rows, and of float rows with int4 weights."""

    def multiply(self, rows: Rows, weight: Rowwise | Int4, bias_O: torch.Tensor | None, /) -> Sums: ...
    def multiply_onto(
        self, x_TO: torch.Tensor, rows: Rows, weight: Rowwise | Int4, bias_O: torch.Tensor | None, /
    ) -> Sums | None:
        """x += product, in place; or return the product, which then must be added by the caller."""

    def widened_product(self, x_TI: torch.Tensor, weight: Int4, bias_O: torch.Tensor | None, /) -> torch.Tensor: ...


class CompiledProducts(Protocol):
    """Products of int8 rows that numba compiles, for the CPUs and shapes that `takes` names: int32 sums."""

    def takes(self, values_TI: torch.Tensor, weight: Rowwise | Int4, /) -> bool: ...
    def product(self, values_TI: torch.Tensor, weight: Rowwise | Int4, /) -> torch.Tensor: ...


class CardProducts(Products, Protocol):
    """Products that also take 4-bit weights in other programs' formats, in this kernel's layout."""

    def grouped_product(self, x_TI: torch.Tensor, weight: Tiled, bias_O: torch.Tensor | None, /) -> torch.Tensor: ...


class BlockwiseProducts(Protocol):
    """Products of bitsandbytes' formats."""

    def quantize_blockwise(self, weight_OI: torch.Tensor, /) -> Blockwise: ...

    def blockwise_product(
        self, x_TI: torch.Tensor, weight: Blockwise, bias_O: torch.Tensor | None, /
    ) -> torch.Tensor: ...
    def mixed_product(self, x_TI: torch.Tensor, weight: Rowwise, bias_O: torch.Tensor | None, /) -> torch.Tensor: ...


class Rounding(Protocol):
    """Rounding of columns, one after the other."""

    def round_columns(
        self, weight_OI: torch.Tensor, run: range, end: int, step_O: torch.Tensor, factor_II: torch.Tensor,
        bounds: tuple[int, int], /,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip
