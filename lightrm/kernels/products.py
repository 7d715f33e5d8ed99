"""The door to matrix products, in float and in whole numbers; `passes` is the door to what lies between them.

Shapes and dtypes are checked here, then one implementation is chosen by `dispatch`. An int8 row stands for
`values * scale`. A product of such rows is `Sums`: int32 sums that wait for their scales, where a library multiplied,
or floats, where a kernel applied them on the way out.

Shapes: T tokens, O x I a weight, G groups along I.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lightrm.kernels import gemm, integer, library
from lightrm.kernels.arena import empty
from lightrm.kernels.dispatch import bitsandbytes, passes, triton_products_for
from lightrm.schemes.blockwise import Blockwise
from lightrm.schemes.grouped import Grouped
from lightrm.schemes.int4 import Int4
from lightrm.schemes.int8 import Rowwise
from lightrm.schemes.tiled import Tiled, tiled, tiled_int4

WIDENED_ROWS = 1024  # output channels of a 4-bit weight that are widened at one time
MOST_INPUTS = (2**31 - 1) // 2**14  # |int8 * int8| is at most 2^14
ON_CARD = torch.float16  # products between kernels on a card: rounded to 11 bits, then to 8 when they become rows


class Sums(NamedTuple):
    """acc int32 (T, O), which stands for acc * row_scale_T * scale_O + bias_O; or floats, and None for the rest."""

    acc_TO: torch.Tensor
    row_scale_T: torch.Tensor | None = None
    scale_O: torch.Tensor | None = None
    bias_O: torch.Tensor | None = None

    def float(self) -> torch.Tensor:
        """float32 (T, O)."""
        if self.row_scale_T is None or self.scale_O is None or self.bias_O is None:
            return self.acc_TO.float()
        return integer.dequantize(self.acc_TO, self.row_scale_T, self.scale_O, self.bias_O)


def linear(x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias, (T, I) -> (T, O)."""
    check(x_TI.ndim == 2 and x_TI.shape[1] == weight_OI.shape[1], "linear", x=x_TI, weight=weight_OI)
    return library.linear(x_TI, weight_OI, bias_O)


def widen(packed: torch.Tensor, multiplier_OG: torch.Tensor) -> torch.Tensor:
    """int4 in groups -> int8 (O, I), the channel's scale left out."""
    check(len(packed) == len(multiplier_OG), "widen", packed=packed, multiplier=multiplier_OG)
    widened: torch.Tensor = passes(packed).widen(packed, multiplier_OG)
    return widened


