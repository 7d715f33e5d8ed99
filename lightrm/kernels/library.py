"""The steps of `reference` through PyTorch's own fused routines, on a CPU or a GPU: fast for unquantized weights.

Attention runs segment by segment through `scaled_dot_product_attention`. Where a bias must be given explicitly, queries
come in blocks, so that nothing of size T x T is ever in memory. Shapes as in `reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch.nn import functional

from lightrm.kernels import reference
from lightrm.kernels.operands import Activation, ScoreRule
from lightrm.kernels.paths import Paths, paths_of
from lightrm.kernels.segments import Segment, views
from lightrm.schemes.hadamard import hadamard

FAR = 1.8e19  # the length of a row from which its squares overflow, about: it would be normed to zeros, and becomes NaN
QUERY_BLOCK = 128  # rows of an explicit bias held at once: H x 128 x K floats


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor | None, eps: float) -> torch.Tensor:
    if x_TD.dtype == torch.float32:
        normed = functional.rms_norm(x_TD, x_TD.shape[-1:], weight_D, eps)
        return normed.masked_fill_(torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True) > FAR, float("nan"))
    return reference.rms_norm(x_TD, weight_D, eps)


def linear(x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    return functional.linear(x_TI, weight_OI, bias_O)


def norm_each(x_SD: torch.Tensor, weight_D: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Norm each row by itself, in memory of its own: a library's mean over S rows may round differently for every S,
    and for every alignment."""
    return torch.cat([rms_norm(row.clone()[None], weight_D, eps) for row in x_SD]) if len(x_SD) else x_SD


def value_head(x_SD: torch.Tensor, weight_KD: torch.Tensor, bias_K: torch.Tensor | None) -> torch.Tensor:
    """Multiply each row by itself, for the same reasons."""
    rows = [linear(row.clone()[None], weight_KD, bias_K) for row in x_SD.float()]
    return torch.cat(rows) if rows else x_SD.new_empty(0, len(weight_KD), dtype=torch.float32)


def gated(gate_up_TF2: torch.Tensor, block: int = 1, activation: Activation = "silu") -> torch.Tensor:
    gate, up = gate_up_TF2.chunk(2, dim=-1)
    active = functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")
    product = active * up
    return product if block == 1 else hadamard(product, block).to(product.dtype)


def paths(
    segments: Sequence[Segment], device: torch.device, picked: Sequence[int] | None = None, head_width: int = 0
) -> Paths:
    """The width of a head, by which a card's kernel chooses its tiles, does not matter here."""
    return paths_of(segments, device, picked)


def attention(
    query_THE: torch.Tensor, key_TJE: torch.Tensor, value_TJE: torch.Tensor, paths: Paths, rule: ScoreRule
) -> torch.Tensor:
    heads, kv_heads = query_THE.shape[1], key_TJE.shape[1]
    out_THE = torch.empty_like(query_THE)
    for first, end, ranges in views(paths.segments, paths.picked):
        key_1HKE = gather_heads(key_TJE, ranges, heads // kv_heads)
        value_1HKE = gather_heads(value_TJE, ranges, heads // kv_heads)
        query_1HQE = query_THE[first:end].transpose(0, 1)[None]
        keys, queries = key_1HKE.shape[2], end - first
        plain = rule.slopes_H is None and rule.softcap is None and rule.first_key(keys - 1) == 0
        if plain and queries == keys:
            mixed = functional.scaled_dot_product_attention(
                query_1HQE, key_1HKE, value_1HKE, is_causal=True, scale=rule.scale
            )
            out_THE[first:end] = mixed[0].transpose(0, 1)
            continue
        before = keys - queries
        for start in range(0, queries, QUERY_BLOCK):
            block_1HQE = query_1HQE[:, :, start : start + QUERY_BLOCK]
            seen = slice(rule.first_key(before + start), before + start + block_1HQE.shape[2])  # by any of the block
            mix = functional.scaled_dot_product_attention if rule.softcap is None else partial(capped, cap=rule.softcap)
            mixed = mix(
                block_1HQE,
                key_1HKE[:, :, seen],
                value_1HKE[:, :, seen],
                attn_mask=block_bias(rule, before + start, seen, query_THE),
                scale=rule.scale,
            )
            out_THE[first + start : first + start + block_1HQE.shape[2]] = mixed[0].transpose(0, 1)
    return out_THE


def capped(
    query_1HQE: torch.Tensor,
    key_1HKE: torch.Tensor,
    value_1HKE: torch.Tensor,
    *,
    attn_mask: torch.Tensor,
    scale: float,
    cap: float,
) -> torch.Tensor:
    """As `scaled_dot_product_attention`, which cannot cap scores; in float32."""
    score_1HQK = query_1HQE.float() @ key_1HKE.float().transpose(2, 3) * scale
    score_1HQK = cap * torch.tanh(score_1HQK / cap) + attn_mask
    return (score_1HQK.softmax(-1) @ value_1HKE.float()).to(query_1HQE.dtype)


def gather_heads(x_TJE: torch.Tensor, ranges: list[tuple[int, int]], repeats: int) -> torch.Tensor:
    """Return keys or values of the ranges, one after the other, repeated for each query head: (1, H, K, E)."""
    x_KJE = x_TJE[ranges[0][0] : ranges[0][1]] if len(ranges) == 1 else torch.cat([x_TJE[a:b] for a, b in ranges])
    if repeats > 1:
        x_KJE = x_KJE.repeat_interleave(repeats, dim=1)
    return x_KJE.transpose(0, 1)[None]


def block_bias(rule: ScoreRule, first: int, seen: slice, like: torch.Tensor) -> torch.Tensor:
    """Return what is added to the scores of the queries from position `first` on over the keys in `seen`: ALiBi's bias,
    and -inf for later keys and for those outside the window."""
    j = torch.arange(seen.start, seen.stop, device=like.device)
    i = torch.arange(first, seen.stop, device=like.device)
    back = i[:, None] - j[None, :]
    hidden = (back < 0) if rule.window is None else (back < 0) | (back >= rule.window)
    if rule.slopes_H is None:
        return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill(hidden, float("-inf"))
    bias_HQK = rule.slopes_H[:, None, None] * -back.float()
    return bias_HQK.masked_fill(hidden, float("-inf")).to(like.dtype)[None]
