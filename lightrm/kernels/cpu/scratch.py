# mypy: ignore-errors
"""Memory that compiled code takes for itself: arrays over C's malloc and free.

numba's own arrays need numba's runtime. Without it, the code of a kernel can be compiled ahead and run by itself
(`ahead`). Whoever reserves memory releases it; what is in it is arbitrary.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from lightrm.kernels.cpu.instructions import BYTE, WORD

BYTES = BYTE.as_pointer()
INLINE = {"nogil": True, "error_model": "numpy", "cache": True}


@intrinsic
def reserve(typing, count):
    """Return the address of `count` bytes, aligned to 16."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(BYTES, [WORD])
        malloc = get_or_insert_function(builder.module, kind, "malloc")
        return builder.ptrtoint(builder.call(malloc, arguments), WORD)

    return types.intp(types.intp), generate


@intrinsic
def release(typing, address):
    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.VoidType(), [BYTES])
        free = get_or_insert_function(builder.module, kind, "free")
        builder.call(free, [builder.inttoptr(arguments[0], BYTES)])
        return context.get_dummy_value()

    return types.void(types.intp), generate


@intrinsic
def pointer(typing, address):
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], BYTES)

    return types.voidptr(types.intp), generate


@njit(**INLINE)
def floats(address, count):
    return carray(pointer(address), (count,), np.float32)


@njit(**INLINE)
def float_rows(address, rows, columns):
    return carray(pointer(address), (rows, columns), np.float32)


@njit(**INLINE)
def word_rows(address, rows, columns):
    return carray(pointer(address), (rows, columns), np.uint32)


@njit(**INLINE)
def shorts(address, count):
    return carray(pointer(address), (count,), np.uint16)


@njit(**INLINE)
def signed_bytes(address, count):
    return carray(pointer(address), (count,), np.int8)
