"""The door to the passes between products, to attention and to rounding; `products` is the door to the products.

Shapes and dtypes are checked here, then one implementation is chosen by `dispatch`. The layers above call
`passes.attention(...)` and never learn what ran. The truth of each is in `kernels.reference` and `kernels.integer`.

Shapes: T tokens, D width, F feed-forward width, H query heads, J key/value heads, E head width, S sequences,
K outputs of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lightrm.kernels import library, products, reference
from lightrm.kernels.cuda.tiles import LEAST_PRODUCTS
from lightrm.kernels.dispatch import compiled_for, passes, triton_for
from lightrm.kernels.paths import paths_of
from lightrm.kernels.products import Sums, check
from lightrm.kernels.segments import Segment


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Root-mean-square normalization of each row (arXiv 1910.07467), (T, D) -> (T, D); no weight is a weight of 1."""
    if weight_D is not None:
        check(x_TD.shape[-1:] == weight_D.shape, "rms_norm", x=x_TD, weight=weight_D)
    normed: torch.Tensor = (triton_for(x_TD) or library).rms_norm(x_TD, weight_D, eps)
    return normed


def norm_rows(x_SD: torch.Tensor, weight_D: torch.Tensor | None, eps: float) -> torch.Tensor:
    """rms_norm, (S, D) -> (S, D), each row by itself, whoever the others are."""
    if triton_for(x_SD) is not None:
        return rms_norm(x_SD, weight_D, eps)
    # A library's mean over S rows may round otherwise for every S.
    return torch.cat([library.rms_norm(row[None], weight_D, eps) for row in x_SD]) if len(x_SD) else x_SD


