"""The passes between products on a card: tensors in, tensors out. Fast versions of `integer` and `reference`.

All of it runs in Triton's interpreter too. T tokens, D width, F feed-forward width, S sequences, K outputs of a head.
"""

from __future__ import annotations

import math

import torch

from lightrm.kernels import integer
from lightrm.kernels.cuda import launch, triton_rows
from lightrm.kernels.cuda.launch import (
    check_in_place,
    on,
    pieces,
    power,
    vector,
    warps_for,
    whole_rows,
)  # fmt: skip
from lightrm.kernels.operands import CURVES, Activation, HeadNorms, Heads, Rotation, Rows, Sums
from lightrm.schemes.int4 import block_of

WIDENED_AT_ONCE = (16, 256)  # rows, and bytes of each, that one program widens
Pair = tuple[torch.Tensor, torch.Tensor]


def norm(
    x_TD: torch.Tensor,
    eps: float | None,
    *,
    weight_D: torch.Tensor | None = None,
    added: Sums | None = None,
    rows_S: torch.Tensor | None = None,
    shift_D: torch.Tensor | None = None,
    transform: int = 1,
    quantized: bool = False,
) -> Pair:
    """Run `triton_rows.norm_row` over rows of x. Returns the result, and the scale of each row if it is quantized.

    eps: None skips the norm. added: a product, added to x in place first. transform: block of the Hadamard transform.
    shift_D: subtracted from the transformed row, if that is quantized.
    """
    if added is not None:
        check_in_place(x_TD)
    x_TD = whole_rows(x_TD)
    count, width = len(x_TD) if rows_S is None else len(rows_S), x_TD.shape[1]
    out = x_TD.new_empty(count, width, dtype=torch.int8 if quantized else None)
    scale_T = x_TD.new_empty(count, dtype=torch.float32)
    sums, *waiting = added or Sums(x_TD)
    sums, (row_scale, scale, bias) = whole_rows(sums), (scale_T if v is None else vector(v) for v in waiting)
    if sums.dtype == torch.int32 and bias is scale_T:  # the kernel adds one to all that are scaled
        bias = torch.zeros_like(scale)
    columns = power(width // transform)
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
                1 / math.sqrt(transform),
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
                LEVEL=transform.bit_length() - 1,
                BLOCK=columns,
                enable_fp_fusion=False,
                num_warps=warps_for(transform * columns),
            )
    return out, scale_T


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor | None, eps: float) -> torch.Tensor:
    return norm(x_TD, eps, weight_D=weight_D)[0]


def norm_each(x_SD: torch.Tensor, weight_D: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Run one program per row: a row's result does not depend on the others."""
    return rms_norm(x_SD, weight_D, eps)


def norm_quantize(
    x_TD: torch.Tensor,
    eps: float,
    weight_D: torch.Tensor | None = None,
    shift_D: torch.Tensor | None = None,
    block: int = 1,
) -> Rows:
    return Rows(*norm(x_TD, eps, weight_D=weight_D, shift_D=shift_D, transform=block, quantized=True))


def quantize(x_TI: torch.Tensor) -> Rows:
    return Rows(*norm(x_TI, None, quantized=True))


def add_sums(x_TD: torch.Tensor, sums: Sums) -> None:
    integer.add_sums(x_TD, sums)


def add_norm_quantize(
    x_TD: torch.Tensor,
    sums: Sums,
    eps: float,
    weight_D: torch.Tensor | None = None,
    shift_D: torch.Tensor | None = None,
    block: int = 1,
) -> Rows:
    """x += product in place, then as norm_quantize."""
    pair = norm(x_TD, eps, weight_D=weight_D, added=sums, shift_D=shift_D, transform=block, quantized=True)
    return Rows(*pair)


def add_normed(x_TD: torch.Tensor, sums: Sums, weight_D: torch.Tensor, eps: float) -> None:
    product_TD = sums.acc_TO if sums.row_scale_T is None else sums.float()
    x_TD += rms_norm(product_TD, weight_D, eps)


def gate(sums: Sums, block: int, activation: Activation, quantized: bool) -> Pair:
    """Run `triton_rows.gate_row` over the rows of a product. Returns the result, and the scale of each row if
    quantized."""
    row_scale_T, scale_F2, bias_F2 = sums.row_scale_T, sums.scale_O, sums.bias_O
    product_TF2 = whole_rows(sums.acc_TO)
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
                *CURVES[activation],
                SCALED=row_scale_T is not None,
                BIASED=bias_F2 is not None,
                QUANTIZED=quantized,
                LEVEL=block.bit_length() - 1,
                BLOCK=columns,
                enable_fp_fusion=False,
                num_warps=warps_for(block * columns),
            )
    return out, scale_T


def gated(gate_up_TF2: torch.Tensor, block: int = 1, activation: Activation = "silu") -> torch.Tensor:
    """activation(gate) * up, then the block Hadamard transform."""
    return gate(Sums(gate_up_TF2), block, activation, False)[0]


def gated_quantize(sums: Sums, block: int, activation: Activation = "silu") -> Rows:
    return Rows(*gate(sums, block, activation, True))


def split_heads(
    sums: Sums, widths: tuple[int, int], head_width: int, rotation: Rotation, norms: HeadNorms | None = None
) -> Heads:
    parts = split(sums, widths, head_width, rotation, launch.PRODUCT_DTYPE, norms)
    query, key, value = (part.unflatten(1, (part.shape[1] // head_width, head_width)) for part in parts)
    return query, key, value


def split(
    sums: Sums,
    widths: tuple[int, int],
    head_width: int,
    rotation: Rotation,
    dtype: torch.dtype,
    norms: HeadNorms | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return query, key and value as columns of one tensor. dtype: of scaled sums. Floats are normed and rotated in
    place."""
    acc_TO, row_scale_T, scale_O, bias_O = sums
    scaled = row_scale_T is not None
    if bias_O is None and scale_O is not None:  # the kernel adds one to all that are scaled
        bias_O = torch.zeros_like(scale_O)
    acc_TO = whole_rows(acc_TO)
    tokens, outputs = acc_TO.shape
    out_TO = acc_TO.new_empty(tokens, outputs, dtype=dtype) if scaled else acc_TO
    changed = rotation is not None or norms is not None
    turned = (widths[0] + widths[1]) // head_width if changed else 0
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
                filler if norms is None else torch.stack([norms.query_E, norms.key_E]),
                out_TO,
                heads,
                widths[0] // head_width,
                turned,
                head_width,
                head_width // 2 if rotation is None else cos_TE.shape[1],
                0.0 if norms is None else norms.eps,
                acc_TO.stride(0),
                out_TO.stride(0),
                SCALED=scaled,
                TURNED=rotation is not None,
                NORMED=norms is not None,
                HEADS=power(heads),
                HALF=power(head_width // 2),
                enable_fp_fusion=False,
                num_warps=warps_for(2 * block),
            )
    query, key, value = out_TO.split([widths[0], widths[1], widths[1]], dim=1)
    return query, key, value


def widen(packed: torch.Tensor, multiplier_OG: torch.Tensor) -> torch.Tensor:
    """Widen int4 in groups to int8 (O, I), without the channel's scale."""
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


def value_head(
    x_TD: torch.Tensor, weight_KD: torch.Tensor, bias_K: torch.Tensor | None, rows_S: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply each row of the head with rows_S of x, or with all rows: float32 (S, K)."""
    rows_S = torch.arange(len(x_TD), device=x_TD.device) if rows_S is None else rows_S
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
