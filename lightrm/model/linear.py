"""One linear layer: a weight in any format, with a bias. The products themselves are in `kernels.products`.

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
    """A linear layer.

    int8: whether it reads int8 rows; otherwise it reads floats in the compute dtype.
    bias_O: float32 for int8 rows, otherwise in the compute dtype, or None.
    block: size of the Hadamard transform that its rows have gone through, 1 for none.
    shift_I: float32 (I,) or None. It is subtracted from each normed row before the row is rounded to int8, and weight @
    shift is added to the bias in full precision. So what all rows have in common uses up no int8 levels, and the error
    of the weight does not act on it.
    """

    weight: Held
    bias_O: torch.Tensor | None = None
    int8: bool = False
    block: int = 1
    shift_I: torch.Tensor | None = None

    def __call__(self, rows: Rows) -> Sums:
        return products.product(rows, self.weight, self.bias_O)

    def rows(self, x_TI: torch.Tensor) -> Rows:
        """Convert a float input to rows of the kind that this layer reads."""
        return passes.quantize(x_TI) if self.int8 else Rows(x_TI)

    def add_to(self, residual: Residual, rows: Rows) -> None:
        """residual += product."""
        products.add_product(residual, rows, self.weight, self.bias_O)

    def outputs(self, start: int, end: int) -> Linear | None:
        """Return output channels start .. end as a layer that shares this one's memory; None if the weight's format
        cannot be divided so."""
        weight = outputs(self.weight, start, end)
        bias_O = None if self.bias_O is None else self.bias_O[start:end]
        return None if weight is None else replace(self, weight=weight, bias_O=bias_O)

    @property
    def bytes(self) -> int:
        return self.weight.nbytes + sum(v.nbytes for v in (self.bias_O, self.shift_I) if v is not None)


def linear_for(
    scheme: Scheme, weight: Held, bias_O: torch.Tensor | None, block: int = 1, shift_I: torch.Tensor | None = None
) -> Linear:
    """Make the layer that runs a weight, its bias and its shift under a scheme."""
    if scheme.integer:
        return Linear(weight, bias_O, True, block, shift_I)
    assert shift_I is None, "only int8 rows are shifted"
    return Linear(weight, None if bias_O is None else bias_O.to(scheme.dtype), False, block)
