# mypy: ignore-errors
"""Packed causal attention on a CPU in float32 (online softmax, arXiv 2205.14135), compiled by numba: twin of
`reference.attention`, over the same tables as Triton's (`kernels.paths`).

A task is a tile of queries of one segment, and a head. Scores lie with keys as rows and queries as lanes, so the
softmax goes down the rows, a query in a lane, and nothing is summed across lanes. Keys are read where they are, range
by range of the path, in blocks of KEYS positions counted along the path: a query's result is the same to the last bit
whether its prompt is shared or not, and whoever its neighbours are.

E head width, H query heads, J key/value heads, T tokens, Q queries of a tile.
"""

from __future__ import annotations

import numpy as np
from numba import float32, njit, prange

from lightrm.kernels.paths import HEADER
from lightrm.kernels.rows import PARALLEL, PLAIN, exponential
from lightrm.kernels.simd import BYTES, ROWS, tile

QUERIES, KEYS, LANES = 64, 64, 16
NEVER = np.float32(-np.inf)


@njit(**PLAIN)
def soften(score_KQ, total_Q, most_Q, shrink_Q, keys):
    """Scores become weights; the running maximum and total follow, `shrink` is what earlier sums are multiplied by."""
    lanes = most_Q.shape[0]
    for i in range(lanes):
        shrink_Q[i] = most_Q[i]
    for k in range(keys):
        for i in range(lanes):
            most_Q[i] = max(most_Q[i], score_KQ[k, i])
    for i in range(lanes):
        shrink_Q[i] = exponential(shrink_Q[i] - most_Q[i])
        total_Q[i] *= shrink_Q[i]
    for k in range(keys):
        for i in range(lanes):
            x = score_KQ[k, i]
            weight = exponential(x - most_Q[i]) + (x - x)  # NaN and Inf become NaN, numbers stay
            score_KQ[k, i] = float32(0) if x == NEVER else weight
            total_Q[i] += score_KQ[k, i]


@njit(**PLAIN)
def lean(score_KQ, slope, ahead, keys):
    """ALiBi: slope * (key position - query position); `ahead` is that difference for the first key and query."""
    for k in range(keys):
        for i in range(score_KQ.shape[1]):
            score_KQ[k, i] += slope * float32(ahead + k - i)


@njit(**PLAIN)
def hide_future(score_KQ, ahead, keys):
    for k in range(keys):
        for i in range(score_KQ.shape[1]):
            score_KQ[k, i] = score_KQ[k, i] if ahead + k <= i else NEVER


@njit(**PLAIN)
def range_of(table, d, depth, start, stop):
    """The part of a path's range d that lies in positions start..stop; nothing if first >= last."""
    begins = table[HEADER + 2 * d]
    ends = table[HEADER + 2 * d + 2] if d + 1 < depth else stop
    return max(begins, start), min(ends, stop)


SCORE_MANY, SCORE_ONE = (tile(rows, LANES, onto=False) for rows in (ROWS, 1))
MIX_MANY, MIX_ONE = (tile(rows, LANES, onto=True) for rows in (ROWS, 1))
MIX_MANY_NARROW, MIX_ONE_NARROW = (tile(rows, 1, onto=True) for rows in (ROWS, 1))


@njit(**PLAIN)
def score(key, key_row, query_EQ, score_KQ, keys, used):
    """score (keys, used) = key (keys, E), from its address, @ query (E, used); used in whole LANES."""
    q, s, width = query_EQ.ctypes.data, score_KQ.ctypes.data, query_EQ.shape[0]
    for i in range(0, used, LANES):
        k = 0
        while k < keys:
            a, c = key + BYTES * k * key_row, s + BYTES * (k * QUERIES + i)
            if k + ROWS <= keys:
                SCORE_MANY(a, q + BYTES * i, c, key_row, 1, QUERIES, QUERIES, width)
                k += ROWS
            else:
                SCORE_ONE(a, q + BYTES * i, c, key_row, 1, QUERIES, QUERIES, width)
                k += 1


