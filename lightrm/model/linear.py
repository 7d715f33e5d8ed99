"""One linear layer. The model text calls it; only this file and the rooms below know how the weight is held.

A layer first turns what it is given into the rows that it multiplies (`normed`, `attended`, `gated`), then multiplies
them. The product keeps the form that its arithmetic left it in until it is split into heads or gated; or the layer
adds it to the residual stream itself (`onto`), which then may wait for its next reader to be added (`Waiting`).

    FloatLinear     rows and products are float tensors
    IntegerLinear   rows are int8 with a scale each, products are `products.Sums`

T tokens, D width, F feed-forward width, O x I a weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from lightrm.kernels import passes, products
from lightrm.kernels.products import Sums
from lightrm.model.weights import Held, Int4Weight, Int8Weight
from lightrm.schemes.grammar import Scheme

Rotation = tuple[torch.Tensor, torch.Tensor] | None
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # query, key, value, each (T, heads, E)


@dataclass(slots=True)
class Waiting:
    """A residual stream with a product that is not added yet: its next reader takes it, and adds it as it reads."""

    x_TD: torch.Tensor
    sums: Sums | None

    def taken(self) -> Sums | None:
        sums, self.sums = self.sums, None
        return sums


Stream = torch.Tensor | Waiting


def settled(stream: Stream) -> torch.Tensor:
    """The stream as a tensor, all added."""
    if isinstance(stream, torch.Tensor):
        return stream
    sums = stream.taken()
    if sums is not None:
        passes.add_sums(stream.x_TD, sums)
    return stream.x_TD


class Product(Protocol):
    """What a linear layer returns."""

    def heads(self, widths: tuple[int, int], head_width: int, rotation: Rotation) -> Heads:
        """Query, key, value, turned by RoPE where there is one. The product is used up."""

    def float(self) -> torch.Tensor:
        """What it stands for, float32 (T, O): for calibration, not for the hot path."""


class Linear(Protocol):
    """rows: this layer's own form of its input, to be passed back to it."""

    def normed(self, stream: Stream, norm_D: torch.Tensor | None, eps: float) -> Any:
        """RMSNorm of the residual stream, as rows; norm_D is None where it was folded into the weight."""

    def rows(self, x_TI: torch.Tensor) -> Any:
        """A float input as rows."""

    def attended(self, heads: Heads, paths: Any, slopes_H: torch.Tensor | None, absolute_bias: bool) -> Any:
        """Attention's output, as rows."""

    def gated(self, gate_up: Any) -> Any:
        """silu(gate) * up of another layer's product, as rows."""

    def picked(self, rows: Any, rows_S: torch.Tensor) -> Any:
        """Some of the rows."""

    def outputs(self, start: int, end: int) -> Linear | None:
        """Output channels start..end as a layer of their own that holds no copy; None where they cannot be told apart
        in the format of the weight."""

    def __call__(self, rows: Any) -> Product: ...

    def onto(self, stream: Stream, rows: Any) -> Stream:
        """stream + product; the stream itself is used up."""

    @property
    def bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class FloatProduct:
    y_TO: torch.Tensor

    def heads(self, widths: tuple[int, int], head_width: int, rotation: Rotation) -> Heads:
        return passes.split(self.y_TO, widths, head_width, rotation)

    def float(self) -> torch.Tensor:
        return self.y_TO.float()


@dataclass(frozen=True, slots=True)
class FloatLinear:
    """bias_O in the compute dtype or None; block: of the Hadamard transform that the weight expects, 1 for none."""

    weight: Held
    bias_O: torch.Tensor | None = None
    block: int = 1

    def normed(self, stream: Stream, norm_D: torch.Tensor | None, eps: float) -> torch.Tensor:
        return passes.rms_norm(settled(stream), norm_D, eps)

    def rows(self, x_TI: torch.Tensor) -> torch.Tensor:
        return x_TI

    def attended(self, heads: Heads, paths: Any, slopes_H: torch.Tensor | None, absolute_bias: bool) -> torch.Tensor:
        return passes.attention(*heads, paths, slopes_H, absolute_bias).flatten(1)

    def gated(self, gate_up: FloatProduct) -> torch.Tensor:
        return passes.silu_mul(gate_up.y_TO, self.block)

    def picked(self, rows: torch.Tensor, rows_S: torch.Tensor) -> torch.Tensor:
        return rows[rows_S]

    def outputs(self, start: int, end: int) -> FloatLinear | None:
        weight = self.weight.outputs(start, end)
        return None if weight is None else FloatLinear(weight, some(self.bias_O, start, end), self.block)

    def __call__(self, rows: torch.Tensor) -> FloatProduct:
        return FloatProduct(self.weight.product(rows, self.bias_O))

    def onto(self, stream: Stream, rows: torch.Tensor) -> torch.Tensor:
        return settled(stream) + self(rows).y_TO

    @property
    def bytes(self) -> int:
        return self.weight.bytes + (0 if self.bias_O is None else self.bias_O.nbytes)


