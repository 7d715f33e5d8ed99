"""Two pieces of calibration: a layer in float, and rows that are kept for a layer.

Shapes: T tokens, O x I a weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightrm.kernels.operands import Rows, Sums
from lightrm.kernels.products import large_product
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
