# mypy: ignore-errors
"""4-bit weights (`schemes.int4`) widened to int8 on a CPU, compiled by numba.

O x I a weight, G groups along I. half: bytes of a block of the layout. run: of these, how many neighbours share a
multiplier.
"""

from __future__ import annotations

import numpy as np
from numba import int32, njit, prange

from lightrm.kernels.cpu.dot_tiles import widening
from lightrm.kernels.cpu.row_loops import PLAIN, over_rows
from lightrm.kernels.cpu.scratch import release, reserve, shorts

WIDEN_64, WIDEN_32, WIDEN_16, WIDEN_8, WIDEN_4 = (widening(run) for run in (64, 32, 16, 8, 4))
TOP_BIT = np.int8(-128)


@njit(**PLAIN)
def factors(multiplier_N, factor_N, offset_N):
    """What a nibble is multiplied by and what is added, for bytes w + 128; see `schemes.int4`."""
    for n in range(multiplier_N.shape[0]):
        multiplier = int32(multiplier_N[n])
        times = int32(abs(multiplier))
        less = int32(times * (int32(8) - int32(multiplier < 0)))
        factor_N[n] = np.uint16(times)
        offset_N[n] = np.uint16(int32((int32(128) - less) * int32(257)))


@njit(**PLAIN)
def widen_row(packed, factor, offset, out, blocks, half, run, whole, soon):
    """whole: whether a block is one group. soon: how many bytes ahead memory is fetched."""
    runs = half // run
    high, block = (0, 2) if whole else (2 * runs, 4 * runs)
    if run == 64:
        WIDEN_64(packed, factor, offset, out, blocks, runs, high, block, soon)
    elif run == 32:
        WIDEN_32(packed, factor, offset, out, blocks, runs, high, block, soon)
    elif run == 16:
        WIDEN_16(packed, factor, offset, out, blocks, runs, high, block, soon)
    elif run == 8:
        WIDEN_8(packed, factor, offset, out, blocks, runs, high, block, soon)
    else:
        WIDEN_4(packed, factor, offset, out, blocks, runs, high, block, soon)


@over_rows
def widen_rows(packed, multiplier_OG, half, run, out_OI):
    (outputs, groups), inputs = multiplier_OG.shape, out_OI.shape[1]
    row, blocks = packed.shape[1], packed.shape[1] // half
    for o in prange(outputs):
        room = reserve(4 * groups)
        factors(multiplier_OG[o], shorts(room, groups), shorts(room + 2 * groups, groups))
        at, to = packed.ctypes.data + o * row, out_OI.ctypes.data + o * inputs
        widen_row(at, room, room + 2 * groups, to, blocks, half, run, groups == blocks, row)
        release(room)
        out_I = out_OI[o]
        for i in range(inputs):
            out_I[i] ^= TOP_BIT  # from w + 128 to w