@dataclass(frozen=True, slots=True)
class IntegerRows:
    """values int8 (T, I), scale float32 (T,)."""

    values_TI: torch.Tensor
    scale_T: torch.Tensor


@dataclass(frozen=True, slots=True)
class IntegerProduct:
    sums: Sums

    def heads(self, widths: tuple[int, int], head_width: int, rotation: Rotation) -> Heads:
        return passes.split_heads(self.sums, widths, head_width, rotation)

    def float(self) -> torch.Tensor:
        return self.sums.float()


@dataclass(frozen=True, slots=True)
class IntegerLinear:
    """bias_O float32 (O,) or None; block as in FloatLinear.

    shift_I: float32 (I,), taken off each normed row before it is rounded, or None. What it is worth, weight @ shift in
    full precision, is in the bias: what all rows have in common costs neither levels nor the weight's own rounding.
    """

    weight: Int8Weight | Int4Weight
    bias_O: torch.Tensor | None = None
    block: int = 1
    shift_I: torch.Tensor | None = None

    def normed(self, stream: Stream, norm_D: torch.Tensor | None, eps: float) -> IntegerRows:
        assert norm_D is None, "integer layers have their norm folded into the weight"
        if isinstance(stream, Waiting) and (sums := stream.taken()) is not None:
            return IntegerRows(*passes.add_norm_quantize(stream.x_TD, sums, eps, self.shift_I))
        return IntegerRows(*passes.norm_quantize(settled(stream), eps, self.shift_I))

    def rows(self, x_TI: torch.Tensor) -> IntegerRows:
        return IntegerRows(*passes.quantize(x_TI))

    def attended(self, heads: Heads, paths: Any, slopes_H: torch.Tensor | None, absolute_bias: bool) -> IntegerRows:
        return IntegerRows(*passes.attention_quantize(*heads, paths, slopes_H, absolute_bias))

    def gated(self, gate_up: IntegerProduct) -> IntegerRows:
        return IntegerRows(*passes.silu_mul_quantize(gate_up.sums, self.block))

    def picked(self, rows: IntegerRows, rows_S: torch.Tensor) -> IntegerRows:
        return IntegerRows(rows.values_TI[rows_S], rows.scale_T[rows_S])

    def outputs(self, start: int, end: int) -> IntegerLinear:
        return replace(self, weight=self.weight.outputs(start, end), bias_O=some(self.bias_O, start, end))

    def __call__(self, rows: IntegerRows) -> IntegerProduct:
        return IntegerProduct(products.product(rows.values_TI, rows.scale_T, self.weight.integers, self.bias_O))

    def onto(self, stream: Stream, rows: IntegerRows) -> Stream:
        x_TD = settled(stream)
        waiting = products.product_onto(x_TD, rows.values_TI, rows.scale_T, self.weight.integers, self.bias_O)
        return x_TD if waiting is None else Waiting(x_TD, waiting)

    @property
    def bytes(self) -> int:
        return self.weight.bytes + sum(v.nbytes for v in (self.bias_O, self.shift_I) if v is not None)


def some(bias_O: torch.Tensor | None, start: int, end: int) -> torch.Tensor | None:
    return None if bias_O is None else bias_O[start:end]


def linear_for(
    scheme: Scheme, weight: Held, bias_O: torch.Tensor | None, block: int = 1, shift_I: torch.Tensor | None = None
) -> Linear:
    """A held weight with its bias and its shift, if any, as the layer that the scheme runs."""
    if scheme.integer:
        assert isinstance(weight, Int8Weight | Int4Weight)
        return IntegerLinear(weight, bias_O, block, shift_I)
    assert shift_I is None, "only int8 rows are shifted"
    return FloatLinear(weight, None if bias_O is None else bias_O.to(scheme.dtype), block)
