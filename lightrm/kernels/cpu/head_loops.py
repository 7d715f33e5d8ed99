# mypy: ignore-errors
"""From the integer product of a fused layer to query, key and value on a CPU, compiled by numba: scaled, normed,
rotated by RoPE, and laid out as attention reads them.

E head width, H query heads, J key/value heads, T tokens. Otherwise as `row_loops`.
"""

from __future__ import annotations

import numpy as np
from numba import float32, njit, prange, uint32
from numba.extending import overload

from lightrm.kernels.cpu.row_loops import PLAIN, dequantize, over_rows, root_mean_square
from lightrm.kernels.cpu.scratch import floats, release, reserve

SIXTEEN, HALF_LESS_ONE = np.uint32(16), np.uint32(0x7FFF)


@njit(**PLAIN)
def turn(a, b, cos, sin):
    for e in range(a.shape[0]):
        x, y = a[e], b[e]
        a[e] = x * cos[e] - y * sin[e]
        b[e] = y * cos[e] + x * sin[e]


@njit(**PLAIN)
def scale_by(x, factor, weight):
    for k in range(x.shape[0]):
        x[k] = x[k] * factor * weight[k]


@njit(**PLAIN)
def split_row(out_E, acc_E, row_scale, scale_E, bias_E, cos_E, sin_E, norm_E, eps):
    """Scale one head of one token; norm it and rotate it where there is a norm (not of width 0) and a rotation."""
    dequantize(out_E, acc_E, row_scale, scale_E, bias_E)
    if norm_E.shape[0] > 0:
        scale_by(out_E, float32(1) / root_mean_square(out_E, eps), norm_E)
    half = cos_E.shape[0]
    turn(out_E[:half], out_E[half : 2 * half], cos_E, sin_E)


@njit(**PLAIN)
def halved(x):
    """The bits of x rounded to bfloat16, half to even. NaN stays NaN as arithmetic makes it."""
    bits = np.float32(x).view(np.uint32)
    odd = uint32(uint32(bits >> SIXTEEN) & uint32(1))
    return uint32(uint32(uint32(bits + HALF_LESS_ONE) + odd) >> SIXTEEN)


def keep(out, x):
    """Write a row of floats as `out` holds it: in float32, or as the bits of bfloat16."""


@overload(keep)
def keep_as(out, x):
    def whole(out, x):
        for k in range(out.shape[0]):
            out[k] = x[k]

    def half(out, x):
        for k in range(out.shape[0]):
            out[k] = np.uint16(halved(x[k]))

    return whole if out.dtype == float32 else half


@over_rows
def split_rows(
    acc_TO, row_scale_T, scale_O, bias_O, cos_TE, sin_TE, query_norm_E, key_norm_E, eps, query_THE, key_JTE, value_JTE
):
    """Keys and values are kept in float32, or in bfloat16 if their arrays are of its bits."""
    heads, shared, width = query_THE.shape[1], key_JTE.shape[0], query_THE.shape[2]
    for t in prange(acc_TO.shape[0]):
        acc, row, cos, sin, room = acc_TO[t], row_scale_T[t], cos_TE[t], sin_TE[t], reserve(4 * width)
        exact_E = floats(room, width)
        for h in range(heads + 2 * shared):
            part = slice(h * width, (h + 1) * width)
            if h < heads:
                split_row(query_THE[t, h], acc[part], row, scale_O[part], bias_O[part], cos, sin, query_norm_E, eps)
            elif h < heads + shared:
                split_row(exact_E, acc[part], row, scale_O[part], bias_O[part], cos, sin, key_norm_E, eps)
                keep(key_JTE[h - heads, t], exact_E)
            else:
                dequantize(exact_E, acc[part], row, scale_O[part], bias_O[part])
                keep(value_JTE[h - heads - shared, t], exact_E)
        release(room)
