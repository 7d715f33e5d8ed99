# mypy: ignore-errors
"""Products of int8 rows on a CPU with AVX2 and without a dot-product instruction, compiled by numba.

int8 numbers are widened to int16, whose pairs an instruction multiplies and adds in int32 (vpmaddwd). So every sum is
exact; the instruction for pairs of bytes is faster, and its sums saturate at 16 bits.

The rows come as int16. A thread takes CHANNELS of the weight at a time: DEPTH inputs of them are widened and turned, so
that neighbouring channels lie side by side, and such a panel, which fills the first level of cache, is multiplied by
all rows. The weight is read once, page after page. A 4-bit weight is widened to bytes first.

T tokens, in whole ROWS; O x I a weight, O in whole CHANNELS and I in whole INPUTS; G groups along I.
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from lightrm.kernels.cpu.instructions import BYTE, HALF, INT, counted, load, number, spread, store
from lightrm.kernels.cpu.row_loops import PLAIN, over_rows
from lightrm.kernels.cpu.scratch import release, reserve, shorts, signed_bytes
from lightrm.kernels.cpu.simd import BYTES, FEATURES, tile
from lightrm.kernels.cpu.widen_loop import factors, widen_row

AVAILABLE = bool(FEATURES.get("avx2"))
ROWS, CHANNELS = 4, 16  # of a tile
INPUTS = 16  # that are turned in one step
DEPTH = 1024  # inputs of a panel
PART = 8 * CHANNELS  # channels that a thread takes at a time
APART = DEPTH + 64  # bytes between the rows of a widened 4-bit weight: not a power of two
TOP_BIT = 0x80
REPLACE, ADD = (tile(ROWS, CHANNELS, onto=onto, words="int16") for onto in (False, True))


def interleaved(builder, rows):
    """Return 8 rows of 8 numbers turned: three times, each row is interleaved with the one that lies half of all rows
    behind it."""
    low, high = (
        ir.Constant(ir.VectorType(INT, 8), [k + more for k in range(start, start + 4) for more in (0, 8)])
        for start in (0, 4)
    )
    for _ in range(3):
        pairs = zip(rows[:4], rows[4:], strict=True)
        rows = [builder.shuffle_vector(x, y, order) for x, y in pairs for order in (low, high)]
    return rows


@intrinsic
def turn(typing, weight, row, out, steps, flip):
    """Write pairs of int16, [steps * INPUTS / 2][CHANNELS] words, from CHANNELS rows of bytes that lie `row` bytes
    apart. flip: TOP_BIT for bytes that are w + 128, 0 for those of w."""

    def generate(context, builder, signature, arguments):
        weight, row, out, steps, flip = arguments
        mask = spread(builder, builder.trunc(flip, BYTE), INPUTS)

        def step(at, to):
            starts = (builder.add(at, builder.mul(row, number(k))) for k in range(8))
            rows = [load(builder, start, ir.VectorType(HALF, 8)) for start in starts]
            for k, eight in enumerate(interleaved(builder, rows)):
                signed = builder.xor(builder.bitcast(eight, ir.VectorType(BYTE, INPUTS)), mask)
                place = builder.add(to, number(BYTES * CHANNELS * k))
                store(builder, builder.sext(signed, ir.VectorType(HALF, INPUTS)), place)
            return []

        grown = [number(INPUTS), number(BYTES * CHANNELS * INPUTS // 2)]
        for first in range(0, CHANNELS, 8):
            start, end = builder.mul(row, number(first)), number(BYTES * first)
            counted(builder, steps, [builder.add(weight, start), builder.add(out, end)], grown, step)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), generate


@njit(**PLAIN)
def multiply_panel(x_TI, panel, out_TO, channel, start, depth):
    """Multiply all rows by a panel. The sums of the first inputs replace what is in `out`; others are added."""
    (tokens, inputs), outputs = x_TI.shape, out_TO.shape[1]
    for t in range(0, tokens, ROWS):
        a = x_TI.ctypes.data + 2 * (t * inputs + start)
        c = out_TO.ctypes.data + BYTES * (t * outputs + channel)
        if start == 0:
            REPLACE(a, panel, c, inputs // 2, 1, CHANNELS, outputs, depth // 2)
        else:
            ADD(a, panel, c, inputs // 2, 1, CHANNELS, outputs, depth // 2)


@over_rows
def multiply_int8(x_TI, weight_OI, out_TO):
    outputs, inputs = weight_OI.shape
    for part in prange(-(-outputs // PART)):
        panel = reserve(2 * DEPTH * CHANNELS)
        for channel in range(part * PART, min(part * PART + PART, outputs), CHANNELS):
            for start in range(0, inputs, DEPTH):
                depth = min(DEPTH, inputs - start)
                turn(weight_OI.ctypes.data + channel * inputs + start, inputs, panel, depth // INPUTS, 0)
                multiply_panel(x_TI, panel, out_TO, channel, start, depth)
        release(panel)


@njit(**PLAIN)
def widen_channels(packed, multiplier_OG, half, run, channel, start, depth, factor, out):
    """Write inputs start .. start + depth of CHANNELS channels as bytes w + 128, APART bytes apart. factor: memory for
    the multipliers of one channel."""
    groups, row = multiplier_OG.shape[1], packed.shape[1]
    inputs, blocks = 2 * row, depth // (2 * half)
    some, skip, whole = depth * groups // inputs, start * groups // inputs, groups == row // half
    for k in range(CHANNELS):
        multiplier_N = signed_bytes(multiplier_OG.ctypes.data + (channel + k) * groups + skip, some)
        factors(multiplier_N, shorts(factor, some), shorts(factor + 2 * some, some))
        at = packed.ctypes.data + (channel + k) * row + start // 2
        widen_row(at, factor, factor + 2 * some, out + k * APART, blocks, half, run, whole, CHANNELS * row)


@over_rows
def multiply_int4(x_TI, packed, multiplier_OG, half, run, out_TO):
    """half: bytes of a block of the layout. run: of these, how many neighbours share a multiplier."""
    inputs, (outputs, groups) = x_TI.shape[1], multiplier_OG.shape
    for part in prange(-(-outputs // PART)):
        panel = reserve(2 * DEPTH * CHANNELS + CHANNELS * APART + 4 * groups)
        weight = panel + 2 * DEPTH * CHANNELS
        factor = weight + CHANNELS * APART
        for channel in range(part * PART, min(part * PART + PART, outputs), CHANNELS):
            for start in range(0, inputs, DEPTH):
                depth = min(DEPTH, inputs - start)
                widen_channels(packed, multiplier_OG, half, run, channel, start, depth, factor, weight)
                turn(weight, APART, panel, depth // INPUTS, TOP_BIT)
                multiply_panel(x_TI, panel, out_TO, channel, start, depth)
        release(panel)
