"""The truth: every step written for the reader, in float32 inside, on any device. Slow on purpose.

Shapes: T tokens, D width, F feed-forward width, H query heads, J key/value heads, E head width, O x I a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lightrm.kernels.operands import CURVES, Activation, ScoreRule
from lightrm.kernels.segments import Segment, views
from lightrm.schemes import int8
from lightrm.schemes.blockwise import Blockwise
from lightrm.schemes.int8 import Rowwise

OUTLIER = 6.0  # magnitude from which LLM.int8 keeps a column of activations in 16 bits


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor | None, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467): float32 inside, the input's dtype out.

    A weight in float32 beside x in half precision is Gemma's: x is rounded once, after the weight. Any other weight is
    applied to x rounded to its dtype, as LLaMA does. If the squares of a row overflow, the row becomes NaN, which is
    visible; the formula alone would give zeros.
    """
    x = x_TD.float()
    normed = x * shrink(x.square().mean(-1, keepdim=True), eps)
    if weight_D is None:
        return normed.to(x_TD.dtype)
    once = weight_D.dtype == torch.float32
    return ((normed if once else normed.to(x_TD.dtype)) * weight_D).to(x_TD.dtype)


def shrink(mean: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(mean + eps); NaN instead of 0 if the mean is infinite."""
    return torch.rsqrt(mean + eps) + (mean - mean)


def linear(x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    y_TO = x_TI.float() @ weight_OI.float().T
    if bias_O is not None:
        y_TO = y_TO + bias_O.float()
    return y_TO.to(x_TI.dtype)


def blockwise_product(x_TI: torch.Tensor, weight: Blockwise, bias_O: torch.Tensor | None) -> torch.Tensor:
    """Multiply by the weight dequantized to x's dtype."""
    return linear(x_TI, weight.rows(0, weight.shape[0]).to(x_TI.dtype), bias_O)


def mixed_product(x_TI: torch.Tensor, weight: Rowwise, bias_O: torch.Tensor | None) -> torch.Tensor:
    """LLM.int8 (arXiv 2208.07339): columns of x that hold an outlier stay in x's dtype, the others are int8 per row.

    Which columns these are depends on all rows of x, so a row's result may change with its neighbours.
    """
    half = x_TI.half().float()
    outliers_I = (half.abs() >= OUTLIER).any(0)
    values_TI, scale_T = int8.quantize_rows(half.masked_fill(half.abs() >= OUTLIER, 0))
    values_TI = values_TI.float().masked_fill(outliers_I, 0)
    y_TO = values_TI @ weight.values_OI.float().T * scale_T[:, None] * weight.scale_O
    kept_OI = int8.dequantize_rows(weight.values_OI[:, outliers_I], weight.scale_O).to(x_TI.dtype).float()
    y_TO = y_TO + x_TI[:, outliers_I].float() @ kept_OI.T
    if bias_O is not None:
        y_TO = y_TO + bias_O.float()
    return y_TO.to(x_TI.dtype)


def rotate(x_THE: torch.Tensor, cos_TE: torch.Tensor, sin_TE: torch.Tensor) -> torch.Tensor:
    """RoPE, half-split: of the first 2n channels, e and e + n rotate together; the others stay. cos and sin are float32
    (T, n)."""
    half = cos_TE.shape[-1]
    x = x_THE.float()
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos_TE[:, None, :], sin_TE[:, None, :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(x_THE.dtype)


def gated(gate_up_TF2: torch.Tensor, activation: Activation = "silu") -> torch.Tensor:
    """activation(gate) * up; the input holds gate and up side by side: (T, 2F) -> (T, F). See `operands.CURVES`."""
    gate, up = gate_up_TF2.float().chunk(2, dim=-1)
    factor, cubic = CURVES[activation]
    return (gate * torch.sigmoid(factor * (gate + cubic * gate**3)) * up).to(gate_up_TF2.dtype)


def attention(
    query_THE: torch.Tensor,
    key_TJE: torch.Tensor,
    value_TJE: torch.Tensor,
    segments: Sequence[Segment],
    rule: ScoreRule,
    picked: Sequence[int] | None = None,
) -> torch.Tensor:
    """softmax(cap(scale * q k) + slope * (j - i)) v, (T, H, E), over the keys of the window. A segment sees all of its
    ancestors, and itself causally.

    picked: the queries are those of these tokens only.
    """

    def biased(product_HQK: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        score_HQK = product_HQK * rule.scale
        if rule.softcap is not None:
            score_HQK = rule.softcap * torch.tanh(score_HQK / rule.softcap)
        if rule.slopes_H is not None:
            score_HQK = score_HQK + rule.slopes_H[:, None, None] * (j[None, :] - i[:, None])
        if rule.window is not None:
            score_HQK = score_HQK.masked_fill(i[:, None] - j[None, :] >= rule.window, float("-inf"))
        return score_HQK

    return attended(query_THE, key_TJE, value_TJE, segments, biased, picked)


def attention_by_table(
    query_THE: torch.Tensor,
    key_TJE: torch.Tensor,
    value_TJE: torch.Tensor,
    segments: Sequence[Segment],
    rule: ScoreRule,
    picked: Sequence[int] | None = None,
) -> torch.Tensor:
    """As Baichuan-13B's published code in half precision: a table of slope * j, rounded to the query's dtype, is added
    to scores of that dtype."""
    slopes_H = rule.slopes_H
    assert slopes_H is not None, "the table is of ALiBi's biases"

    def biased(product_HQK: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        table_H1K = (slopes_H[:, None, None] * j).to(query_THE.dtype)
        return ((product_HQK * rule.scale).to(query_THE.dtype) + table_H1K).float()

    return attended(query_THE, key_TJE, value_TJE, segments, biased, picked)


Biased = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def attended(
    query_THE: torch.Tensor,
    key_TJE: torch.Tensor,
    value_TJE: torch.Tensor,
    segments: Sequence[Segment],
    biased: Biased,
    picked: Sequence[int] | None,
) -> torch.Tensor:
    """Attention with a function that makes the scores. biased: products q k, float32 (H, Q, K), positions of the
    queries (Q,) and of the keys (K,) -> scores."""
    repeats = query_THE.shape[1] // key_TJE.shape[1]
    out_THE = torch.empty_like(query_THE)
    for first, end, ranges in views(segments, picked):
        key_HKE, value_HKE = (
            torch.cat([x[a:b] for a, b in ranges]).repeat_interleave(repeats, 1).transpose(0, 1).float()
            for x in (key_TJE, value_TJE)
        )
        query_HQE = query_THE[first:end].transpose(0, 1)
        j = torch.arange(key_HKE.shape[1], device=query_THE.device)
        i = j[len(j) - query_HQE.shape[1] :]
        score_HQK = biased(query_HQE.float() @ key_HKE.transpose(1, 2), i, j)
        score_HQK = score_HQK.masked_fill(j[None, :] > i[:, None], float("-inf"))
        mixed_HQE = score_HQK.softmax(-1) @ value_HKE
        out_THE[first:end] = mixed_HQE.transpose(0, 1).to(query_THE.dtype)
    return out_THE


def round_columns(
    weight_OI: torch.Tensor,
    run: range,
    end: int,
    step_O: torch.Tensor,
    factor_II: torch.Tensor,
    bounds: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round the columns in `run`, one after the other, to multiples q of a step; compensate in the columns up to `end`.

        error = (w[:, i] - q * step) / U[i, i];   w[:, j] -= error * U[i, j]   for i < j < end      (arXiv 2210.17323)

    The weight is changed in place. Returns q int8 and the errors float32, both (O, K) for K columns.
    """
    values, errors = [], []
    for i in run:
        q = (weight_OI[:, i] / step_O).round().clamp(*bounds)
        error = (weight_OI[:, i] - q * step_O) / factor_II[i, i]
        weight_OI[:, i + 1 : end] -= error[:, None] * factor_II[i, i + 1 : end]
        values.append(q.to(torch.int8))
        errors.append(error)
    return torch.stack(values, 1), torch.stack(errors, 1)
