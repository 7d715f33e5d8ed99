# mypy: ignore-errors
"""One tile of a product, held in the vector registers of a CPU: LLVM does not produce this from loops by itself.

    C (rows, lanes) = [C +] A (rows, depth) @ B (depth, lanes)

Each float is one chain of fused multiply-adds along the depth, so it does not depend on the tile that it is in.
A word of A and of B can also be two steps of the depth: a pair of bfloat16 where the CPU multiplies them (AVX512_BF16),
with sums in float32, or a pair of int16 (AVX2), with sums in int32. Written in LLVM's own language, through numba's
`intrinsic`.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Literal

import llvmlite.binding
from llvmlite import ir
from numba import config, types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from lightrm.kernels.cpu.instructions import HALF, INT, counted, load, number, spread, store


def features() -> dict[str, bool]:
    """Return the features of the CPU to compile for: of this one, unless numba is told otherwise."""
    if config.CPU_FEATURES is None:
        return dict(llvmlite.binding.get_host_cpu_features())
    return {feature[1:]: feature.startswith("+") for feature in config.CPU_FEATURES.split(",") if feature}


FEATURES = features()
VECTOR = 16  # floats: one register with AVX-512, two with AVX2, four with NEON
ROWS, LANES = (8, 2 * VECTOR) if FEATURES.get("avx512f") else (4, VECTOR)  # of a tile: sums in half of the registers
FUSED = platform.machine().lower() not in ("x86_64", "amd64", "x86") or bool(FEATURES.get("fma"))
PAIRS = bool(FEATURES.get("avx512bf16"))  # whether this CPU multiplies pairs of bfloat16
FLOAT, BYTES = ir.FloatType(), 4  # of a word
SUMS = 8  # int32 of a register with AVX2
Words = Literal["float32", "bfloat16", "int16"]  # what a word of A and of B holds: one number, or a pair


class BFloat16(ir.Type):
    """LLVM's bfloat, which llvmlite has no class for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat16)

    def __hash__(self) -> int:
        return hash(BFloat16)


def tile(rows: int, lanes: int, onto: bool, words: Words = "float32") -> Callable[..., None]:
    """Return a compiled tile, called with (A, B, C, a_row, a_step, b_step, c_row, depth).

    A, B, C: addresses. a_row, a_step: words from one row of A to the next, and from one step of its depth to the next.
    b_step, c_row: words from one row of B, and of C, to the next. depth: in words, at least 1. onto: add to C
    instead of replacing.
    """
    width = {"float32": lanes, "bfloat16": VECTOR, "int16": SUMS}[words]
    vector, word = ir.VectorType(INT if words == "int16" else FLOAT, width), FLOAT if words == "float32" else INT
    parts = range(0, lanes, width)

    def generate(context, builder, signature, arguments):
        a, b, c, a_row, a_step, b_step, c_row, depth = arguments

        def moved(address, count, by=1):
            """Return address + count * by words."""
            by, count = (number(x) if isinstance(x, int) else x for x in (by, count))
            return builder.add(address, builder.mul(builder.mul(count, by), number(BYTES)))

        def multiply_add(x, y, total):
            if words == "int16":
                halves = ir.VectorType(HALF, 2 * width)
                kind = ir.FunctionType(vector, [halves, halves])
                dots = get_or_insert_function(builder.module, kind, "llvm.x86.avx2.pmadd.wd")
                return builder.add(builder.call(dots, [builder.bitcast(x, halves), builder.bitcast(y, halves)]), total)
            if words == "bfloat16":
                halves = ir.VectorType(BFloat16(), 2 * width)
                kind = ir.FunctionType(vector, [vector, halves, halves])
                dots = get_or_insert_function(builder.module, kind, f"llvm.x86.avx512bf16.dpbf16ps.{32 * width}")
                return builder.call(dots, [total, builder.bitcast(x, halves), builder.bitcast(y, halves)])
            if not FUSED:
                return builder.fadd(builder.fmul(x, y), total)
            kind = ir.FunctionType(vector, [vector] * 3)
            return builder.call(get_or_insert_function(builder.module, kind, f"llvm.fma.v{width}f32"), [x, y, total])

        zero = ir.Constant(vector, [0] * width)
        places = [(r, moved(moved(c, r, c_row), at)) for r in range(rows) for at in parts]
        begin = [load(builder, place, vector) if onto else zero for _, place in places]
        found = []

        def step(column, b_row, *sums):
            b_lanes = [load(builder, moved(b_row, at), ir.VectorType(word, width)) for at in parts]
            scalars = [spread(builder, load(builder, moved(column, r, a_row), word), width) for r in range(rows)]
            found[:] = [
                multiply_add(scalars[r], b_lanes[n % len(parts)], total)
                for n, ((r, _), total) in enumerate(zip(places, sums, strict=True))
            ]
            return found

        steps = [builder.mul(distance, number(BYTES)) for distance in (a_step, b_step)]
        counted(builder, depth, [a, b, *begin], steps, step)
        for (_, place), total in zip(places, found, strict=True):
            store(builder, total, place)
        return context.get_dummy_value()

    @intrinsic
    def multiply(typing, a, b, c, a_row, a_step, b_step, c_row, depth):
        return types.void(*[types.intp] * 8), generate

    return multiply
