"""The integer path's passes, float32 attention and the rounding of columns on a CPU: tensors in, tensors out, numba's
compiled code between.

Twins of `integer`, and of `reference.attention` and `reference.round_columns`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch

from lightrm.kernels import forks
from lightrm.kernels.arena import empty
from lightrm.kernels.cpu import attention_loop, column_loop, row_loops
from lightrm.kernels.cpu.row_loops import Rows
from lightrm.kernels.paths import Paths, heads_side_by_side, paths_of
from lightrm.kernels.segments import Segment
from lightrm.schemes.int4 import block_of

NOTHING = torch.empty(0)  # a vector that is not there, for the compiled code
ONE_AT_A_TIME = threading.Lock()  # not every threading layer of numba bears two callers


def launch(kernel: Rows, *arguments: Any) -> None:
    """Run a kernel on as many threads as PyTorch uses; tensors are lent, never copied."""
    lent = [a.numpy() if isinstance(a, torch.Tensor) else a for a in arguments]
    if forks.alone():
        kernel.by_one(*lent)
        return
    with ONE_AT_A_TIME:
        forks.started()
        threads = torch.get_num_threads()
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        if torch.get_num_threads() != threads:  # numba's OpenMP is PyTorch's, and starting it set the number of both
            torch.set_num_threads(threads)
        kernel.by_many(*lent)


def norm_quantize(
    x_TD: torch.Tensor, eps: float, shift_D: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    values, scale_T = empty(*x_TD.shape, dtype=torch.int8), x_TD.new_empty(len(x_TD))
    launch(
        row_loops.norm_quantize_rows, x_TD, np.float32(eps), NOTHING if shift_D is None else shift_D, values, scale_T
    )
    return values, scale_T


def quantize(x_TI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, scale_T = empty(*x_TI.shape, dtype=torch.int8), x_TI.new_empty(len(x_TI))
    launch(row_loops.quantize_rows, x_TI, values, scale_T)
    return values, scale_T


def split_heads(
    acc_TO: torch.Tensor,
    row_scale_T: torch.Tensor,
    scale_O: torch.Tensor,
    bias_O: torch.Tensor,
    widths: tuple[int, int],
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
    head_width: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of key and value, all rows of a head lie together, as `attention` wants them."""
    tokens, shared = len(acc_TO), widths[1] // head_width
    query_THE = empty(tokens, widths[0] // head_width, head_width, dtype=torch.float32)
    key_JTE, value_JTE = (empty(shared, tokens, head_width, dtype=torch.float32) for _ in range(2))
    cos_TE, sin_TE = rotation if rotation is not None else (row_scale_T.new_empty(tokens, 0),) * 2
    launch(row_loops.split_rows, acc_TO, row_scale_T, scale_O, bias_O, cos_TE, sin_TE, query_THE, key_JTE, value_JTE)
    return query_THE, key_JTE.transpose(0, 1), value_JTE.transpose(0, 1)


def add_sums(
    x_TD: torch.Tensor, acc_TD: torch.Tensor, row_scale_T: torch.Tensor, scale_D: torch.Tensor, bias_D: torch.Tensor
) -> None:
    launch(row_loops.add_rows, x_TD, acc_TD, row_scale_T, scale_D, bias_D)


def add_norm_quantize(
    x_TD: torch.Tensor,
    acc_TD: torch.Tensor,
    row_scale_T: torch.Tensor,
    scale_D: torch.Tensor,
    bias_D: torch.Tensor,
    eps: float,
    shift_D: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    values, scale_T = empty(*x_TD.shape, dtype=torch.int8), x_TD.new_empty(len(x_TD))
    added = acc_TD, row_scale_T, scale_D, bias_D
    shift_D = NOTHING if shift_D is None else shift_D
    launch(row_loops.add_norm_quantize_rows, x_TD, *added, np.float32(eps), shift_D, values, scale_T)
    return values, scale_T


def silu_mul_quantize(
    acc_TF2: torch.Tensor,
    row_scale_T: torch.Tensor,
    scale_F2: torch.Tensor,
    block: int,
    bias_F2: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    values = empty(len(acc_TF2), acc_TF2.shape[1] // 2, dtype=torch.int8)
    scale_T = torch.empty_like(row_scale_T)
    bias_F2 = torch.zeros_like(scale_F2) if bias_F2 is None else bias_F2
    launch(row_loops.silu_mul_quantize_rows, acc_TF2, row_scale_T, scale_F2, bias_F2, block, values, scale_T)
    return values, scale_T


def widen(packed: torch.Tensor, multiplier_OG: torch.Tensor) -> torch.Tensor:
    outputs, groups = multiplier_OG.shape
    inputs = 2 * packed.shape[1]
    half = block_of(inputs) // 2
    run = min(half, inputs // groups)
    out = empty(outputs, inputs // (2 * half), 2, half // run, run, dtype=torch.int8)
    launch(row_loops.widen_rows(half, run), packed.view(outputs, -1, half // run, run), multiplier_OG, out)
    return out.view(outputs, inputs)


def paths(segments: Sequence[Segment], picked: Sequence[int] | None) -> Paths:
    return paths_of(segments, torch.device("cpu"), picked, attention_loop.QUERIES)


def attention(
    query_THE: torch.Tensor,
    key_TJE: torch.Tensor,
    value_TJE: torch.Tensor,
    paths: Paths,
    slopes_H: torch.Tensor | None,
) -> torch.Tensor:
    heads, width = query_THE.shape[1:]
    query_THE = heads_side_by_side(query_THE)
    key_JTE, value_JTE = (x_TJE.transpose(0, 1).contiguous() for x_TJE in (key_TJE, value_TJE))
    out_THE = empty(*query_THE.shape, dtype=torch.float32)
    slopes_H = torch.zeros(heads) if slopes_H is None else slopes_H
    scale = np.float32(1 / math.sqrt(width))
    launch(attention_loop.attention_rows, query_THE, key_JTE, value_JTE, paths.tables, scale, slopes_H, out_THE)
    return out_THE


def round_columns(
    weight_OI: torch.Tensor,
    run: range,
    end: int,
    step_O: torch.Tensor,
    factor_II: torch.Tensor,
    bounds: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    q_OK = torch.empty(len(weight_OI), len(run), dtype=torch.int8)
    error_OK = weight_OI.new_empty(q_OK.shape)
    low, high = map(np.float32, bounds)
    launch(column_loop.round_column_rows, weight_OI, run.start, end, step_O, factor_II, low, high, q_OK, error_OK)
    return q_OK, error_OK
