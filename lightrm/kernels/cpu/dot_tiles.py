# mypy: ignore-errors
"""One tile of an int8 product by a CPU's dot-product instruction (VNNI), and 4-bit weights widened to its bytes.

The instruction multiplies unsigned by signed bytes. A weight w is therefore taken as w + 128, and what that adds to a
sum, 128 times the sum of the row of x, is subtracted at the beginning. All sums are exact in int32.
Written in LLVM's own language, through numba's `intrinsic`. Addresses and distances are in bytes.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from lightrm.kernels.cpu.instructions import BYTE, HALF, INT, counted, load, number, spread, store
from lightrm.kernels.cpu.simd import FEATURES

LANES = 16 if FEATURES.get("avx512vnni") else 8  # int32 sums of a register; four times as many bytes
AVAILABLE = bool(FEATURES.get("avx512vnni") or FEATURES.get("avxvnni"))
OUTPUTS, TOKENS = (6, 4) if LANES == 16 else (3, 3)  # of a tile: sums in three quarters of the registers
STEP = 4 * LANES  # bytes of a row in a register
TOP_BITS = 0x80808080  # flipping the top bit of a byte adds 128
NIBBLES = 0x0F0F
FOR_READING, INTO_L2, OF_DATA = 0, 2, 1  # what LLVM's prefetch is told


def fetch(builder, address):
    """Ask for the memory at an address, which is read soon, to be in the second level of cache."""
    kind = ir.FunctionType(ir.VoidType(), [BYTE.as_pointer(), INT, INT, INT])
    prefetch = get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    how = (ir.Constant(INT, word) for word in (FOR_READING, INTO_L2, OF_DATA))
    builder.call(prefetch, [builder.inttoptr(address, BYTE.as_pointer()), *how])


def dot_tile(ahead: int) -> Callable[..., None]:
    """Return a compiled tile: out[t, o] = before[t, o] + sum of (w[o] ^ flip) * x[t] for TOKENS x OUTPUTS.

    Called with (w, x, before, out, w_row, x_row, before_row, out_row, depth, flip, soon). w: unsigned bytes once
    flipped; x: signed bytes; before, out: int32. depth: a multiple of STEP. flip: TOP_BITS or 0. soon: address of
    memory that is read next; `ahead` registers of it are fetched in every step.
    """
    sums = ir.VectorType(INT, LANES)

    def generate(context, builder, signature, arguments):
        w, x, before, out, w_row, x_row, before_row, out_row, depth, flip, soon = arguments
        three = ir.FunctionType(sums, [sums] * 3)
        multiply_add = get_or_insert_function(builder.module, three, f"llvm.x86.avx512.vpdpbusd.{32 * LANES}")
        add_up = f"llvm.vector.reduce.add.v{LANES}i32"
        total = get_or_insert_function(builder.module, ir.FunctionType(INT, [sums]), add_up)
        mask = spread(builder, builder.trunc(flip, INT), LANES)
        found = []

        def step(at_w, at_x, at_soon, *before):
            running = list(before)
            for k in range(ahead):
                fetch(builder, builder.add(at_soon, number(STEP * k)))
            bytes_of_x = [load(builder, row(at_x, x_row, t), sums) for t in range(TOKENS)]
            for o in range(OUTPUTS):
                bytes_of_w = builder.xor(load(builder, row(at_w, w_row, o), sums), mask)
                for t in range(TOKENS):
                    running[o * TOKENS + t] = builder.call(
                        multiply_add, [running[o * TOKENS + t], bytes_of_w, bytes_of_x[t]]
                    )
            found[:] = running
            return running

        def row(base, distance, k):
            return builder.add(base, builder.mul(distance, number(k)))

        zeros = [ir.Constant(sums, [0] * LANES)] * (OUTPUTS * TOKENS)
        steps = [number(STEP), number(STEP), number(STEP * ahead)]
        counted(builder, builder.udiv(depth, number(STEP)), [w, x, soon, *zeros], steps, step)
        for t in range(TOKENS):
            some = ir.VectorType(INT, OUTPUTS)
            results = ir.Constant(some, ir.Undefined)
            for o in range(OUTPUTS):
                result = builder.call(total, [found[o * TOKENS + t]])
                results = builder.insert_element(results, result, ir.Constant(INT, o))
            results = builder.add(results, load(builder, row(before, before_row, t), some))
            store(builder, results, row(out, out_row, t))
        return context.get_dummy_value()

    @intrinsic
    def multiply(typing, w, x, before, out, w_row, x_row, before_row, out_row, depth, flip, soon):
        return types.void(*[types.intp] * 11), generate

    return multiply


def widening(run: int) -> Callable[..., None]:
    """Return compiled code that widens one row of `schemes.int4` to bytes w + 128, where `run` neighbours of a half
    block share a multiplier.

    Called with (packed, factor, offset, out, blocks, runs, high, block, soon). factor, offset: uint16 for each group; a
    byte is factor * nibble + offset, with the offset in both halves of 16 bits, so that one 16-bit product widens two.
    runs: of a half block. high: from the group of a run in the low half to that in the high half. block: from the
    groups of a block to those of the next. soon: how far ahead memory is fetched.
    """
    lanes = run // 2
    kind = ir.VectorType(HALF, lanes)

    def generate(context, builder, signature, arguments):
        packed, factor, offset, out, blocks, runs, high, a_block, soon = arguments
        half = builder.mul(runs, number(run))
        mask, four = ir.Constant(kind, [NIBBLES] * lanes), ir.Constant(kind, [4] * lanes)

        def widen_run(at, at_factor, at_offset, to):
            pairs = load(builder, at, kind)
            halves = builder.and_(pairs, mask), builder.and_(builder.lshr(pairs, four), mask)
            for nibbles, group, place in zip(halves, (number(0), high), (number(0), half), strict=True):
                times, more = (
                    spread(builder, load(builder, builder.add(base, group), HALF), lanes)
                    for base in (at_factor, at_offset)
                )
                store(builder, builder.add(builder.mul(nibbles, times), more), builder.add(to, place))
            return []

        def widen_block(*starts):
            fetch(builder, builder.add(starts[0], soon))
            counted(builder, runs, starts, [number(run), number(2), number(2), number(run)], widen_run)
            return []

        a_row = [half, a_block, a_block, builder.mul(number(2), half)]
        counted(builder, blocks, [packed, factor, offset, out], a_row, widen_block)
        return context.get_dummy_value()

    @intrinsic
    def widen(typing, packed, factor, offset, out, blocks, runs, high, block, soon):
        return types.void(*[types.intp] * 9), generate

    return widen
