"""Packed attention on a card: tensors in, tensors out. Fast version of `reference.attention`; runs in Triton's
interpreter.

T tokens, H query heads, J key/value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightrm.kernels.cuda.launch import on, power, precision, vector
from lightrm.kernels.cuda.tiles import capability, keys_for
from lightrm.kernels.cuda.triton_attention import attention_tile
from lightrm.kernels.operands import Rows, ScoreRule
from lightrm.kernels.paths import Paths, heads_side_by_side, paths_of
from lightrm.kernels.segments import Segment

WIDE, WIDE_QUERIES = 128, 64  # heads of more than 128, as Gemma's, leave registers for half as many queries


def paths(segments: Sequence[Segment], device: torch.device, picked: Sequence[int] | None, head_width: int) -> Paths:
    return paths_of(segments, device, picked, WIDE_QUERIES if picked is None and head_width > WIDE else None)


def attention(
    query_THE: torch.Tensor,
    key_TJE: torch.Tensor,
    value_TJE: torch.Tensor,
    paths: Paths,
    rule: ScoreRule,
) -> torch.Tensor:
    return attend(query_THE, key_TJE, value_TJE, paths, rule)[0]


def attention_quantize(
    query_THE: torch.Tensor,
    key_TJE: torch.Tensor,
    value_TJE: torch.Tensor,
    paths: Paths,
    rule: ScoreRule,
) -> Rows:
    """Attention whose rows are rounded to int8."""
    return Rows(*attend(query_THE, key_TJE, value_TJE, paths, rule, quantized=True)[1:])


def attend(
    query_THE: torch.Tensor,
    key_TJE: torch.Tensor,
    value_TJE: torch.Tensor,
    paths: Paths,
    rule: ScoreRule,
    quantized: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return attention over a pack, (T, H, E), and if quantized also int8 rows (T, H * E) with their scale (T,)."""
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
                scale_T if rule.slopes_H is None else vector(rule.slopes_H),
                values,
                scale_T,
                arrived,
                rule.scale,
                rule.softcap or 0.0,
                rule.window or 0,
                width,
                paths.tables.shape[1],
                query_THE.stride(0),
                key_TJE.stride(0),
                value_TJE.stride(0),
                SHARED_BY=heads // key_TJE.shape[1],
                SLOPED=rule.slopes_H is not None,
                CAPPED=rule.softcap is not None,
                WINDOWED=rule.window is not None,
                QUANTIZED=quantized,
                DEPTH=paths.depth,
                QUERIES=paths.queries,
                KEYS=keys_for(capability(query_THE.device), width),
                WIDTH=max(16, power(width)),
                PRECISION=precision(query_THE.dtype),
                enable_fp_fusion=False,
                num_warps=8 if width > WIDE else max(4, paths.queries // 16),
                num_stages=2,
            )
    return out_THE, values, scale_T
