"""The steps of `reference` through PyTorch's own fused routines, on a CPU or a GPU: fast for unquantized weights.

Attention runs segment by segment through `scaled_dot_product_attention`. Where a bias must be given explicitly, queries
come in blocks, so that nothing of size T x T is ever in memory. Shapes as in `reference`.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from lightrm.kernels import reference
from lightrm.kernels.paths import Paths, paths_of
from lightrm.kernels.segments import views
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
    """Norm each row by itself: a library's mean over S rows may round differently for every S."""
    return torch.cat([rms_norm(row[None], weight_D, eps) for row in x_SD]) if len(x_SD) else x_SD


def value_head(x_SD: torch.Tensor, weight_KD: torch.Tensor, bias_K: torch.Tensor | None) -> torch.Tensor:
    """Multiply each row by itself, for the same reason."""
    rows = [linear(row[None], weight_KD, bias_K) for row in x_SD.float()]
    return torch.cat(rows) if rows else x_SD.new_empty(0, len(weight_KD), dtype=torch.float32)


def silu_mul(gate_up_TF2: torch.Tensor, block: int = 1) -> torch.Tensor:
    gate, up = gate_up_TF2.chunk(2, dim=-1)
    gated = functional.silu(gate) * up
    return gated if block == 1 else hadamard(gated, block).to(gated.dtype)


paths = paths_of


def attention(
    query_THE: torch.Tensor,
    key_TJE: torch.Tensor,
    value_TJE: torch.Tensor,
    paths: Paths,
    slopes_H: torch.Tensor | None,
) -> torch.Tensor:
    heads, kv_heads = query_THE.shape[1], key_TJE.shape[1]
    out_THE = torch.empty_like(query_THE)
    for first, end, ranges in views(paths.segments, paths.picked):
        key_1HKE = gather_heads(key_TJE, ranges, heads // kv_heads)
        value_1HKE = gather_heads(value_TJE, ranges, heads // kv_heads)
        query_1HQE = query_THE[first:end].transpose(0, 1)[None]
        if slopes_H is None and end - first == key_1HKE.shape[2]:
            mixed = functional.scaled_dot_product_attention(query_1HQE, key_1HKE, value_1HKE, is_causal=True)
            out_THE[first:end] = mixed[0].transpose(0, 1)
            continue
        before = key_1HKE.shape[2] - query_1HQE.shape[2]
        for start in range(0, query_1HQE.shape[2], QUERY_BLOCK):
            block_1HQE = query_1HQE[:, :, start : start + QUERY_BLOCK]
            last = before + start + block_1HQE.shape[2]  # no query of the block sees a key from here on
            mixed = functional.scaled_dot_product_attention(
                block_1HQE,
                key_1HKE[:, :, :last],
                value_1HKE[:, :, :last],
                attn_mask=block_bias(slopes_H, before + start, last, query_THE),
            )
            out_THE[first + start : first + start + block_1HQE.shape[2]] = mixed[0].transpose(0, 1)
    return out_THE


def gather_heads(x_TJE: torch.Tensor, ranges: list[tuple[int, int]], repeats: int) -> torch.Tensor:
    """Return keys or values of the ranges, one after the other, repeated for each query head: (1, H, K, E)."""
    x_KJE = x_TJE[ranges[0][0] : ranges[0][1]] if len(ranges) == 1 else torch.cat([x_TJE[a:b] for a, b in ranges])
    if repeats > 1:
        x_KJE = x_KJE.repeat_interleave(repeats, dim=1)
    return x_KJE.transpose(0, 1)[None]


def block_bias(slopes_H: torch.Tensor | None, first: int, last: int, like: torch.Tensor) -> torch.Tensor:
    """Return what is added to the scores of queries first..last over keys 0..last: ALiBi's bias, and -inf for later
    keys."""
    j = torch.arange(last, device=like.device)
    i = j[first:]
    future = j[None, :] > i[:, None]
    if slopes_H is None:
        return torch.zeros(future.shape, dtype=like.dtype, device=like.device).masked_fill(future, float("-inf"))
    distance = (j[None, :] - i[:, None]).float()
    bias_HQK = slopes_H[:, None, None] * distance
    return bias_HQK.masked_fill(future, float("-inf")).to(like.dtype)[None]
