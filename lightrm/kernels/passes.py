"""The entry to all that happens between products: norms, attention, the gate of an MLP, rounding. `products` is the
entry to products.

Shapes and dtypes are checked here, then `dispatch` chooses an implementation. The layers above call
`passes.attention(...)` and do not know what runs. The truth of each function is in `kernels.reference` and
`kernels.integer`. `int8=True` rounds the result to int8 rows; otherwise it stays float.

Shapes: T tokens, D width, F feed-forward width, H query heads, J key/value heads, E head width, S sequences, K outputs
of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightrm.kernels import dispatch, reference
from lightrm.kernels.operands import Activation, HeadNorms, Heads, Residual, Rotation, Rows, ScoreRule, Sums
from lightrm.kernels.paths import Paths
from lightrm.kernels.products import add_pending, check, check_sums
from lightrm.kernels.segments import Segment
from lightrm.schemes.hadamard import hadamard


def norm(
    residual: Residual,
    weight_D: torch.Tensor | None,
    eps: float,
    *,
    int8: bool = False,
    shift_D: torch.Tensor | None = None,
    block: int = 1,
) -> Rows:
    """RMS normalization of each row (arXiv 1910.07467), (T, D). weight_D None means a weight of 1. Then the block
    Hadamard transform of `schemes.hadamard`; block is a power of two that divides D, and 1 means no transform.

    Adds a pending product to the stream first. shift_D: float32 (D,), subtracted from each row before it is rounded to
    int8; the bias of the layer behind makes up for it. For int8 the weight is float32 too.
    """
    if not int8:
        x_TD = add_pending(residual)
        if weight_D is not None:
            check(x_TD.shape[-1:] == weight_D.shape, "norm", x=x_TD, weight=weight_D)
        normed_TD = dispatch.passes(x_TD.device).rms_norm(x_TD, weight_D, eps)
        return Rows(normed_TD if block == 1 else hadamard(normed_TD, block).to(normed_TD.dtype))
    x_TD = residual.x_TD
    check(x_TD.ndim == 2 and x_TD.dtype == torch.float32, "norm", x=x_TD)
    for vector in (weight_D, shift_D):
        if vector is not None:
            check(vector.shape == x_TD.shape[1:] and vector.dtype == torch.float32, "norm", x=x_TD, vector=vector)
    pending = residual.take_pending()
    if pending is None:
        return dispatch.passes(x_TD.device).norm_quantize(x_TD, eps, weight_D, shift_D, block)
    check_sums("norm", pending, x_TD.shape)
    return dispatch.passes(x_TD.device).add_norm_quantize(x_TD, pending, eps, weight_D, shift_D, block)


def add_normed(residual: Residual, product: Sums, weight_D: torch.Tensor, eps: float) -> None:
    """residual += RMSNorm(product) * weight: a norm between a layer and the stream, as Gemma 2 has it."""
    x_TD = add_pending(residual)
    check_sums("add_normed", product, x_TD.shape)
    check(weight_D.shape == x_TD.shape[1:], "add_normed", x=x_TD, weight=weight_D)
    dispatch.passes(x_TD.device).add_normed(x_TD, product, weight_D, eps)


def norm_each(x_SD: torch.Tensor, weight_D: torch.Tensor | None, eps: float) -> torch.Tensor:
    """The float norm, (S, D) -> (S, D). A row's result does not depend on the other rows."""
    return dispatch.passes(x_SD.device).norm_each(x_SD, weight_D, eps)