@njit(**PLAIN)
def mix(weight_KQ, value, value_row, out_QE, keys, used):
    """out (used, E) += weight.T (used, keys) @ value (keys, E), from its address."""
    w, o, width = weight_KQ.ctypes.data, out_QE.ctypes.data, out_QE.shape[1]
    e = 0
    while e < width:
        wide = e + LANES <= width
        i = 0
        while i < used:
            a, b, c = w + BYTES * i, value + BYTES * e, o + BYTES * (i * width + e)
            many = i + ROWS <= used
            if many and wide:
                MIX_MANY(a, b, c, 1, QUERIES, value_row, width, keys)
            elif many:
                MIX_MANY_NARROW(a, b, c, 1, QUERIES, value_row, width, keys)
            elif wide:
                MIX_ONE(a, b, c, 1, QUERIES, value_row, width, keys)
            else:
                MIX_ONE_NARROW(a, b, c, 1, QUERIES, value_row, width, keys)
            i += ROWS if many else 1
        e += LANES if wide else 1


@njit(**PLAIN)
def weigh(key, key_row, table, start, stop, query_EQ, score_KQ, slope, state):
    """Weights of a block of keys; state: total, most and shrink of each query."""
    used, begins, depth = state.shape[1], table[2], (table.shape[0] - HEADER) // 2
    for d in range(depth):
        first, last = range_of(table, d, depth, start, stop)
        if first < last:
            at = key + BYTES * (first + table[HEADER + 1 + 2 * d]) * key_row
            score(at, key_row, query_EQ, score_KQ[first - start :], last - first, used)
    if slope != 0:
        lean(score_KQ[:, :used], slope, start - begins, stop - start)
    if stop > begins + 1:
        hide_future(score_KQ[:, :used], start - begins, stop - start)
    soften(score_KQ[:, :used], state[0], state[1], state[2], stop - start)


@njit(**PLAIN)
def gather(value, value_row, table, start, stop, weight_KQ, shrink_Q, out_QE):
    """What the block's values add to the sums."""
    count, depth = table[1], (table.shape[0] - HEADER) // 2
    for i in range(count):
        for e in range(out_QE.shape[1]):
            out_QE[i, e] *= shrink_Q[i]
    for d in range(depth):
        first, last = range_of(table, d, depth, start, stop)
        if first < last:
            at = value + BYTES * (first + table[HEADER + 1 + 2 * d]) * value_row
            mix(weight_KQ[first - start :], at, value_row, out_QE, last - first, count)


@njit(**PLAIN)
def attend(query, key, value, table, head, shared_by, scale, slope, out):
    row, count, end, width = table[0], table[1], table[2] + table[1], query.shape[2]
    query_EQ = np.zeros((width, QUERIES), np.float32)
    for i in range(count):
        for e in range(width):
            query_EQ[e, i] = query[row + i, head, e] * scale
    score_KQ, out_QE = np.zeros((KEYS, QUERIES), np.float32), np.zeros((QUERIES, width), np.float32)
    state = np.zeros((3, -(-count // LANES) * LANES), np.float32)
    state[1] = NEVER
    key_row, value_row = key.strides[0] // BYTES, value.strides[0] // BYTES
    key_at = key.ctypes.data + head // shared_by * key.strides[1]
    value_at = value.ctypes.data + head // shared_by * value.strides[1]
    for start in range(0, end, KEYS):
        stop = min(start + KEYS, end)
        weigh(key_at, key_row, table, start, stop, query_EQ, score_KQ, slope, state)
        gather(value_at, value_row, table, start, stop, score_KQ, state[2], out_QE)
    for i in range(count):
        for e in range(width):
            out[row + i, head, e] = out_QE[i, e] / state[0, i]


@njit(**PARALLEL)
def attention_rows(query, key, value, tables, scale, slopes_H, out):
    heads, tiles = query.shape[1], tables.shape[0]
    for task in prange(heads * tiles):  # a thread takes whole heads: tiles late in a sequence cost more
        head = task // tiles
        attend(query, key, value, tables[task % tiles], head, heads // key.shape[1], scale, slopes_H[head], out)
