"""What calibration does with rows and streams: a layer in float, rows kept for a layer, products added to a stream.

Shapes: T tokens, O x I a weight, D the width of a stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightrm.kernels import passes
from lightrm.kernels.operands import Residual, Rows, Sums
from lightrm.kernels.products import add_pending, large_product
from lightrm.model.linear import Linear


@dataclass(frozen=True, slots=True)
class Exact(Linear):
    """A layer in float32, whose product is that of `products.large_product`."""

    def __call__(self, rows: Rows) -> Sums:
        return Sums(self.with_bias(large_product(rows.values_TI, self.weight_OI)))

    def with_bias(self, y_O: torch.Tensor) -> torch.Tensor:
        """Return outputs, (O,) or (T, O), with the bias added in place."""
        return y_O if self.bias_O is None else y_O.add_(self.bias_O)

    @property
    def weight_OI(self) -> torch.Tensor:
        assert isinstance(self.weight, torch.Tensor)
        return self.weight


def put(rows: Rows, part: slice, made: Rows) -> None:
    """Place some rows among others."""
    rows.values_TI[part] = made.values_TI
    if rows.scale_T is not None and made.scale_T is not None:
        rows.scale_T[part] = made.scale_T


def add(x_TD: torch.Tensor, product: Sums, norm_D: torch.Tensor | None, eps: float) -> None:
    """Add a layer's product to a stream, in place; normed, if there is a norm."""
    if norm_D is None:
        x_TD += product.acc_TO
    else:
        residual = Residual(x_TD)
        passes.add_normed(residual, product, norm_D, eps)
        keep(x_TD, residual)


def add_rows(x_TD: torch.Tensor, linear: Linear, rows: Rows) -> None:
    """Add the product of a quantized layer and its rows to a stream, in place, as at run time."""
    residual = Residual(x_TD)
    linear.add_to(residual, rows)
    keep(x_TD, residual)


def keep(x_TD: torch.Tensor, residual: Residual) -> None:
    found_TD = add_pending(residual)
    if found_TD.data_ptr() != x_TD.data_ptr():
        x_TD.copy_(found_TD)
