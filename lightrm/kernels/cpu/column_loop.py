# mypy: ignore-errors
"""Rounding of a weight's columns, one after the other, on a CPU, compiled by numba: fast `reference.round_columns`.

One thread rounds a row, which stays in the thread's cache meanwhile. Nothing is fused or reordered, so the result
equals that of the reference bit for bit.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numba import int32, njit, prange

from lightrm.kernels.cpu.row_loops import EXACT, over_rows


@njit(**EXACT)
def subtract(row, error, factor):
    for k in range(row.shape[0]):
        row[k] -= error * factor[k]


@partial(over_rows, options=EXACT)
def round_column_rows(weight_OI, first, end, step_O, factor_II, low, high, q_OK, error_OK):
    for o in prange(weight_OI.shape[0]):
        row, step = weight_OI[o], step_O[o]
        for k in range(q_OK.shape[1]):
            i = first + k
            q = min(max(np.rint(row[i] / step), low), high)
            error = (row[i] - q * step) / factor_II[i, i]
            q_OK[o, k] = np.int8(int32(q))
            error_OK[o, k] = error
            subtract(row[i + 1 : end], error, factor_II[i, i + 1 : end])
