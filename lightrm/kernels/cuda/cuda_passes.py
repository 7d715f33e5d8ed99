"""The passes between products on a card, and attention: tensors in, tensors out. Twins of `integer` and `reference`.

A product comes as int32 sums with the scales that they wait for, or as floats with none. As `cuda_products`, all of it
runs in Triton's interpreter too. T tokens, D width, F feed-forward width, H query heads, J key/value heads, E a head's
width, S sequences, K outputs of a head.
"""

from __future__ import annotations

import math

import torch

from lightrm.kernels.cuda import triton_rows
from lightrm.kernels.cuda.launch import (
    VERSION,
    check_in_place,
    on,
    pieces,
    power,
    precision,
    vector,
    warps_for,
    whole_rows,
)  # fmt: skip
from lightrm.kernels.cuda.tiles import capability, keys_for
from lightrm.kernels.cuda.triton_attention import attention_tile
from lightrm.kernels.paths import Paths, heads_side_by_side, paths_of
from lightrm.schemes.int4 import block_of

__all__ = [
    "VERSION", "add_norm_quantize", "attention", "norm", "norm_quantize", "paths_of", "quantize", "rms_norm",
    "silu_mul", "silu_mul_quantize", "split_heads", "value_head", "widen",
]  # fmt: skip
WIDENED_AT_ONCE = (16, 256)  # rows, and bytes of each, that one program widens
Pair = tuple[torch.Tensor, torch.Tensor]


def norm(
    x_TD: torch.Tensor,
    eps: float | None,
    *,
    weight_D: torch.Tensor | None = None,
    added: tuple[torch.Tensor, ...] | None = None,
    rows_S: torch.Tensor | None = None,
    shift_D: torch.Tensor | None = None,
    quantized: bool = False,
) -> Pair:
    """`triton_rows.norm_row` over rows of x; the result, and the scale of each row if it is quantized.

    eps: None leaves the norm out. added: sums, row scale, scale, bias, added to x in place first. shift_D: taken off
    the normed row, of quantized ones.
    """
    if added is not None:
        check_in_place(x_TD)
    x_TD = whole_rows(x_TD)
    count, width = len(x_TD) if rows_S is None else len(rows_S), x_TD.shape[1]
    out = x_TD.new_empty(count, width, dtype=torch.int8 if quantized else None)
    scale_T = x_TD.new_empty(count, dtype=torch.float32)
    sums, *waiting = added if added is not None else (x_TD, scale_T, scale_T, scale_T)
    sums, (row_scale, scale, bias) = whole_rows(sums), map(vector, waiting)
    block = power(width)
    if count:
        with on(x_TD.device):
            triton_rows.norm_row[count,](
                x_TD,
                sums,
                row_scale,
                scale,
                bias,
                scale_T if weight_D is None else vector(weight_D),
                scale_T if rows_S is None else vector(rows_S),
                scale_T if shift_D is None else vector(shift_D),
                out,
                scale_T,
                eps or 0.0,
                width,
                x_TD.stride(0),
                sums.stride(0),
                ADDED=added is not None,
                SCALED=sums.dtype == torch.int32,
                WEIGHTED=weight_D is not None,
                NORMED=eps is not None,
                QUANTIZED=quantized,
                GATHERED=rows_S is not None,
                SHIFTED=shift_D is not None,
                BLOCK=block,
                enable_fp_fusion=False,
                num_warps=warps_for(block),
            )
    return out, scale_T


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor | None, eps: float) -> torch.Tensor:
    return norm(x_TD, eps, weight_D=weight_D)[0]


def norm_quantize(x_TD: torch.Tensor, eps: float, shift_D: torch.Tensor | None = None) -> Pair:
    return norm(x_TD, eps, shift_D=shift_D, quantized=True)


def quantize(x_TI: torch.Tensor) -> Pair:
    return norm(x_TI, None, quantized=True)


