"""Products of int8 rows by libraries that sum exactly, where this CPU has none of our own (`dispatch`). 4-bit weights
are widened some output channels at a time.

Shapes: T tokens, O x I a weight, G groups along I.
"""

from __future__ import annotations

import torch

from lightrm.kernels import dispatch, gemm, library
from lightrm.kernels.arena import empty
from lightrm.kernels.dispatch import passes
from lightrm.kernels.operands import WIDENED_ROWS, Rows, Sums
from lightrm.schemes.int4 import Int4
from lightrm.schemes.int8 import Rowwise


def multiply(rows: Rows, weight: Rowwise | Int4, bias_O: torch.Tensor | None) -> Sums:
    """Return the product as sums whose scales are applied by the next pass."""
    compiled = dispatch.compiled_products(rows.values_TI, weight)
    if compiled is not None:
        acc_TO = compiled.product(rows.values_TI, weight)
    elif isinstance(weight, Rowwise):
        acc_TO = gemm.product(rows.values_TI, weight.values_OI)
    else:
        acc_TO = int4_product(rows.values_TI, weight)
    return Sums(acc_TO, rows.scale_T, weight.scale_O, bias_O)


def multiply_onto(x_TO: torch.Tensor, rows: Rows, weight: Rowwise | Int4, bias_O: torch.Tensor | None) -> Sums:
    """Return the product: no library adds to x while it multiplies, so the next pass over x adds it."""
    return multiply(rows, weight, bias_O)


def int4_product(values_TI: torch.Tensor, weight: Int4) -> torch.Tensor:
    """Multiply int8 (T, I) by int4 (O, I): int32 (T, O), exact."""
    outputs = len(weight.packed)
    acc_TO = empty(len(values_TI), outputs, dtype=torch.int32, device=values_TI.device)
    for start in range(0, outputs, WIDENED_ROWS):
        part = weight.outputs(start, min(start + WIDENED_ROWS, outputs))
        widened = passes(part.packed.device).widen(part.packed, part.multiplier_OG)
        acc_TO[:, start : start + len(widened)] = gemm.product(values_TI, widened)
    return acc_TO


def widened_product(x_TI: torch.Tensor, weight: Int4, bias_O: torch.Tensor | None) -> torch.Tensor:
    """Return x @ weight.T + bias in x's dtype. The widened weight is exact; its channel scale is applied afterwards."""
    outputs = len(weight.packed)
    y_TO = x_TI.new_empty(len(x_TI), outputs)
    for start in range(0, outputs, WIDENED_ROWS):
        end = min(start + WIDENED_ROWS, outputs)
        part = weight.outputs(start, end)
        widened = passes(part.packed.device).widen(part.packed, part.multiplier_OG)
        weight_OI = widened.to(x_TI.dtype) * part.scale_O[:, None].to(x_TI.dtype)
        y_TO[:, start:end] = library.linear(x_TI, weight_OI, None if bias_O is None else bias_O[start:end])
    return y_TO
