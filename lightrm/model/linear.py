"""One linear layer: a weight as it is held, with a bias. The products themselves are `kernels.products`.

T tokens, O x I a weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lightrm.kernels import passes, products
from lightrm.kernels.operands import Held, Residual, Rows, Sums, outputs
from lightrm.schemes.grammar import Scheme


@dataclass(frozen=True, slots=True)
class Linear:
    """int8: it reads int8 rows; else float ones, in the compute dtype.

    bias_O: float32 for int8 rows, else in the compute dtype, or None. block: of the Hadamard transform that its rows
    have gone through, 1 for none. shift_I: float32 (I,), taken off each normed row before it is rounded to int8, or
    None; what it is worth, weight @ shift in full precision, is in the bias: what all rows have in common costs neither
    levels nor the weight's own rounding.
    """

    weight: Held
    bias_O: torch.Tensor | None = None
    int8: bool = False
    block: int = 1
    shift_I: torch.Tensor | None = None

    def __call__(self, rows: Rows) -> Sums:
        return products.product(rows, self.weight, self.bias_O)

    def rows(self, x_TI: torch.Tensor) -> Rows:
        """A float input as this layer reads it."""
        return passes.quantize(x_TI) if self.int8 else Rows(x_TI)

    def onto(self, residual: Residual, rows: Rows) -> None:
        """residual += product."""
        products.add_product(residual, rows, self.weight, self.bias_O)

    def outputs(self, start: int, end: int) -> Linear | None:
        """Output channels start..end as a layer of their own that holds no copy; None where the weight's format cannot
        tell them apart."""
        weight = outputs(self.weight, start, end)
        bias_O = None if self.bias_O is None else self.bias_O[start:end]
        return None if weight is None else replace(self, weight=weight, bias_O=bias_O)

    @property
    def bytes(self) -> int:
        return self.weight.nbytes + sum(v.nbytes for v in (self.bias_O, self.shift_I) if v is not None)


def linear_for(
    scheme: Scheme, weight: Held, bias_O: torch.Tensor | None, block: int = 1, shift_I: torch.Tensor | None = None
) -> Linear:
    """A held weight with its bias and its shift, if any, as the layer that the scheme runs."""
    if scheme.integer:
        return Linear(weight, bias_O, True, block, shift_I)
    assert shift_I is None, "only int8 rows are shifted"
    return Linear(weight, None if bias_O is None else bias_O.to(scheme.dtype), False, block)
