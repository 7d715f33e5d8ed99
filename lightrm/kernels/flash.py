# mypy: ignore-errors
"""Packed causal attention on a CPU in float32 (online softmax, arXiv 2205.14135), compiled by numba: twin of
`reference.attention`, over the same tables as Triton's (`kernels.paths`).

A task is a tile of queries of one segment, and a head. Scores lie with keys as rows and queries as lanes, so the
softmax goes down the rows, a query in a lane, and nothing is summed across lanes. Keys come in blocks of KEYS
positions, counted along the path: a query's result is the same to the last bit whether its prompt is shared or not,
and whoever its neighbours are.

E head width, H query heads, J key/value heads, T tokens, Q queries of a tile.
"""

from __future__ import annotations

import numpy as np
from numba import float32, njit, prange

from lightrm.kernels.paths import HEADER
from lightrm.kernels.rows import PARALLEL, PLAIN, exponential
from lightrm.kernels.simd import BYTES, ROWS, tile

QUERIES, KEYS, LANES = 64, 64, 16  # of a tile, a block, a vector: in whole ROWS all of them
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
def shrink(out_QE, shrink_Q):
    for i in range(shrink_Q.shape[0]):
        row, factor = out_QE[i], shrink_Q[i]
        if factor != 1:
            for e in range(row.shape[0]):
                row[e] *= factor


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


SCORE, MIX, MIX_NARROW = tile(ROWS, LANES, onto=False), tile(ROWS, LANES, onto=True), tile(ROWS, 1, onto=True)


@njit(**PLAIN)
def fetch(x_TJE, head, table, start, stop, block_KE):
    """Rows of positions start..stop of a path, range by range. Where they lie, each takes the same few lines of a
    cache, for a token's heads are a power of two apart: the block's rows are not."""
    depth, width = (table.shape[0] - HEADER) // 2, x_TJE.shape[2]
    for d in range(depth):
        begins, shift = table[HEADER + 2 * d], table[HEADER + 2 * d + 1]
        ends = table[HEADER + 2 * d + 2] if d + 1 < depth else stop
        for position in range(max(begins, start), min(ends, stop)):
            for e in range(width):
                block_KE[position - start, e] = x_TJE[position + shift, head, e]


@njit(**PLAIN)
def score(key_KE, query_EQ, score_KQ, keys, used):
    """score (keys, used) = key @ query, in whole tiles: what lies beyond keys is computed too, and nobody reads it."""
    key, query, out = key_KE.ctypes.data, query_EQ.ctypes.data, score_KQ.ctypes.data
    row, width = key_KE.shape[1], query_EQ.shape[0]
    for i in range(0, used, LANES):
        for k in range(0, keys, ROWS):
            a, b, c = key + BYTES * k * row, query + BYTES * i, out + BYTES * (k * QUERIES + i)
            SCORE(a, b, c, row, 1, QUERIES, QUERIES, width)


@njit(**PLAIN)
def mix(weight_KQ, value_KE, out_QE, keys, used):
    """out (used, E) += weight.T @ value."""
    weight, value, out = weight_KQ.ctypes.data, value_KE.ctypes.data, out_QE.ctypes.data
    row, width = value_KE.shape[1], out_QE.shape[1]
    whole = width - width % LANES
    for i in range(0, used, ROWS):
        a, c = weight + BYTES * i, out + BYTES * i * width
        for e in range(0, whole, LANES):
            MIX(a, value + BYTES * e, c + BYTES * e, 1, QUERIES, row, width, keys)
        for e in range(whole, width):
            MIX_NARROW(a, value + BYTES * e, c + BYTES * e, 1, QUERIES, row, width, keys)


@njit(**PLAIN)
def attend(query, key, value, table, head, shared_by, scale, slope, out):
    row, count, begins, width = table[0], table[1], table[2], query.shape[2]
    used, end = -(-count // LANES) * LANES, begins + count
    query_EQ = np.zeros((width, QUERIES), np.float32)
    for i in range(count):
        for e in range(width):
            query_EQ[e, i] = query[row + i, head, e] * scale
    block_KE, score_KQ = np.zeros((KEYS, width + LANES), np.float32), np.zeros((KEYS, QUERIES), np.float32)
    total_Q, most_Q, shrink_Q = np.zeros(used, np.float32), np.full(used, NEVER), np.zeros(used, np.float32)
    out_QE = np.zeros((QUERIES, width), np.float32)
    for start in range(0, end, KEYS):
        stop = min(start + KEYS, end)
        keys = stop - start
        fetch(key, head // shared_by, table, start, stop, block_KE)
        score(block_KE, query_EQ, score_KQ, keys, used)
        if slope != 0:
            lean(score_KQ[:, :used], slope, start - begins, keys)
        if stop > begins + 1:
            hide_future(score_KQ[:, :used], start - begins, keys)
        soften(score_KQ[:, :used], total_Q, most_Q, shrink_Q, keys)
        shrink(out_QE, shrink_Q)
        fetch(value, head // shared_by, table, start, stop, block_KE)
        mix(score_KQ, block_KE, out_QE, keys, used)
    for i in range(count):
        for e in range(width):
            out[row + i, head, e] = out_QE[i, e] / total_Q[i]


@njit(**PARALLEL)
def attention_rows(query, key, value, tables, scale, slopes_H, out):
    heads, tiles = query.shape[1], tables.shape[0]
    for task in prange(heads * tiles):  # a thread takes whole heads: tiles late in a sequence cost more
        head = task // tiles
        attend(query, key, value, tables[task % tiles], head, heads // key.shape[1], scale, slopes_H[head], out)
