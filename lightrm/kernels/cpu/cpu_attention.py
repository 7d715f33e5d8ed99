"""Packed causal attention on a CPU: tensors in, tensors out, around the code that numba compiles.

Fast version of `reference.attention`: in float32, or with both products in bfloat16 if keys and values are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lightrm.kernels.arena import empty
from lightrm.kernels.cpu import attention_loop, attention_pairs
from lightrm.kernels.cpu.cpu_passes import bits, launch
from lightrm.kernels.operands import ScoreRule
from lightrm.kernels.paths import Paths, heads_side_by_side, paths_of
from lightrm.kernels.segments import Segment

EVERYTHING = 2**31 - 1  # positions: no window


def paths(
    segments: Sequence[Segment], device: torch.device, picked: Sequence[int] | None, head_width: int = 0
) -> Paths:
    """The width of a head, by which a card's kernel chooses its tiles, does not matter here."""
    return paths_of(segments, device, picked, attention_loop.QUERIES)


def attention(
    query_THE: torch.Tensor,
    key_TJE: torch.Tensor,
    value_TJE: torch.Tensor,
    paths: Paths,
    rule: ScoreRule,
) -> torch.Tensor:
    heads = query_THE.shape[1]
    query_THE = heads_side_by_side(query_THE)
    keys, values = (x_TJE.transpose(0, 1).contiguous() for x_TJE in (key_TJE, value_TJE))
    in_half = keys.dtype == torch.bfloat16
    if in_half:
        keys, values = keys.view(torch.int32).view(torch.uint32), bits(values)
    out_THE = empty(*query_THE.shape, dtype=torch.float32)
    slopes_H = torch.zeros(heads) if rule.slopes_H is None else rule.slopes_H
    scale, cap = np.float32(rule.scale), np.float32(rule.softcap or 0)
    window = EVERYTHING if rule.window is None else rule.window
    loop = attention_pairs.attention_rows if in_half else attention_loop.attention_rows
    launch(loop, query_THE, keys, values, paths.tables, scale, cap, window, slopes_H, out_THE)
    return out_THE