def value_head(x_SD: torch.Tensor, weight_KD: torch.Tensor, bias_K: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias in float32, (S, D) -> (S, K). Each row by itself, as in norm_rows."""
    check(x_SD.ndim == 2 and x_SD.shape[1] == weight_KD.shape[1], "value_head", x=x_SD, weight=weight_KD)
    triton = triton_for(x_SD)
    if triton is not None:
        rows_S = torch.arange(len(x_SD), device=x_SD.device)
        found: torch.Tensor = triton.value_head(x_SD, rows_S, weight_KD, bias_K)
        return found
    rows = [products.linear(row[None], weight_KD, bias_K) for row in x_SD.float()]
    return torch.cat(rows) if rows else x_SD.new_empty(0, len(weight_KD), dtype=torch.float32)


def silu_mul(gate_up_TF2: torch.Tensor, block: int = 1) -> torch.Tensor:
    """silu(gate) * up of a row that holds gate, then up: (T, 2F) -> (T, F). Then the block Hadamard transform of
    `schemes.hadamard`, without signs; block 1 does nothing."""
    check(gate_up_TF2.shape[-1] % (2 * block) == 0, "silu_mul", gate_up=gate_up_TF2)
    triton = triton_for(gate_up_TF2)
    if triton is not None:
        gated: torch.Tensor = triton.silu_mul(gate_up_TF2, block)
        return gated
    gated = library.silu_mul(gate_up_TF2)
    return gated if block == 1 else library.hadamard(gated, block)


def split(
    y_TO: torch.Tensor,
    widths: tuple[int, int],
    head_width: int,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value of a fused product, (T, heads, E), query and key turned by RoPE (half-split convention;
    cos and sin float32 (T, E/2)). The product is used up.

    widths: columns of the query, and of key and value each.
    """
    fits = widths[0] + 2 * widths[1] == y_TO.shape[1] and not any(width % head_width for width in widths)
    check(fits and rotation_fits(rotation, len(y_TO), head_width), "split", product=y_TO)
    triton = triton_for(y_TO)
    if triton is not None:
        parts = triton.split_heads(y_TO, None, None, None, widths, rotation, y_TO.dtype, head_width)
        return by_head(parts, head_width)
    query, key, value = by_head(torch.split(y_TO, [widths[0], widths[1], widths[1]], dim=1), head_width)
    if rotation is not None:
        query, key = library.rotate(query, *rotation), library.rotate(key, *rotation)
    return query, key, value


def rotation_fits(rotation: tuple[torch.Tensor, torch.Tensor] | None, tokens: int, head_width: int) -> bool:
    return rotation is None or all(table.shape == (tokens, head_width // 2) for table in rotation)


def paths(segments: Sequence[Segment], like: torch.Tensor, picked: Sequence[int] | None = None) -> Any:
    """What attention is told of a pack, made once for all layers; picked: the tokens whose queries there will be, None
    for all."""
    triton, compiled = triton_for(like, LEAST_PRODUCTS), compiled_for(like)
    if triton is None and compiled is not None:
        return compiled.paths(segments, picked)
    return paths_of(segments, like.device, picked)


def attention(
    query_THE: torch.Tensor,
    key_TJE: torch.Tensor,
    value_TJE: torch.Tensor,
    paths: Any,
    slopes_H: torch.Tensor | None = None,
    absolute_bias: bool = False,
) -> torch.Tensor:
    """Packed causal attention over a forest of segments, (T, H, E); J divides H. See `kernels.reference`.

    paths: what `passes.paths` made of the segments. Of picked tokens, query and result have a row each.
    """
    check_attention(query_THE, key_TJE, value_TJE, paths)
    triton = None if absolute_bias else triton_for(query_THE, LEAST_PRODUCTS)
    compiled = None if absolute_bias or query_THE.dtype != torch.float32 else compiled_for(query_THE)
    mixed: torch.Tensor
    if triton is not None:
        mixed = triton.attention(query_THE, key_TJE, value_TJE, paths, slopes_H)[0]
    elif compiled is not None:
        mixed = compiled.attention(query_THE, key_TJE, value_TJE, paths, slopes_H)
    else:  # absolute_bias is a parity option, not a fast path
        segments, picked = paths.segments, paths.picked
        mixed = library.attention(query_THE, key_TJE, value_TJE, segments, slopes_H, absolute_bias, picked)
    return mixed


def attention_quantize(
    query_THE: torch.Tensor,
    key_TJE: torch.Tensor,
    value_TJE: torch.Tensor,
    paths: Any,
    slopes_H: torch.Tensor | None = None,
    absolute_bias: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention whose rows leave as int8: (T, H * E), and float32 (T,)."""
    triton = triton_for(query_THE, LEAST_PRODUCTS)
    if triton is None or absolute_bias:
        mixed = attention(query_THE, key_TJE, value_TJE, paths, slopes_H, absolute_bias)
        return quantize(mixed.flatten(1).float())
    check_attention(query_THE, key_TJE, value_TJE, paths)
    _, values, scale_T = triton.attention(query_THE, key_TJE, value_TJE, paths, slopes_H, quantized=True)
    return values, scale_T


def check_attention(query_THE: torch.Tensor, key_TJE: torch.Tensor, value_TJE: torch.Tensor, paths: Any) -> None:
    queries, heads, width = query_THE.shape
    tokens = paths.segments[-1].end if paths.segments else 0
    fits = key_TJE.shape == value_TJE.shape and key_TJE.shape[::2] == (tokens, width) and heads % key_TJE.shape[1] == 0
    fits = fits and queries == paths.rows
    check(fits, "attention", query=query_THE, key=key_TJE, value=value_TJE)


def norm_quantize(
    x_TD: torch.Tensor, eps: float, shift_D: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm without a weight, then int8 per row: float32 (T, D) -> int8 (T, D), float32 (T,).

    shift_D: float32 (D,), taken off each normed row before it is rounded; the reader's bias makes up for it.
    """
    check(x_TD.ndim == 2 and x_TD.dtype == torch.float32, "norm_quantize", x=x_TD)
    check_shift("norm_quantize", x_TD, shift_D)
    values, scale_T = passes(x_TD).norm_quantize(x_TD, eps, shift_D)
    return values, scale_T


def add_norm_quantize(
    x_TD: torch.Tensor, sums: Sums, eps: float, shift_D: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x += sums, in place, then norm_quantize, in one pass."""
    check_sums("add_norm_quantize", sums, x_TD.shape)
    check_shift("add_norm_quantize", x_TD, shift_D)
    values, scale_T = passes(x_TD).add_norm_quantize(x_TD, *sums, eps, shift_D)
    return values, scale_T


def check_shift(op: str, x_TD: torch.Tensor, shift_D: torch.Tensor | None) -> None:
    if shift_D is not None:
        check(shift_D.shape == x_TD.shape[1:] and shift_D.dtype == torch.float32, op, x=x_TD, shift=shift_D)


def quantize(x_TI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 per row: float32 (T, I) -> int8 (T, I), float32 (T,)."""
    check(x_TI.ndim == 2 and x_TI.dtype == torch.float32, "quantize", x=x_TI)
    values, scale_T = passes(x_TI).quantize(x_TI.contiguous())
    return values, scale_T


def add_sums(x_TD: torch.Tensor, sums: Sums) -> None:
    """x += sums, in place; on a CPU to the same bits as in `add_norm_quantize`."""
    check_sums("add_sums", sums, x_TD.shape)
    compiled = compiled_for(x_TD)
    if compiled is None or sums.row_scale_T is None:
        x_TD += sums.float()
    else:
        compiled.add_sums(x_TD, *sums)


def split_heads(
    sums: Sums,
    widths: tuple[int, int],
    head_width: int,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `split`, of sums."""
    if sums.row_scale_T is None:
        return split(sums.acc_TO, widths, head_width, rotation)
    outputs = sums.acc_TO.shape[1]
    check_sums("split_heads", sums, (len(sums.row_scale_T), outputs))
    fits = widths[0] + 2 * widths[1] == outputs and rotation_fits(rotation, len(sums.acc_TO), head_width)
    check(fits, "split_heads", acc=sums.acc_TO)
    triton = triton_for(sums.acc_TO)
    if triton is not None:
        return by_head(triton.split_heads(*sums, widths, rotation, products.ON_CARD, head_width), head_width)
    query, key, value = passes(sums.acc_TO).split_heads(*sums, widths, rotation, head_width)
    return query, key, value


def by_head(parts: Sequence[torch.Tensor], head_width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key, value = (part.unflatten(1, (part.shape[1] // head_width, head_width)) for part in parts)
    return query, key, value


def silu_mul_quantize(sums: Sums, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) * up, a block Hadamard transform, int8 per row: (T, 2F) -> int8 (T, F), float32 (T,).

    block: a power of two that divides F; 1 leaves the row as it is.
    """
    check_sums("silu_mul_quantize", sums, sums.acc_TO.shape)
    check(sums.acc_TO.shape[1] % (2 * block) == 0, "silu_mul_quantize", acc=sums.acc_TO)
    acc_TO, row_scale_T, scale_O, bias_O = sums
    values, scale_T = passes(acc_TO).silu_mul_quantize(acc_TO, row_scale_T, scale_O, block, bias_O)
    return values, scale_T


def check_sums(op: str, sums: Sums, shape: tuple[int, ...]) -> None:
    acc_TO, row_scale_T, scale_O, bias_O = sums
    if row_scale_T is None:
        check(acc_TO.shape == shape and acc_TO.is_floating_point(), op, product=acc_TO)
        return
    assert scale_O is not None
    assert bias_O is not None
    fits = acc_TO.shape == shape == (len(row_scale_T), len(scale_O)) and acc_TO.dtype == torch.int32
    check(fits and bias_O.shape == scale_O.shape, op, acc=acc_TO, row_scale=row_scale_T, scale=scale_O, bias=bias_O)


def round_columns(
    weight_OI: torch.Tensor,
    run: range,
    end: int,
    step_O: torch.Tensor,
    factor_II: torch.Tensor,
    bounds: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of a run rounded to multiples of a step, what each lost made up for by the columns after it up to `end`:
    int8 (O, K), and the errors float32 (O, K). See `kernels.reference`. The weight is used up.

    weight, step, factor: float32 (O, I), (O,) and (I, I), upper triangular; bounds: of the multiples, within int8.
    """
    fits = weight_OI.shape == (len(step_O), len(factor_II)) and 0 <= run.start < run.stop <= end <= len(factor_II)
    fits = fits and weight_OI.dtype == step_O.dtype == factor_II.dtype == torch.float32
    fits = fits and weight_OI.is_contiguous() and factor_II.is_contiguous()
    check(fits, "round_columns", weight=weight_OI, step=step_O, factor=factor_II)
    module = compiled_for(weight_OI) or reference
    values, errors = module.round_columns(weight_OI, run, end, step_O, factor_II, bounds)
    return values, errors
