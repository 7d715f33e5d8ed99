"""One linear layer. The model text calls it; only this file and the rooms below know how the weight is held.

A layer first turns what it is given into the rows that it multiplies (`normed`, `rows`, `gated`), then multiplies
them. The product keeps the form that its arithmetic left it in, until it is split into heads, gated, or added:

    FloatLinear     rows and products are float tensors
    IntegerLinear   rows are int8 with a scale each, products int32 that still wait for their scales

T tokens, D width, F feed-forward width, O x I a weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from lightrm import ops
from lightrm.schemes.grammar import Scheme
from lightrm.weights import Held, Int4Weight, Int8Weight

Rotation = tuple[torch.Tensor, torch.Tensor] | None


class Product(Protocol):
    """What a linear layer returns."""

    def heads(self, widths: tuple[int, int], head_width: int, rotation: Rotation) -> tuple[torch.Tensor, ...]:
        """Query, key, value, each (T, heads, E), turned by RoPE where there is one."""

    def added_to(self, x_TD: torch.Tensor) -> torch.Tensor:
        """x + product; x itself is used up."""

    def float(self) -> torch.Tensor:
        """What it stands for, float32 (T, O): for calibration, not for the hot path."""


class Linear(Protocol):
    """rows: this layer's own form of its input, to be passed back to it."""

    def normed(self, x_TD: torch.Tensor, norm_D: torch.Tensor | None, eps: float) -> Any:
        """RMSNorm of the residual stream, as rows; norm_D is None where it was folded into the weight."""

    def rows(self, x_TI: torch.Tensor) -> Any:
        """A float input as rows."""

    def gated(self, gate_up: Any) -> Any:
        """silu(gate) * up of another layer's product, as rows."""

    def __call__(self, rows: Any) -> Product: ...

    @property
    def bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class FloatProduct:
    y_TO: torch.Tensor

    def heads(self, widths: tuple[int, int], head_width: int, rotation: Rotation) -> tuple[torch.Tensor, ...]:
        parts = torch.split(self.y_TO, [widths[0], widths[1], widths[1]], dim=1)
        query, key, value = (part.view(len(part), -1, head_width) for part in parts)
        if rotation is not None:
            query, key = ops.rotate(query, *rotation), ops.rotate(key, *rotation)
        return query, key, value

    def added_to(self, x_TD: torch.Tensor) -> torch.Tensor:
        return x_TD + self.y_TO

    def float(self) -> torch.Tensor:
        return self.y_TO.float()


@dataclass(frozen=True, slots=True)
class FloatLinear:
    """bias_O in the compute dtype or None; block: of the Hadamard transform that the weight expects, 1 for none."""

    weight: Held
    bias_O: torch.Tensor | None = None
    block: int = 1

    def normed(self, x_TD: torch.Tensor, norm_D: torch.Tensor | None, eps: float) -> torch.Tensor:
        return ops.rms_norm(x_TD, norm_D, eps)

    def rows(self, x_TI: torch.Tensor) -> torch.Tensor:
        return x_TI

    def gated(self, gate_up: FloatProduct) -> torch.Tensor:
        return ops.hadamard(ops.silu_mul(gate_up.y_TO), self.block)

    def __call__(self, rows: torch.Tensor) -> FloatProduct:
        return FloatProduct(self.weight.product(rows, self.bias_O))

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
    """acc int32 (T, O); stands for acc * row_scale_T * scale_O + bias_O."""

    acc_TO: torch.Tensor
    row_scale_T: torch.Tensor
    scale_O: torch.Tensor
    bias_O: torch.Tensor

    def heads(self, widths: tuple[int, int], head_width: int, rotation: Rotation) -> tuple[torch.Tensor, ...]:
        parts = ops.split_heads(self.acc_TO, self.row_scale_T, self.scale_O, self.bias_O, widths, rotation)
        return tuple(part.view(len(part), -1, head_width) for part in parts)

    def added_to(self, x_TD: torch.Tensor) -> torch.Tensor:
        ops.add_product(x_TD, self.acc_TO, self.row_scale_T, self.scale_O, self.bias_O)
        return x_TD

    def float(self) -> torch.Tensor:
        return self.acc_TO.float() * (self.row_scale_T[:, None] * self.scale_O) + self.bias_O


@dataclass(frozen=True, slots=True)
class IntegerLinear:
    """bias_O float32 (O,), zeros where there is none; block as in FloatLinear."""

    weight: Int8Weight | Int4Weight
    bias_O: torch.Tensor
    block: int = 1

    def normed(self, x_TD: torch.Tensor, norm_D: torch.Tensor | None, eps: float) -> IntegerRows:
        assert norm_D is None, "integer layers have their norm folded into the weight"
        return IntegerRows(*ops.norm_quantize(x_TD, eps))

    def rows(self, x_TI: torch.Tensor) -> IntegerRows:
        return IntegerRows(*ops.quantize(x_TI))

    def gated(self, gate_up: IntegerProduct) -> IntegerRows:
        """gate_up has no bias: no supported decoder gives its MLP one."""
        return IntegerRows(*ops.silu_mul_quantize(gate_up.acc_TO, gate_up.row_scale_T, gate_up.scale_O, self.block))

    def __call__(self, rows: IntegerRows) -> IntegerProduct:
        return IntegerProduct(
            self.weight.integer_product(rows.values_TI), rows.scale_T, self.weight.scale_O, self.bias_O
        )

    @property
    def bytes(self) -> int:
        return self.weight.bytes + self.bias_O.nbytes


def linear_for(scheme: Scheme, weight: Held, bias_O: torch.Tensor | None, block: int = 1) -> Linear:
    """A held weight and its bias, if any, as the layer that the scheme runs."""
    if scheme.integer:
        assert isinstance(weight, Int8Weight | Int4Weight)
        return IntegerLinear(weight, torch.zeros_like(weight.scale_O) if bias_O is None else bias_O, block)
    return FloatLinear(weight, None if bias_O is None else bias_O.to(scheme.dtype), block)
