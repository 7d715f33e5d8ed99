# mypy: ignore-errors
"""The passes between integer products on a CPU, compiled by numba: each reads and writes a row once.

Threads divide the rows among them. One thread computes a row in a fixed order, so its result does not depend on other
rows. The largest magnitude of a row is found on the bits of its floats, as integers: that vectorizes, and it finds NaN
too, whose bits are larger than those of any number. Compiled code is cached beside this file for the next process.

The truth is in `kernels.integer`; `cpu_passes` is the typed interface. T tokens, D width, F feed-forward width, E head
width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import numpy as np
from numba import float32, int32, njit, prange

from lightrm.kernels.cpu.scratch import floats, release, reserve
from lightrm.schemes.int8 import LEVELS, TINY

# Divisions by zero give inf instead of raising, without which nothing below vectorizes. Only sums may be reordered.
EXACT = {"nogil": True, "error_model": "numpy", "cache": True}
PLAIN = EXACT | {"fastmath": {"contract"}}
SUMS = EXACT | {"fastmath": {"contract", "reassoc"}}


@dataclass(frozen=True, slots=True)
class Loop:
    """A loop over rows, compiled twice: for numba's threads, and as a plain loop for a process with one thread
    (`forks`).

    Both use the same code for a row.
    """

    name: str
    by_many: Callable[..., None]
    by_one: Callable[..., None]

    def __hash__(self) -> int:
        return hash(self.name)


def over_rows(loop: FunctionType, options: dict[str, Any] = PLAIN) -> Loop:
    alone = FunctionType(loop.__code__, loop.__globals__, loop.__name__)
    alone.__qualname__ = f"{loop.__qualname__}.by_one"  # numba keeps compiled code under this name
    name = f"{loop.__module__.rpartition('.')[2]}.{loop.__name__}"
    return Loop(name, njit(parallel=True, **options)(loop), njit(**options)(alone))


LOG2_E = np.float32(1 / math.log(2))
C1, C2, C3, C4, C5, C6, C7 = (np.float32(math.log(2) ** k / math.factorial(k)) for k in range(1, 8))
ROUNDER = np.float32(1.5 * 2**23)  # adding and taking away rounds to a whole number
FAR = np.float32(87.0)  # exp(87) is near the end of float32
LEVELS_F, TINY_F, EXPONENT_BIAS, MANTISSA = np.float32(LEVELS), np.float32(TINY), np.int32(127), np.int32(23)
ABSOLUTE = np.int32(0x7FFFFFFF)


@njit(**PLAIN)
def exponential(x):
    """e^x = 2^n 2^f with n whole and |f| <= 1/2: a Taylor polynomial of degree seven, error below 1e-8."""
    z = min(max(x, -FAR), FAR) * LOG2_E
    whole = (z + ROUNDER) - ROUNDER
    f = z - whole
    p = C6 + f * C7
    p = C5 + f * p
    p = C4 + f * p
    p = C3 + f * p
    p = C2 + f * p
    p = C1 + f * p
    power = np.int32((int32(whole) + EXPONENT_BIAS) << MANTISSA).view(np.float32)
    return (float32(1) + f * p) * power


@njit(**PLAIN)
def peak(x):
    bits = x.view(np.int32)
    most = np.int32(0)
    for k in range(bits.shape[0]):
        most = max(most, int32(bits[k] & ABSOLUTE))
    return np.int32(most).view(np.float32)


@njit(**PLAIN)
def at_least_tiny(most):
    return TINY_F if most < TINY_F else most  # NaN stays NaN


@njit(**PLAIN)
def round_to(values, x, factor):
    for k in range(x.shape[0]):
        values[k] = np.int8(int32(np.rint(x[k] * factor)))


@njit(**SUMS)
def sum_of_squares(x):
    total = float32(0)
    for k in range(x.shape[0]):
        total += x[k] * x[k]
    return total


@njit(**PLAIN)
def scale_and_shift(out, x, factor, shift):
    for k in range(out.shape[0]):
        out[k] = x[k] * factor - shift[k]


@njit(**PLAIN)
def root_mean_square(x, eps):
    mean = sum_of_squares(x) / float32(x.shape[0])
    return np.sqrt(mean + eps) + (mean - mean)  # NaN where the squares overflow: the row would be scaled to zeros


@njit(inline="always", **PLAIN)
def butterfly(a, b):
    for k in range(a.shape[0]):
        x, y = a[k], b[k]
        a[k], b[k] = x + y, x - y


@njit(inline="always", **PLAIN)
def two_butterflies(a, b, c, d):
    for k in range(a.shape[0]):
        w, x, y, z = a[k] + b[k], a[k] - b[k], c[k] + d[k], c[k] - d[k]
        a[k], b[k], c[k], d[k] = w + y, x + z, w - y, x - z


@njit(**PLAIN)
def hadamard(x, block):
    """Unscaled Hadamard transform in place, two levels at a time."""
    step = x.shape[0] // block
    while 4 * step <= x.shape[0]:
        for k in range(0, x.shape[0], 4 * step):
            two_butterflies(
                x[k : k + step],
                x[k + step : k + 2 * step],
                x[k + 2 * step : k + 3 * step],
                x[k + 3 * step : k + 4 * step],
            )
        step *= 4
    if step < x.shape[0]:
        butterfly(x[:step], x[step:])


@njit(**PLAIN)
def weigh(x, weight):
    for k in range(x.shape[0]):
        x[k] = x[k] * weight[k]


@njit(**PLAIN)
def norm_quantize_row(x_D, eps, weight_D, shift_D, block, values_D):
    """weight_D: of the norm; of width 0 if there is none. shift_D: subtracted from the normed row; of width 0 if there
    is none, in which case the norm goes into the scale. block: of the Hadamard transform, 1 for none."""
    root = root_mean_square(x_D, eps)
    if weight_D.shape[0] == 0 and shift_D.shape[0] == 0 and block == 1:
        most = at_least_tiny(peak(x_D))
        round_to(values_D, x_D, LEVELS_F / most)
        return most / LEVELS_F / root
    spread = float32(1) / np.sqrt(float32(block))
    room = reserve(4 * x_D.shape[0])
    normed_D = floats(room, x_D.shape[0])
    for d in range(x_D.shape[0]):
        normed_D[d] = x_D[d]
    if weight_D.shape[0] > 0:
        weigh(normed_D, weight_D)
    if block > 1:
        hadamard(normed_D, block)
    if shift_D.shape[0] == 0:
        most = at_least_tiny(peak(normed_D) * spread)
        round_to(values_D, normed_D, spread * (LEVELS_F / most))
        scale = most / LEVELS_F / root
    else:
        scale_and_shift(normed_D, normed_D, spread / root, shift_D)
        most = at_least_tiny(peak(normed_D))
        round_to(values_D, normed_D, LEVELS_F / most)
        scale = most / LEVELS_F
    release(room)
    return scale


@over_rows
def norm_quantize_rows(x_TD, eps, weight_D, shift_D, block, values_TD, scale_T):
    for t in prange(x_TD.shape[0]):
        scale_T[t] = norm_quantize_row(x_TD[t], eps, weight_D, shift_D, block, values_TD[t])


@over_rows
def quantize_rows(x_TI, values_TI, scale_T):
    for t in prange(x_TI.shape[0]):
        most = at_least_tiny(peak(x_TI[t]))
        round_to(values_TI[t], x_TI[t], LEVELS_F / most)
        scale_T[t] = most / LEVELS_F


@njit(**PLAIN)
def dequantize(out, acc, row_scale, scale, bias):
    for k in range(out.shape[0]):
        out[k] = float32(acc[k]) * (row_scale * scale[k]) + bias[k]


@njit(**PLAIN)
def add_row(x_D, acc_D, row_scale, scale_D, bias_D):
    for d in range(x_D.shape[0]):
        x_D[d] += float32(acc_D[d]) * (row_scale * scale_D[d]) + bias_D[d]


@over_rows
def add_rows(x_TD, acc_TD, row_scale_T, scale_D, bias_D):
    for t in prange(x_TD.shape[0]):
        add_row(x_TD[t], acc_TD[t], row_scale_T[t], scale_D, bias_D)


@over_rows
def add_norm_quantize_rows(
    x_TD, acc_TD, row_scale_T, scale_D, bias_D, eps, weight_D, shift_D, block, values_TD, scale_T
):
    for t in prange(x_TD.shape[0]):
        add_row(x_TD[t], acc_TD[t], row_scale_T[t], scale_D, bias_D)
        scale_T[t] = norm_quantize_row(x_TD[t], eps, weight_D, shift_D, block, values_TD[t])


@njit(**PLAIN)
def add_scaled(x, y, factor, weight):
    for k in range(x.shape[0]):
        x[k] += y[k] * factor * weight[k]


@over_rows
def add_normed_rows(x_TD, acc_TD, row_scale_T, scale_D, bias_D, weight_D, eps):
    for t in prange(x_TD.shape[0]):
        room = reserve(4 * x_TD.shape[1])
        product_D = floats(room, x_TD.shape[1])
        dequantize(product_D, acc_TD[t], row_scale_T[t], scale_D, bias_D)
        add_scaled(x_TD[t], product_D, float32(1) / root_mean_square(product_D, eps), weight_D)
        release(room)


@njit(**PLAIN)
def gated(out, gate, up, row_scale, gate_scale, up_scale, gate_bias, up_bias, factor, cubic):
    """g * u * sigmoid(factor * (g + cubic g^3)): see `operands.CURVES`."""
    for k in range(out.shape[0]):
        g = float32(gate[k]) * (row_scale * gate_scale[k]) + gate_bias[k]
        u = float32(up[k]) * (row_scale * up_scale[k]) + up_bias[k]
        out[k] = g * u / (float32(1) + exponential(-(factor * (g + cubic * (g * g * g)))))


@njit(**PLAIN)
def gated_quantize_row(acc_F2, row_scale, scale_F2, bias_F2, block, factor, cubic, values_F, hidden_F):
    width = values_F.shape[0]
    gate, up, gate_scale, up_scale = acc_F2[:width], acc_F2[width:], scale_F2[:width], scale_F2[width:]
    gate_bias, up_bias = bias_F2[:width], bias_F2[width:]
    gated(hidden_F, gate, up, row_scale, gate_scale, up_scale, gate_bias, up_bias, factor, cubic)
    hadamard(hidden_F, block)
    spread = float32(1) / np.sqrt(float32(block))
    most = at_least_tiny(peak(hidden_F) * spread)
    round_to(values_F, hidden_F, spread * (LEVELS_F / most))
    return most / LEVELS_F


@over_rows
def gated_quantize_rows(acc_TF2, row_scale_T, scale_F2, bias_F2, block, factor, cubic, values_TF, scale_T):
    for t in prange(acc_TF2.shape[0]):
        room = reserve(4 * values_TF.shape[1])
        hidden_F, row = floats(room, values_TF.shape[1]), values_TF[t]
        scale_T[t] = gated_quantize_row(
            acc_TF2[t], row_scale_T[t], scale_F2, bias_F2, block, factor, cubic, row, hidden_F
        )
        release(room)
