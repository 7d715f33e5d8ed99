"""Products on a card: tensors in, tensors out, with the choice of grids and tiles. The Triton kernels are in
`triton_*`.

Runs on CUDA cards, and on a CPU in Triton's interpreter (TRITON_INTERPRET=1 before the first import), where tests
compare it with `integer` and `reference`. T tokens, O x I a weight.
"""

from __future__ import annotations

import torch

from lightrm.kernels.cuda import cuda_passes, launch
from lightrm.kernels.cuda.launch import check_in_place, on, pieces, precision, vector, whole_rows
from lightrm.kernels.cuda.tiles import BAND, capability, tile_for
from lightrm.kernels.cuda.triton_grouped import grouped_product as grouped_kernel
from lightrm.kernels.cuda.triton_products import integer_product
from lightrm.kernels.library_products import widened_product as widened_by_library
from lightrm.kernels.operands import Rows, Sums
from lightrm.schemes.int4 import Int4, block_of
from lightrm.schemes.int8 import Rowwise
from lightrm.schemes.tiled import Tiled, tiled_int4

SMALLEST_HALF = 32  # inputs of an int8 product at least


def multiply(rows: Rows, weight: Rowwise | Int4, bias_O: torch.Tensor | None) -> Sums:
    assert rows.scale_T is not None
    return Sums(product(rows.values_TI, rows.scale_T, weight, bias_O, launch.PRODUCT_DTYPE))


def multiply_onto(x_TO: torch.Tensor, rows: Rows, weight: Rowwise | Int4, bias_O: torch.Tensor | None) -> None:
    assert rows.scale_T is not None
    product(rows.values_TI, rows.scale_T, weight, bias_O, x_TO.dtype, residual_TO=x_TO)


def widened_product(x_TI: torch.Tensor, weight: Int4, bias_O: torch.Tensor | None) -> torch.Tensor:
    laid_out = tiled_int4(weight, x_TI.dtype)
    return widened_by_library(x_TI, weight, bias_O) if laid_out is None else grouped_product(x_TI, laid_out, bias_O)


def product(
    values_TI: torch.Tensor,
    row_scale_T: torch.Tensor,
    weight: Rowwise | Int4,
    bias_O: torch.Tensor | None,
    dtype: torch.dtype,
    residual_TO: torch.Tensor | None = None,
) -> torch.Tensor:
    """values * row_scale times weight, plus bias: (T, O) in `dtype`, or added to the residual in place."""
    if isinstance(weight, Int4) and block_of(values_TI.shape[1]) < 2 * SMALLEST_HALF:  # a tiny model's odd width
        weight = Rowwise(cuda_passes.widen(weight.packed, weight.multiplier_OG), weight.scale_O)
    if residual_TO is not None:
        check_in_place(residual_TO)
    values_TI, row_scale_T, scale_O = whole_rows(values_TI), vector(row_scale_T), vector(weight.scale_O)
    (tokens, inputs), outputs = values_TI.shape, len(weight.scale_O)
    tile = tile_for("int4" if isinstance(weight, Int4) else "int8", capability(values_TI.device), tokens)
    if isinstance(weight, Int4):
        held, multiplier = whole_rows(weight.packed), whole_rows(weight.multiplier_OG)
        group, half = weight.group, block_of(inputs) // 2
    else:
        held, multiplier, group, half = whole_rows(weight.values_OI), scale_O, 1, tile.half
    out_TO = values_TI.new_empty(tokens, outputs, dtype=dtype) if residual_TO is None else residual_TO
    if tokens == 0:
        return out_TO
    with on(values_TI.device):
        integer_product[pieces(tokens, tile.rows) * pieces(outputs, tile.outputs),](
            values_TI,
            held,
            multiplier,
            row_scale_T,
            scale_O,
            scale_O if bias_O is None else vector(bias_O),
            out_TO,
            tokens,
            outputs,
            inputs,
            values_TI.stride(0),
            held.stride(0),
            multiplier.stride(0),
            out_TO.stride(0),
            INT4=isinstance(weight, Int4),
            GROUP=group,
            BIASED=bias_O is not None,
            RESIDUAL=residual_TO is not None,
            WHOLE=inputs % (2 * half) == 0,
            ROWS=tile.rows,
            OUTPUTS=tile.outputs,
            HALF=half,
            BAND=BAND,
            enable_fp_fusion=False,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out_TO


def grouped_product(x_TI: torch.Tensor, weight: Tiled, bias_O: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias for 4-bit weights from GPTQ files or of `schemes.int4`, (T, I) -> (T, O) in x's dtype."""
    x_TI = whole_rows(x_TI if weight.order_I is None else x_TI[:, weight.order_I])
    (tokens, inputs), outputs = x_TI.shape, len(weight.packed)
    tile = tile_for("grouped", capability(x_TI.device), tokens)
    out_TO = x_TI.new_empty(tokens, outputs)
    if tokens == 0:
        return out_TO
    with on(x_TI.device):
        grouped_kernel[pieces(tokens, tile.rows) * pieces(outputs, tile.outputs),](
            x_TI,
            weight.packed,
            weight.zero_OG,
            weight.level_OG,
            weight.level_OG if weight.scale_O is None else weight.scale_O,
            weight.level_OG if bias_O is None else vector(bias_O),
            out_TO,
            tokens,
            outputs,
            inputs,
            x_TI.stride(0),
            weight.packed.stride(0),
            weight.zero_OG.stride(0),
            out_TO.stride(0),
            GROUP=inputs // weight.zero_OG.shape[1],
            SCALED=weight.scale_O is not None,
            BIASED=bias_O is not None,
            PRECISION=precision(x_TI.dtype),
            ROWS=tile.rows,
            OUTPUTS=tile.outputs,
            HALF=block_of(inputs) // 2,
            BAND=BAND,
            enable_fp_fusion=False,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out_TO
