"""The entry to matrix products, of floats and of integers; `passes` is the entry to what happens between them.

Shapes and dtypes are checked here, then `dispatch` chooses an implementation. `operands` defines inputs and results.
Shapes: T tokens, O x I a weight.
"""

from __future__ import annotations

import torch

from lightrm.kernels import dispatch, float_gemm, gemm, library, library_products
from lightrm.kernels.operands import WIDENED_ROWS, Held, Parts, Residual, Rows, Sums
from lightrm.kernels.protocols import Products
from lightrm.schemes.blockwise import Blockwise
from lightrm.schemes.grouped import Grouped
from lightrm.schemes.int4 import Int4
from lightrm.schemes.int8 import Rowwise
from lightrm.schemes.tiled import Tiled, tiled

MOST_INPUTS = (2**31 - 1) // 2**14  # |int8 * int8| is at most 2^14
PRODUCT_AT_ONCE = 2**22  # numbers of a product that is added: allocators keep memory of 16 MB, and get larger anew


def product(rows: Rows, weight: Held, bias_O: torch.Tensor | None) -> Sums:
    """rows times weight plus bias. bias_O: (O,) or None; float32 for int8 rows, otherwise in the dtype of the rows."""
    if rows.scale_T is None:
        return Sums(float_product(rows.values_TI, weight, bias_O))
    integers = check_product(rows, weight, bias_O)
    return kernels(rows.values_TI.device).multiply(rows, integers, bias_O)


def add_product(residual: Residual, rows: Rows, weight: Held, bias_O: torch.Tensor | None) -> None:
    """Add a product to the residual stream, or leave it pending there if the kernel cannot add while it multiplies."""
    x_TO = add_pending(residual)
    if rows.scale_T is None:
        residual.x_TD = x_TO + float_product(rows.values_TI, weight, bias_O)
        return
    integers = check_product(rows, weight, bias_O)
    check(x_TO.shape == (len(rows.values_TI), len(integers.scale_O)), "add_product", x=x_TO, scale=integers.scale_O)
    residual.pending = kernels(x_TO.device).multiply_onto(x_TO, rows, integers, bias_O)


def kernels(device: torch.device) -> Products:
    """Return the products that a device runs: Triton's or a library's."""
    return dispatch.triton_products(device) or library_products


def add_pending(residual: Residual) -> torch.Tensor:
    """Add what is pending, and return the stream as a tensor."""
    pending = residual.take_pending()
    if pending is not None:
        check_sums("add_pending", pending, residual.x_TD.shape)
        dispatch.passes(residual.x_TD.device).add_sums(residual.x_TD, pending)
    return residual.x_TD