def int8_product(values_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """int8 (T, I) x int8 (O, I) -> int32 (T, O), exact, by a library."""
    fits = values_TI.ndim == 2 and values_TI.shape[1] == weight_OI.shape[1] and values_TI.dtype == torch.int8
    check(fits and weight_OI.dtype == torch.int8, "int8_product", values=values_TI, weight=weight_OI)
    return gemm.product(values_TI, weight_OI)


def int4_product(values_TI: torch.Tensor, weight: Int4) -> torch.Tensor:
    """int8 (T, I) x int4 (O, I) -> int32 (T, O), exact; the weight is widened WIDENED_ROWS channels at a time."""
    outputs = len(weight.packed)
    acc_TO = empty(len(values_TI), outputs, dtype=torch.int32, device=values_TI.device)
    for start in range(0, outputs, WIDENED_ROWS):
        rows = slice(start, min(start + WIDENED_ROWS, outputs))
        acc_TO[:, rows] = int8_product(values_TI, widen(weight.packed[rows], weight.multiplier_OG[rows]))
    return acc_TO


def product(
    values_TI: torch.Tensor, row_scale_T: torch.Tensor, weight: Rowwise | Int4, bias_O: torch.Tensor | None
) -> Sums:
    """int8 rows times a weight. bias_O float32 (O,) or None."""
    check_product(values_TI, row_scale_T, weight, bias_O)
    triton = triton_products_for(values_TI)
    if triton is not None:
        return Sums(triton.product(values_TI, row_scale_T, weight, bias_O, ON_CARD))
    if isinstance(weight, Rowwise):
        acc_TO = int8_product(values_TI, weight.values_OI)
    else:
        acc_TO = int4_product(values_TI, weight)
    bias_O = torch.zeros_like(weight.scale_O) if bias_O is None else bias_O
    return Sums(acc_TO, row_scale_T, weight.scale_O, bias_O)


def product_onto(
    x_TO: torch.Tensor,
    values_TI: torch.Tensor,
    row_scale_T: torch.Tensor,
    weight: Rowwise | Int4,
    bias_O: torch.Tensor | None,
) -> Sums | None:
    """x += product, in place, by the kernel that multiplies; or the product, where none can, to be added by the next
    pass over x."""
    triton = triton_products_for(values_TI)
    if triton is None:
        return product(values_TI, row_scale_T, weight, bias_O)
    check_product(values_TI, row_scale_T, weight, bias_O)
    check(x_TO.shape == (len(values_TI), len(weight.scale_O)), "product_onto", x=x_TO, scale=weight.scale_O)
    triton.product(values_TI, row_scale_T, weight, bias_O, x_TO.dtype, residual_TO=x_TO)
    return None


def placed(weight: Grouped | Blockwise | Rowwise, device: torch.device) -> Grouped | Tiled | Blockwise | Rowwise:
    """A file's own values on their device, GPTQ's in the layout of the kernel that will read them there."""
    there = weight.to(device)
    if isinstance(there, Grouped) and triton_products_for(there.packed) is not None:
        return tiled(there) or there
    return there


def grouped_product(x_TI: torch.Tensor, weight: Tiled, bias_O: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias, (T, I) -> (T, O) in x's dtype."""
    check(x_TI.ndim == 2 and x_TI.shape[1] == weight.shape[1], "grouped_product", x=x_TI, packed=weight.packed)
    y_TO: torch.Tensor = triton_products_for(x_TI).grouped_product(x_TI, weight, bias_O)
    return y_TO


def widened_product(x_TI: torch.Tensor, weight: Int4, bias_O: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias in float, (T, I) -> (T, O) in x's dtype; the weight is exact up to its channel's scale."""
    triton = triton_products_for(x_TI)
    laid_out = None if triton is None else tiled_int4(weight, x_TI.dtype)
    if laid_out is not None:
        return grouped_product(x_TI, laid_out, bias_O)
    outputs = len(weight.packed)
    y_TO = x_TI.new_empty(len(x_TI), outputs)
    for start in range(0, outputs, WIDENED_ROWS):
        rows = slice(start, min(start + WIDENED_ROWS, outputs))
        widened = widen(weight.packed[rows], weight.multiplier_OG[rows])
        weight_OI = widened.to(x_TI.dtype) * weight.scale_O[rows, None].to(x_TI.dtype)
        y_TO[:, rows] = linear(x_TI, weight_OI, None if bias_O is None else bias_O[rows])
    return y_TO


def quantize_blockwise(weight_OI: torch.Tensor) -> Blockwise:
    """Any float dtype (O, I) -> nf4 in blocks of 64 with double quantization, by bitsandbytes."""
    check(weight_OI.ndim == 2, "quantize_blockwise", weight=weight_OI)
    made: Blockwise = bitsandbytes().quantize_blockwise(weight_OI)
    return made


def blockwise_product(x_TI: torch.Tensor, weight: Blockwise, bias_O: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias by bitsandbytes, (T, I) -> (T, O) in x's dtype."""
    check(x_TI.ndim == 2 and x_TI.shape[1] == weight.shape[1], "blockwise_product", x=x_TI, packed=weight.packed)
    y_TO: torch.Tensor = bitsandbytes().blockwise_product(x_TI, weight, bias_O)
    return y_TO


def mixed_product(
    x_TI: torch.Tensor, values_OI: torch.Tensor, scale_O: torch.Tensor, bias_O: torch.Tensor | None
) -> torch.Tensor:
    """LLM.int8 by bitsandbytes, (T, I) -> (T, O) in x's dtype; see `kernels.reference.mixed_product`."""
    fits = x_TI.ndim == 2 and x_TI.shape[1] == values_OI.shape[1] and len(values_OI) == len(scale_O)
    check(fits and values_OI.dtype == torch.int8, "mixed_product", x=x_TI, values=values_OI, scale=scale_O)
    y_TO: torch.Tensor = bitsandbytes().mixed_product(x_TI, values_OI, scale_O, bias_O)
    return y_TO


def check_product(
    values_TI: torch.Tensor, row_scale_T: torch.Tensor, weight: Rowwise | Int4, bias_O: torch.Tensor | None
) -> None:
    held = weight.values_OI if isinstance(weight, Rowwise) else weight.packed
    if values_TI.shape[-1] > MOST_INPUTS:
        raise ValueError(f"product: {values_TI.shape[-1]} inputs may overflow int32 sums, which hold {MOST_INPUTS}")
    inputs = held.shape[1] if isinstance(weight, Rowwise) else 2 * held.shape[1]
    fits = values_TI.ndim == 2 and values_TI.shape[1] == inputs and values_TI.dtype == torch.int8
    fits = fits and row_scale_T.shape == values_TI.shape[:1] and weight.scale_O.shape == held.shape[:1]
    fits = fits and (bias_O is None or bias_O.shape == weight.scale_O.shape)
    check(fits, "product", values=values_TI, row_scale=row_scale_T, weight=held, scale=weight.scale_O)


def check(fits: bool, op: str, **tensors: torch.Tensor) -> None:
    if not fits:
        shapes = ", ".join(
            f"{name} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            for name, tensor in tensors.items()
        )
        raise ValueError(f"{op}: shapes or dtypes do not fit together: {shapes}")