def add_norm_quantize(
    x_TD: torch.Tensor,
    acc_TD: torch.Tensor,
    row_scale_T: torch.Tensor,
    scale_D: torch.Tensor,
    bias_D: torch.Tensor,
    eps: float,
    shift_D: torch.Tensor | None = None,
) -> Pair:
    """x += product, in place, then as norm_quantize."""
    return norm(x_TD, eps, added=(acc_TD, row_scale_T, scale_D, bias_D), shift_D=shift_D, quantized=True)


def gate(
    product_TF2: torch.Tensor,
    row_scale_T: torch.Tensor | None,
    scale_F2: torch.Tensor | None,
    block: int,
    quantized: bool,
    bias_F2: torch.Tensor | None = None,
) -> Pair:
    """`triton_rows.gate_row` over the rows of a product; the result, and the scale of each row if it is quantized."""
    product_TF2 = whole_rows(product_TF2)
    tokens, width = len(product_TF2), product_TF2.shape[1] // 2
    out = product_TF2.new_empty(tokens, width, dtype=torch.int8 if quantized else None)
    scale_T = product_TF2.new_empty(tokens, dtype=torch.float32)
    columns = power(width // block)
    if tokens:
        with on(product_TF2.device):
            triton_rows.gate_row[tokens,](
                product_TF2,
                scale_T if row_scale_T is None else vector(row_scale_T),
                scale_T if scale_F2 is None else vector(scale_F2),
                scale_T if bias_F2 is None else vector(bias_F2),
                out,
                scale_T,
                width,
                product_TF2.stride(0),
                1 / math.sqrt(block),
                SCALED=row_scale_T is not None,
                BIASED=bias_F2 is not None,
                QUANTIZED=quantized,
                LEVEL=block.bit_length() - 1,
                BLOCK=columns,
                enable_fp_fusion=False,
                num_warps=warps_for(block * columns),
            )
    return out, scale_T


def silu_mul(gate_up_TF2: torch.Tensor, block: int = 1) -> torch.Tensor:
    """silu(gate) * up, then the block Hadamard transform."""
    return gate(gate_up_TF2, None, None, block, False)[0]


def silu_mul_quantize(
    acc_TF2: torch.Tensor,
    row_scale_T: torch.Tensor | None,
    scale_F2: torch.Tensor | None,
    block: int,
    bias_F2: torch.Tensor | None = None,
) -> Pair:
    return gate(acc_TF2, row_scale_T, scale_F2, block, True, bias_F2)


def split_heads(
    acc_TO: torch.Tensor,
    row_scale_T: torch.Tensor | None,
    scale_O: torch.Tensor | None,
    bias_O: torch.Tensor | None,
    widths: tuple[int, int],
    rotation: Pair | None,
    dtype: torch.dtype,
    head_width: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value, as columns of one tensor. Floats are turned where they lie."""
    scaled = row_scale_T is not None
    acc_TO = whole_rows(acc_TO)
    tokens, outputs = acc_TO.shape
    out_TO = acc_TO.new_empty(tokens, outputs, dtype=dtype) if scaled else acc_TO
    turned = (widths[0] + widths[1]) // head_width if rotation is not None else 0
    heads = outputs // head_width if scaled else turned
    if tokens and heads:
        filler = torch.empty(1, device=acc_TO.device)
        cos_TE, sin_TE = rotation if rotation is not None else (filler, filler)
        block = power(heads) * power(head_width // 2)
        with on(acc_TO.device):
            triton_rows.head_row[tokens,](
                acc_TO,
                filler if row_scale_T is None else vector(row_scale_T),
                filler if scale_O is None else vector(scale_O),
                filler if bias_O is None else vector(bias_O),
                cos_TE.contiguous(),
                sin_TE.contiguous(),
                out_TO,
                heads,
                turned,
                head_width,
                acc_TO.stride(0),
                out_TO.stride(0),
                SCALED=scaled,
                TURNED=rotation is not None,
                HEADS=power(heads),
                HALF=power(head_width // 2),
                enable_fp_fusion=False,
                num_warps=warps_for(2 * block),
            )
    query, key, value = out_TO.split([widths[0], widths[1], widths[1]], dim=1)
    return query, key, value


def widen(packed: torch.Tensor, multiplier_OG: torch.Tensor) -> torch.Tensor:
    """int4 in groups -> int8 (O, I), the channel's scale left out."""
    packed, multiplier_OG = packed.contiguous(), multiplier_OG.contiguous()
    outputs, inputs = len(packed), 2 * packed.shape[1]
    out_OI = packed.new_empty(outputs, inputs, dtype=torch.int8)
    count, block = WIDENED_AT_ONCE[0], min(WIDENED_AT_ONCE[1], power(inputs // 2))
    if outputs:
        with on(packed.device):
            triton_rows.widen_rows[pieces(outputs, count), pieces(inputs // 2, block)](
                packed,
                multiplier_OG,
                out_OI,
                outputs,
                inputs,
                ROWS=count,
                BLOCK=block,
                GROUP=inputs // multiplier_OG.shape[1],
                HALF=block_of(inputs) // 2,
                enable_fp_fusion=False,
                num_warps=4,
            )
    return out_OI


def attention(
    query_THE: torch.Tensor,
    key_TJE: torch.Tensor,
    value_TJE: torch.Tensor,
    paths: Paths,
    slopes_H: torch.Tensor | None,
    quantized: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention over a pack, (T, H, E), and where quantized also int8 rows (T, H * E) with their scale (T,)."""
    query_THE, key_TJE, value_TJE = map(heads_side_by_side, (query_THE, key_TJE, value_TJE))
    tokens, heads, width = query_THE.shape
    out_THE = query_THE.new_empty(tokens, heads, width)
    values = query_THE.new_empty(tokens, heads * width, dtype=torch.int8) if quantized else out_THE
    scale_T = query_THE.new_empty(tokens, dtype=torch.float32)
    arrived = torch.zeros(paths.tiles, dtype=torch.int32, device=query_THE.device) if quantized else scale_T
    if paths.tiles:
        with on(query_THE.device):
            attention_tile[paths.tiles, heads](
                query_THE,
                key_TJE,
                value_TJE,
                out_THE,
                paths.tables,
                scale_T if slopes_H is None else vector(slopes_H),
                values,
                scale_T,
                arrived,
                1 / math.sqrt(width),
                width,
                paths.tables.shape[1],
                query_THE.stride(0),
                key_TJE.stride(0),
                value_TJE.stride(0),
                SHARED_BY=heads // key_TJE.shape[1],
                SLOPED=slopes_H is not None,
                QUANTIZED=quantized,
                DEPTH=paths.depth,
                QUERIES=paths.queries,
                KEYS=keys_for(capability(query_THE.device), width),
                WIDTH=max(16, power(width)),
                PRECISION=precision(query_THE.dtype),
                enable_fp_fusion=False,
                num_warps=max(4, paths.queries // 16),
                num_stages=2,
            )
    return out_THE, values, scale_T


def value_head(
    x_TD: torch.Tensor, rows_S: torch.Tensor, weight_KD: torch.Tensor, bias_K: torch.Tensor | None
) -> torch.Tensor:
    """float32 (S, K): rows_S of x times each row of the head."""
    x_TD, weight_KD = whole_rows(x_TD), weight_KD.contiguous()
    out_SK = x_TD.new_empty(len(rows_S), len(weight_KD), dtype=torch.float32)
    block = power(x_TD.shape[1])
    if len(rows_S):
        with on(x_TD.device):
            triton_rows.value_row[len(rows_S), len(weight_KD)](
                x_TD,
                vector(rows_S),
                weight_KD,
                weight_KD if bias_K is None else vector(bias_K),
                out_SK,
                x_TD.shape[1],
                x_TD.stride(0),
                BIASED=bias_K is not None,
                BLOCK=block,
                enable_fp_fusion=False,
                num_warps=warps_for(block),
            )
    return out_SK