def float_product(x_TI: torch.Tensor, weight: Held, bias_O: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias in x's dtype, (T, I) -> (T, O)."""
    if isinstance(weight, torch.Tensor):
        return linear(x_TI, weight, bias_O)
    if isinstance(weight, Rowwise):
        return mixed_product(x_TI, weight, bias_O)
    if isinstance(weight, Int4):
        return kernels(x_TI.device).widened_product(x_TI, weight, bias_O)
    y_TO = x_TI.new_empty(len(x_TI), sum(part.shape[0] for part in weight.parts))
    at = 0
    for part in weight.parts:
        outputs = part.shape[0]
        for start in range(0, outputs, WIDENED_ROWS if isinstance(part, Grouped) else outputs):
            end = min(start + WIDENED_ROWS, outputs) if isinstance(part, Grouped) else outputs
            some = slice(at + start, at + end)
            y_TO[:, some] = part_product(x_TI, part, start, end, None if bias_O is None else bias_O[some])
        at += outputs
    return y_TO


def part_product(
    x_TI: torch.Tensor, part: Grouped | Tiled | Blockwise, start: int, end: int, bias_O: torch.Tensor | None
) -> torch.Tensor:
    """Multiply by output channels start .. end of one matrix; all of them if the matrix has a kernel of its own."""
    if isinstance(part, Blockwise):
        return blockwise_product(x_TI, part, bias_O)
    if isinstance(part, Tiled):
        return grouped_product(x_TI, part, bias_O)
    return linear(x_TI, part.rows(start, end).to(x_TI.dtype), bias_O)


def linear(x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias, (T, I) -> (T, O)."""
    check(x_TI.ndim == 2 and x_TI.shape[1] == weight_OI.shape[1], "linear", x=x_TI, weight=weight_OI)
    return library.linear(x_TI, weight_OI, bias_O)


def int8_product(values_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """Multiply int8 (T, I) by int8 (O, I): int32 (T, O), exact, by a library."""
    fits = values_TI.ndim == 2 and values_TI.shape[1] == weight_OI.shape[1] and values_TI.dtype == torch.int8
    check(fits and weight_OI.dtype == torch.int8, "int8_product", values=values_TI, weight=weight_OI)
    return gemm.product(values_TI, weight_OI)


def large_product(a_NK: torch.Tensor, b_MK: torch.Tensor) -> torch.Tensor:
    """a @ b.T of two large float32 matrices, (N, K) and (M, K) -> (N, M), by the library that is quick at it."""
    fits = a_NK.ndim == b_MK.ndim == 2 and a_NK.shape[1] == b_MK.shape[1]
    check(fits and a_NK.dtype == b_MK.dtype == torch.float32, "large_product", a=a_NK, b=b_MK)
    return float_gemm.product(a_NK, b_MK)


def add_large_product(sum_NM: torch.Tensor, a_NK: torch.Tensor, b_MK: torch.Tensor) -> None:
    """Add a @ b.T to sum, in place: some rows at a time, so that the product is small."""
    rows = max(1, PRODUCT_AT_ONCE // max(1, len(b_MK)))
    for part, a_PK in zip(sum_NM.split(rows), a_NK.split(rows), strict=True):
        part.add_(large_product(a_PK, b_MK))


def placed(weight: Grouped | Blockwise | Rowwise, device: torch.device) -> Grouped | Tiled | Blockwise | Rowwise:
    """Return a file's own quantized values on a device; GPTQ's in the layout of the kernel that will read them
    there."""
    there = weight.to(device)
    if isinstance(there, Grouped) and dispatch.triton_products(there.packed.device) is not None:
        return tiled(there) or there
    return there


def grouped_product(x_TI: torch.Tensor, weight: Tiled, bias_O: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias, (T, I) -> (T, O) in x's dtype, for the layout that only Triton reads."""
    check(x_TI.ndim == 2 and x_TI.shape[1] == weight.shape[1], "grouped_product", x=x_TI, packed=weight.packed)
    triton = dispatch.triton_products(x_TI.device)
    assert triton is not None, "a tiled weight is made where there is Triton"
    return triton.grouped_product(x_TI, weight, bias_O)


def quantize_blockwise(weight_OI: torch.Tensor) -> Blockwise:
    """Quantize (O, I) of any float dtype to nf4 in blocks of 64 with double quantization, by bitsandbytes."""
    check(weight_OI.ndim == 2, "quantize_blockwise", weight=weight_OI)
    return dispatch.bitsandbytes().quantize_blockwise(weight_OI)


def blockwise_product(x_TI: torch.Tensor, weight: Blockwise, bias_O: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias by bitsandbytes, (T, I) -> (T, O) in x's dtype."""
    check(x_TI.ndim == 2 and x_TI.shape[1] == weight.shape[1], "blockwise_product", x=x_TI, packed=weight.packed)
    return dispatch.bitsandbytes().blockwise_product(x_TI, weight, bias_O)


def mixed_product(x_TI: torch.Tensor, weight: Rowwise, bias_O: torch.Tensor | None) -> torch.Tensor:
    """LLM.int8 by bitsandbytes, (T, I) -> (T, O) in x's dtype; see `kernels.reference.mixed_product`."""
    fits = x_TI.ndim == 2 and x_TI.shape[1] == weight.shape[1] and len(weight.values_OI) == len(weight.scale_O)
    check(fits and weight.values_OI.dtype == torch.int8, "mixed_product", x=x_TI, values=weight.values_OI)
    return dispatch.bitsandbytes().mixed_product(x_TI, weight, bias_O)


def check_product(rows: Rows, weight: Held, bias_O: torch.Tensor | None) -> Rowwise | Int4:
    """Return the weight of a product of int8 rows. Raises ValueError if shapes, dtypes or formats do not fit."""
    values_TI, scale_T = rows
    if isinstance(weight, torch.Tensor | Parts) or scale_T is None:
        raise ValueError(f"product: int8 rows need an int8 or int4 weight, found {type(weight).__name__}")
    held = weight.values_OI if isinstance(weight, Rowwise) else weight.packed
    if values_TI.shape[-1] > MOST_INPUTS:
        raise ValueError(f"product: {values_TI.shape[-1]} inputs may overflow int32 sums, which hold {MOST_INPUTS}")
    inputs = held.shape[1] if isinstance(weight, Rowwise) else 2 * held.shape[1]
    fits = values_TI.ndim == 2 and values_TI.shape[1] == inputs and values_TI.dtype == torch.int8
    fits = fits and scale_T.shape == values_TI.shape[:1] and weight.scale_O.shape == held.shape[:1]
    fits = fits and (bias_O is None or bias_O.shape == weight.scale_O.shape)
    check(fits, "product", values=values_TI, row_scale=scale_T, weight=held, scale=weight.scale_O)
    return weight


def check_sums(name: str, sums: Sums, shape: tuple[int, ...]) -> None:
    acc_TO, row_scale_T, scale_O, bias_O = sums
    if row_scale_T is None or scale_O is None:
        check(acc_TO.shape == shape and acc_TO.is_floating_point(), name, product=acc_TO)
        return
    fits = acc_TO.shape == shape == (len(row_scale_T), len(scale_O)) and acc_TO.dtype == torch.int32
    fits = fits and (bias_O is None or bias_O.shape == scale_O.shape)
    check(fits, name, acc=acc_TO, row_scale=row_scale_T, scale=scale_O)


def check(fits: bool, name: str, **tensors: torch.Tensor) -> None:
    if not fits:
        shapes = ", ".join(
            f"{name} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            for name, tensor in tensors.items()
        )
        raise ValueError(f"{name}: shapes or dtypes do not fit together: {shapes}")
