"""The passes of the integer path and the rounding of columns on a CPU: tensors in, tensors out, around numba's code.

Fast versions of `integer` and of `reference.round_columns`. Passes over float rows are PyTorch's (`library`).
"""

from __future__ import annotations

import threading
from typing import Any

import numba
import numpy as np
import torch

from lightrm.kernels import forks, integer
from lightrm.kernels.arena import empty
from lightrm.kernels.cpu import column_loop, head_loops, objects, row_loops, widen_loop
from lightrm.kernels.cpu.row_loops import Loop
from lightrm.kernels.cpu.simd import PAIRS
from lightrm.kernels.library import gated, norm_each, rms_norm, value_head
from lightrm.kernels.operands import CURVES, Activation, HeadNorms, Heads, Rotation, Rows, Sums
from lightrm.schemes.int4 import block_of

__all__ = [
    "add_norm_quantize", "add_normed", "add_sums", "bits", "gated", "gated_quantize", "launch", "norm_each",
    "norm_quantize", "quantize", "rms_norm", "round_columns", "split_heads", "value_head", "widen",
]  # fmt: skip

NOTHING = torch.empty(0)  # a vector that is not there, for the compiled code
ONE_AT_A_TIME = threading.Lock()  # not every threading layer of numba bears two callers


def launch(kernel: Loop, *arguments: Any) -> None:
    """Run a kernel on as many threads as PyTorch uses: compiled ahead if it is, otherwise by numba. It works on the
    tensors' own memory."""
    ready = objects.code()
    if ready is not None and ready.run(kernel.name, arguments, 1 if forks.alone() else threads_now()):
        return
    lent = [a.numpy() if isinstance(a, torch.Tensor) else a for a in arguments]
    if forks.alone():
        kernel.by_one(*lent)
        return
    with ONE_AT_A_TIME:
        threads = threads_now()
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        if torch.get_num_threads() != threads:  # numba's OpenMP is PyTorch's, and starting it set the number of both
            torch.set_num_threads(threads)
        kernel.by_many(*lent)


def threads_now() -> int:
    """Return the number of PyTorch's threads, which work from now on."""
    forks.started()
    return torch.get_num_threads()


def norm_quantize(
    x_TD: torch.Tensor,
    eps: float,
    weight_D: torch.Tensor | None = None,
    shift_D: torch.Tensor | None = None,
    block: int = 1,
) -> Rows:
    values, scale_T = empty(*x_TD.shape, dtype=torch.int8), x_TD.new_empty(len(x_TD))
    vectors = (NOTHING if vector is None else vector for vector in (weight_D, shift_D))
    launch(row_loops.norm_quantize_rows, x_TD, np.float32(eps), *vectors, block, values, scale_T)
    return Rows(values, scale_T)


def quantize(x_TI: torch.Tensor) -> Rows:
    values, scale_T = empty(*x_TI.shape, dtype=torch.int8), x_TI.new_empty(len(x_TI))
    launch(row_loops.quantize_rows, x_TI.contiguous(), values, scale_T)
    return Rows(values, scale_T)


def split_heads(
    sums: Sums, widths: tuple[int, int], head_width: int, rotation: Rotation, norms: HeadNorms | None = None
) -> Heads:
    """Return heads of key and value with all rows of a head in adjacent memory, as attention reads them; in bfloat16 if
    this CPU multiplies it."""
    if sums.row_scale_T is None:
        return integer.split_heads(sums, widths, head_width, rotation, norms)
    tokens, shared = len(sums.acc_TO), widths[1] // head_width
    in_half = PAIRS and head_width % 2 == 0
    query_THE = empty(tokens, widths[0] // head_width, head_width, dtype=torch.float32)
    dtype = torch.bfloat16 if in_half else torch.float32
    key_JTE, value_JTE = (empty(shared, tokens, head_width, dtype=dtype) for _ in range(2))
    cos_TE, sin_TE = rotation if rotation is not None else (sums.row_scale_T.new_empty(tokens, 0),) * 2
    query_norm_E, key_norm_E, eps = (NOTHING, NOTHING, 0.0) if norms is None else norms
    launch(
        head_loops.split_rows, *scaled(sums), cos_TE, sin_TE, query_norm_E, key_norm_E, np.float32(eps), query_THE,
        *(bits(x) for x in (key_JTE, value_JTE)),
    )  # fmt: skip
    return query_THE, key_JTE.transpose(0, 1), value_JTE.transpose(0, 1)


def bits(x: torch.Tensor) -> torch.Tensor:
    """Return bfloat16 as whole numbers, which numpy has; other dtypes unchanged."""
    return x.view(torch.uint16) if x.dtype == torch.bfloat16 else x


def add_sums(x_TD: torch.Tensor, sums: Sums) -> None:
    if sums.row_scale_T is None:
        integer.add_sums(x_TD, sums)
    else:
        launch(row_loops.add_rows, x_TD, *scaled(sums))


def add_normed(x_TD: torch.Tensor, sums: Sums, weight_D: torch.Tensor, eps: float) -> None:
    if sums.row_scale_T is None:
        integer.add_normed(x_TD, sums, weight_D, eps)
    else:
        launch(row_loops.add_normed_rows, x_TD, *scaled(sums), weight_D, np.float32(eps))


def add_norm_quantize(
    x_TD: torch.Tensor,
    sums: Sums,
    eps: float,
    weight_D: torch.Tensor | None = None,
    shift_D: torch.Tensor | None = None,
    block: int = 1,
) -> Rows:
    if sums.row_scale_T is None:
        return integer.add_norm_quantize(x_TD, sums, eps, weight_D, shift_D, block)
    values, scale_T = empty(*x_TD.shape, dtype=torch.int8), x_TD.new_empty(len(x_TD))
    vectors = (NOTHING if vector is None else vector for vector in (weight_D, shift_D))
    launch(row_loops.add_norm_quantize_rows, x_TD, *scaled(sums), np.float32(eps), *vectors, block, values, scale_T)
    return Rows(values, scale_T)


def gated_quantize(sums: Sums, block: int, activation: Activation = "silu") -> Rows:
    if sums.row_scale_T is None:
        return integer.gated_quantize(sums, block, activation)
    values = empty(len(sums.acc_TO), sums.acc_TO.shape[1] // 2, dtype=torch.int8)
    scale_T = torch.empty_like(sums.row_scale_T)
    factor, cubic = map(np.float32, CURVES[activation])
    launch(row_loops.gated_quantize_rows, *scaled(sums), block, factor, cubic, values, scale_T)
    return Rows(values, scale_T)


def scaled(sums: Sums) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return int32 sums with their scales and a bias; the compiled code always adds a bias."""
    acc_TO, row_scale_T, scale_O, bias_O = sums
    assert row_scale_T is not None
    assert scale_O is not None
    return acc_TO, row_scale_T, scale_O, torch.zeros_like(scale_O) if bias_O is None else bias_O


def widen(packed: torch.Tensor, multiplier_OG: torch.Tensor) -> torch.Tensor:
    outputs, groups = multiplier_OG.shape
    inputs = 2 * packed.shape[1]
    half = block_of(inputs) // 2
    out_OI = empty(outputs, inputs, dtype=torch.int8)
    launch(widen_loop.widen_rows, packed, multiplier_OG, half, min(half, inputs // groups), out_OI)
    return out_OI


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