def value_head(x_SD: torch.Tensor, weight_KD: torch.Tensor, bias_K: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias in float32, (S, D) -> (S, K). A row's result does not depend on the other rows."""
    check(x_SD.ndim == 2 and x_SD.shape[1] == weight_KD.shape[1], "value_head", x=x_SD, weight=weight_KD)
    return dispatch.passes(x_SD.device).value_head(x_SD, weight_KD, bias_K)


def quantize(x_TI: torch.Tensor) -> Rows:
    """Round each row of float32 (T, I) to int8."""
    check(x_TI.ndim == 2 and x_TI.dtype == torch.float32, "quantize", x=x_TI)
    return dispatch.passes(x_TI.device).quantize(x_TI)


def split_heads(
    sums: Sums, widths: tuple[int, int], head_width: int, rotation: Rotation, norms: HeadNorms | None = None
) -> Heads:
    """Return query, key and value of a fused product, each (T, heads, E), query and key normed if there are norms, and
    under RoPE (half-split convention) in their first channels, twice as many as the rotation has columns.

    widths: columns of the query, and of key and value each. The product may be overwritten.
    """
    tokens, outputs = sums.acc_TO.shape
    check_sums("split_heads", sums, (tokens, outputs))
    fits = widths[0] + 2 * widths[1] == outputs and not any(width % head_width for width in widths)
    fits = fits and (rotation is None or rotates(rotation, tokens, head_width))
    check(fits, "split_heads", product=sums.acc_TO)
    return dispatch.passes(sums.acc_TO.device).split_heads(sums, widths, head_width, rotation, norms)


def rotates(rotation: tuple[torch.Tensor, torch.Tensor], tokens: int, head_width: int) -> bool:
    cos_TE, sin_TE = rotation
    return cos_TE.shape == sin_TE.shape and len(cos_TE) == tokens and 2 * cos_TE.shape[1] <= head_width


def gated(sums: Sums, activation: Activation = "silu", *, block: int = 1, int8: bool = False) -> Rows:
    """activation(gate) * up of a product that holds gate, then up: (T, 2F) -> (T, F); with SiLU this is SwiGLU (arXiv
    2002.05202). Then the block Hadamard transform of `schemes.hadamard`; block is a power of two that divides F, and 1
    means no transform."""
    check_sums("gated", sums, sums.acc_TO.shape)
    check(sums.acc_TO.shape[1] % (2 * block) == 0, "gated", product=sums.acc_TO)
    kernels = dispatch.passes(sums.acc_TO.device)
    if int8:
        return kernels.gated_quantize(sums, block, activation)
    return Rows(kernels.gated(sums.acc_TO if sums.row_scale_T is None else sums.float(), block, activation))


def paths(
    segments: Sequence[Segment], device: torch.device, picked: Sequence[int] | None = None, head_width: int = 0
) -> Paths:
    """Describe a pack to attention, once for all layers. picked: tokens whose queries will be given, None for all.
    head_width: E, by which a card's kernel chooses its tiles."""
    return dispatch.attention(device, torch.float32).paths(segments, device, picked, head_width)


def attention(
    query_THE: torch.Tensor,
    key_TJE: torch.Tensor,
    value_TJE: torch.Tensor,
    paths: Paths,
    rule: ScoreRule,
    *,
    int8: bool = False,
) -> Rows:
    """Packed causal attention over a forest of segments, (T, H * E). J divides H.

    paths: made by `passes.paths`. If it picks tokens, query and result have one row for each of them.
    """
    check_attention(query_THE, key_TJE, value_TJE, paths)
    triton = dispatch.triton_attention(query_THE.device)
    if int8 and triton is not None:
        return triton.attention_quantize(query_THE, key_TJE, value_TJE, paths, rule)
    kernel = dispatch.attention(query_THE.device, query_THE.dtype)
    return as_rows(kernel.attention(query_THE, key_TJE, value_TJE, paths, rule), int8)


def attention_by_table(
    query_THE: torch.Tensor,
    key_TJE: torch.Tensor,
    value_TJE: torch.Tensor,
    paths: Paths,
    rule: ScoreRule,
    *,
    int8: bool = False,
) -> Rows:
    """As `attention`, with ALiBi's biases rounded as in Baichuan's published code. Slow; for comparisons."""
    check_attention(query_THE, key_TJE, value_TJE, paths)
    mixed = reference.attention_by_table(query_THE, key_TJE, value_TJE, paths.segments, rule, paths.picked)
    return as_rows(mixed, int8)


def as_rows(mixed_THE: torch.Tensor, int8: bool) -> Rows:
    return quantize(mixed_THE.flatten(1).float()) if int8 else Rows(mixed_THE.flatten(1))


def check_attention(query_THE: torch.Tensor, key_TJE: torch.Tensor, value_TJE: torch.Tensor, paths: Paths) -> None:
    queries, heads, width = query_THE.shape
    tokens = paths.segments[-1].end if paths.segments else 0
    fits = key_TJE.shape == value_TJE.shape and key_TJE.shape[::2] == (tokens, width) and heads % key_TJE.shape[1] == 0
    fits = fits and queries == paths.rows
    check(fits, "attention", query=query_THE, key=key_TJE, value=value_TJE)


def round_columns(
    weight_OI: torch.Tensor,
    run: range,
    end: int,
    step_O: torch.Tensor,
    factor_II: torch.Tensor,
    bounds: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round the columns in `run` to multiples of a step; the columns after each, up to `end`, compensate its error.

    Returns int8 (O, K) and the errors, float32 (O, K). See `kernels.reference`. The weight is overwritten. weight,
    step, factor: float32 (O, I), (O,) and (I, I), upper triangular. bounds: of the multiples, within int8.
    """
    fits = weight_OI.shape == (len(step_O), len(factor_II)) and 0 <= run.start < run.stop <= end <= len(factor_II)
    fits = fits and weight_OI.dtype == step_O.dtype == factor_II.dtype == torch.float32
    fits = fits and weight_OI.is_contiguous() and factor_II.is_contiguous()
    check(fits, "round_columns", weight=weight_OI, step=step_O, factor=factor_II)
    return dispatch.rounding(weight_OI.device).round_columns(weight_OI, run, end, step_O, factor_II, bounds)
