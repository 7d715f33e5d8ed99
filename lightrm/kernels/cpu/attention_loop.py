# mypy: ignore-errors
"""Packed causal attention on a CPU in float32 (online softmax, arXiv 2205.14135), compiled by numba. Fast version of
`reference.attention`, with the same tables as Triton's (`kernels.paths`).

A task is one head of a tile of queries of one segment. Scores are stored with keys as rows and queries as SIMD lanes:
softmax runs down the rows with one query per lane, and nothing is summed across lanes. Keys come in blocks of KEYS
positions, counted along the path; blocks that lie before the window of a whole tile are left out, and a hidden key adds
nothing. So a query's result is the same, bit for bit, whether its prompt is shared or not, and whatever else is in the
pack.

E head width, H query heads, J key/value heads, T tokens, Q queries of a tile.
"""

from __future__ import annotations

import numpy as np
from numba import float32, njit, prange

from lightrm.kernels.cpu.row_loops import PLAIN, exponential, over_rows
from lightrm.kernels.cpu.scratch import float_rows, release, reserve
from lightrm.kernels.cpu.simd import BYTES, LANES, ROWS, VECTOR, tile
from lightrm.kernels.paths import HEADER

QUERIES, KEYS = 128, 64  # of a tile, of a block: in whole LANES and ROWS
NEAR = np.float32(0.25)  # x^2 up to which the continued fraction is exact to float32
INNER = {
    name: option for name, option in PLAIN.items() if name != "cache"
}  # numba keeps it with the loop that calls it
MASKED = np.finfo(np.float32).min  # not -inf: a score that overflowed is no hidden one, and shall show


@njit(**PLAIN)
def raise_maxima(score_KQ, total_Q, most_Q, shrink_Q, keys):
    """Update the running maximum, and the total with it. shrink: what earlier sums must be multiplied by."""
    used = most_Q.shape[0]
    for i in range(used):
        shrink_Q[i] = most_Q[i]
    for k in range(keys):
        row = score_KQ[k]
        for i in range(used):
            most_Q[i] = max(most_Q[i], row[i])
    for i in range(used):
        shrink_Q[i] = exponential(shrink_Q[i] - most_Q[i])
        total_Q[i] *= shrink_Q[i]


@njit(**PLAIN)
def online_softmax(score_KQ, total_Q, most_Q, shrink_Q, keys):
    """Turn scores into weights and update the running maximum and total."""
    raise_maxima(score_KQ, total_Q, most_Q, shrink_Q, keys)
    for k in range(keys):
        row = score_KQ[k]
        for i in range(most_Q.shape[0]):
            x = row[i]
            weight = exponential(x - most_Q[i]) + (x - x)  # NaN and Inf become NaN, numbers stay
            row[i] = float32(0) if x == MASKED else weight
            total_Q[i] += row[i]


@njit(**PLAIN)
def shrink(out_QE, shrink_Q):
    for i in range(shrink_Q.shape[0]):
        row, factor = out_QE[i], shrink_Q[i]
        if factor != 1:
            for e in range(row.shape[0]):
                row[e] *= factor


@njit(**PLAIN)
def add_alibi(score_KQ, slope, ahead, keys):
    """Add ALiBi: slope * (key position - query position). ahead: that difference for the first key and query."""
    for k in range(keys):
        row = score_KQ[k]
        for i in range(row.shape[0]):
            row[i] += slope * float32(ahead + k - i)


@njit(**PLAIN)
def mask_future(score_KQ, ahead, keys):
    for k in range(keys):
        row = score_KQ[k]
        for i in range(min(ahead + k, row.shape[0])):
            row[i] = MASKED


@njit(**PLAIN)
def mask_past(score_KQ, ahead, keys, window):
    """Hide the keys that lie `window` or more positions before a query."""
    for k in range(keys):
        row = score_KQ[k]
        for i in range(max(ahead + k + window, 0), row.shape[0]):
            row[i] = MASKED


@njit(**PLAIN)
def hyperbolic_tangent(x):
    """Near 0 by its continued fraction, x / (1 + x^2 / (3 + x^2 / (5 + ...))); elsewhere 1 - 2 / (e^2x + 1)."""
    s = x * x
    near = x * (float32(945) + s * (float32(105) + s)) / (float32(945) + s * (float32(420) + float32(15) * s))
    far = float32(1) - float32(2) / (exponential(float32(2) * x) + float32(1))
    return near if s < NEAR else far


@njit(**PLAIN)
def cap_scores(score_KQ, cap, keys):
    for k in range(keys):
        row = score_KQ[k]
        for i in range(row.shape[0]):
            row[i] = cap * hyperbolic_tangent(row[i] / cap) + (row[i] - row[i])  # NaN and Inf become NaN


@njit(**PLAIN)
def apply_rule(score_KQ, start, stop, begins, end, cap, window, slope):
    """Cap the scores of keys start .. stop and queries begins .. end, add ALiBi, and hide what a query does not see."""
    keys = stop - start
    if cap != 0:
        cap_scores(score_KQ, cap, keys)
    if slope != 0:
        add_alibi(score_KQ, slope, start - begins, keys)
    if stop > begins + 1:
        mask_future(score_KQ, start - begins, keys)
    if end - start > window:
        mask_past(score_KQ, start - begins, keys, window)


