# mypy: ignore-errors
"""Products of few int8 rows on a CPU, compiled by numba: with few rows, reading the weights takes most of the time.

A thread takes some output channels after the other and multiplies all rows by a tile of them, while the next tile's
weights are fetched. 4-bit weights are widened a tile at a time, in the thread's own cache, so that only half of the
bytes are read. Libraries are several times slower here: they rearrange the weights in every call.

T tokens, in whole TOKENS; O x I a weight, I in whole STEPs and O at least OUTPUTS; G groups along I.
"""

from __future__ import annotations

from numba import int32, njit, prange

from lightrm.kernels.cpu.dot_tiles import OUTPUTS, STEP, TOKENS, TOP_BITS, dot_tile
from lightrm.kernels.cpu.row_loops import PLAIN, over_rows
from lightrm.kernels.cpu.scratch import release, reserve, shorts, signed_bytes
from lightrm.kernels.cpu.widen_loop import factors, widen_row

CHANNELS = 10 * OUTPUTS  # that a thread takes at a time
DEPTH = 4096  # the most inputs that are multiplied at a time: a tile's weights stay in the first level of cache
FETCH_ALL, FETCH_TWO, FETCH_ONE = dot_tile(OUTPUTS), dot_tile(2), dot_tile(1)  # rows' worth, spread over the steps


@njit(**PLAIN)
def start_sums(x_TI, begin_TO):
    """Set what each sum begins with: -128 times the sum of its row of x."""
    for t in range(x_TI.shape[0]):
        total = int32(0)
        for i in range(x_TI.shape[1]):
            total += int32(x_TI[t, i])
        for o in range(begin_TO.shape[1]):
            begin_TO[t, o] = int32(-128) * total


@njit(**PLAIN)
def multiply_tile(w, w_row, flip, x_TI, begin_TO, out_TO, first, soon):
    """Multiply all rows by the OUTPUTS channels from `first` on, some inputs after the other. w: address of the
    channels, whose rows are w_row bytes apart. soon: address of the next tile's, 0 if it is fetched elsewhere."""
    (tokens, outputs), inputs = out_TO.shape, x_TI.shape[1]
    x, out = x_TI.ctypes.data, out_TO.ctypes.data + 4 * first
    pieces = -(-inputs // DEPTH)
    depth = -(-inputs // (pieces * STEP)) * STEP
    before, before_row = begin_TO.ctypes.data, 4 * OUTPUTS
    tiles = tokens // TOKENS
    for i in range(0, inputs, depth):
        some = min(depth, inputs - i)
        for k in range(tiles):
            t = TOKENS * k
            at_w, at_x, at_out, at_before = w + i, x + t * inputs + i, out + 4 * t * outputs, before + before_row * t
            at_soon = soon + OUTPUTS * i
            if soon != 0 and tiles == 1:
                FETCH_ALL(at_w, at_x, at_before, at_out, w_row, inputs, before_row, 4 * outputs, some, flip, at_soon)
            elif soon != 0 and tiles < OUTPUTS and 2 * k < OUTPUTS:
                at_soon += 2 * k * some
                FETCH_TWO(at_w, at_x, at_before, at_out, w_row, inputs, before_row, 4 * outputs, some, flip, at_soon)
            else:
                at_soon = at_soon + k * some if soon != 0 and k < OUTPUTS <= tiles else at_w
                FETCH_ONE(at_w, at_x, at_before, at_out, w_row, inputs, before_row, 4 * outputs, some, flip, at_soon)
        before, before_row = out, 4 * outputs


@over_rows
def multiply_int8(x_TI, begin_TO, weight_OI, out_TO):
    start_sums(x_TI, begin_TO)
    outputs, inputs = weight_OI.shape
    for part in prange(-(-outputs // CHANNELS)):
        for first in range(part * CHANNELS, min(part * CHANNELS + CHANNELS, outputs), OUTPUTS):
            o = min(first, outputs - OUTPUTS)  # the last tile begins early, and computes some channels again
            at = weight_OI.ctypes.data + o * inputs
            multiply_tile(at, inputs, TOP_BITS, x_TI, begin_TO, out_TO, o, at + OUTPUTS * inputs)


@over_rows
def multiply_int4(x_TI, begin_TO, packed, multiplier_OG, half, run, out_TO):
    """half: bytes of a block of the layout. run: of these, how many neighbours share a multiplier."""
    start_sums(x_TI, begin_TO)
    (outputs, groups), inputs = multiplier_OG.shape, x_TI.shape[1]
    row, blocks = packed.shape[1], packed.shape[1] // half
    for part in prange(-(-outputs // CHANNELS)):
        apart = inputs + STEP  # rows not a power of two apart: they share no cache lines
        room = reserve(OUTPUTS * (apart + 4 * groups))
        to, at_factor, at_offset = room, room + OUTPUTS * apart, room + OUTPUTS * (apart + 2 * groups)
        factor_N, offset_N = shorts(at_factor, OUTPUTS * groups), shorts(at_offset, OUTPUTS * groups)
        for first in range(part * CHANNELS, min(part * CHANNELS + CHANNELS, outputs), OUTPUTS):
            o = min(first, outputs - OUTPUTS)
            at = packed.ctypes.data + o * row
            multiplier_N = signed_bytes(multiplier_OG.ctypes.data + o * groups, OUTPUTS * groups)
            factors(multiplier_N, factor_N, offset_N)
            for k in range(OUTPUTS):
                skip, whole = 2 * k * groups, groups == blocks
                widen_row(
                    at + k * row, at_factor + skip, at_offset + skip, to + k * apart, blocks, half, run, whole,
                    OUTPUTS * row,
                )  # fmt: skip
            multiply_tile(to, apart, 0, x_TI, begin_TO, out_TO, o, 0)
        release(room)