@njit(**PLAIN)
def gather(x_TE, table, start, stop, block_KE):
    """Copy the rows of positions start .. stop of a path, range by range."""
    depth, width = (table.shape[0] - HEADER) // 2, x_TE.shape[1]
    for d in range(depth):
        begins, shift = table[HEADER + 2 * d], table[HEADER + 2 * d + 1]
        ends = table[HEADER + 2 * d + 2] if d + 1 < depth else stop
        for position in range(max(begins, start), min(ends, stop)):
            for e in range(width):
                block_KE[position - start, e] = x_TE[position + shift, e]


def products(words):
    """Return the two products of attention, in whole tiles, of floats or of pairs of bfloat16 (`simd.tile`)."""
    wide, narrow = tile(ROWS, LANES, onto=False, words=words), tile(ROWS, VECTOR, onto=False, words=words)
    onto = tile(ROWS, LANES, onto=True, words=words)

    @njit(**INNER)
    def score(key_KE, query_EQ, score_KQ, keys):
        """score (keys, Q) = key @ query. Rows beyond `keys` are computed too and never read."""
        key, query, out = key_KE.ctypes.data, query_EQ.ctypes.data, score_KQ.ctypes.data
        row, (width, used) = key_KE.shape[1], query_EQ.shape
        whole = used - used % LANES
        for i in range(0, whole, LANES):
            for k in range(0, keys, ROWS):
                a, b, c = key + BYTES * k * row, query + BYTES * i, out + BYTES * (k * used + i)
                wide(a, b, c, row, 1, used, used, width)
        for i in range(whole, used, VECTOR):
            for k in range(0, keys, ROWS):
                a, b, c = key + BYTES * k * row, query + BYTES * i, out + BYTES * (k * used + i)
                narrow(a, b, c, row, 1, used, used, width)

    @njit(**INNER)
    def mix(weight_KQ, value_KE, out_QE, keys):
        """out (Q, E) += weight.T @ value. E is a multiple of LANES."""
        weight, value, out = weight_KQ.ctypes.data, value_KE.ctypes.data, out_QE.ctypes.data
        used, width = out_QE.shape
        for e in range(0, width, LANES):
            for i in range(0, used, ROWS):
                a, c = weight + BYTES * i, out + BYTES * (i * width + e)
                onto(a, value + BYTES * e, c, 1, used, width, width, keys)

    return score, mix


score, mix = products("float32")


@njit(**PLAIN)
def clear(x):
    for k in range(x.shape[0]):
        for i in range(x.shape[1]):
            x[k, i] = 0


@njit(**PLAIN)
def attend(query, key_TE, value_TE, table, head, scale, cap, window, slope, out):
    row, count, begins, width = table[0], table[1], table[2], query.shape[2]
    used, end = -(-count // VECTOR) * VECTOR, begins + count
    padded = -(-width // LANES) * LANES
    room = reserve(4 * (used * (width + padded + KEYS + 3) + KEYS * padded))
    query_EQ = float_rows(room, width, used)
    out_QE = float_rows(room + 4 * used * width, used, padded)
    score_KQ = float_rows(room + 4 * used * (width + padded), KEYS, used)
    sums_3Q = float_rows(room + 4 * used * (width + padded + KEYS), 3, used)
    block_KE = float_rows(room + 4 * used * (width + padded + KEYS + 3), KEYS, padded)
    for x in (query_EQ, out_QE, score_KQ, sums_3Q, block_KE):
        clear(x)
    total_Q, most_Q, shrink_Q = sums_3Q[0], sums_3Q[1], sums_3Q[2]
    for i in range(used):
        most_Q[i] = MASKED
    for i in range(count):
        for e in range(width):
            query_EQ[e, i] = query[row + i, head, e] * scale
    for start in range(max(begins - window + 1, 0) // KEYS * KEYS, end, KEYS):
        stop = min(start + KEYS, end)
        keys = stop - start
        gather(key_TE, table, start, stop, block_KE)
        score(block_KE, query_EQ, score_KQ, keys)
        apply_rule(score_KQ, start, stop, begins, end, cap, window, slope)
        online_softmax(score_KQ, total_Q, most_Q, shrink_Q, keys)
        shrink(out_QE, shrink_Q)
        gather(value_TE, table, start, stop, block_KE)
        mix(score_KQ, block_KE, out_QE, keys)
    for i in range(count):
        for e in range(width):
            out[row + i, head, e] = out_QE[i, e] / total_Q[i]
    release(room)


@over_rows
def attention_rows(query_THE, key_JTE, value_JTE, tables, scale, cap, window, slopes_H, out_THE):
    heads, tiles = query_THE.shape[1], tables.shape[0]
    for task in prange(heads * tiles):  # a thread takes whole heads: tiles late in a sequence cost more
        head = task // tiles
        j = head * key_JTE.shape[0] // heads
        table = tables[task % tiles]
        attend(query_THE, key_JTE[j], value_JTE[j], table, head, scale, cap, window, slopes_H[head], out_THE)
