# mypy: ignore-errors
"""Packed causal attention on a CPU that multiplies pairs of bfloat16, compiled by numba.

As `attention_loop`, with both products in bfloat16 and their sums in float32: query (scaled), key, value and the
weights of the softmax are rounded to bfloat16, everything else is float32. Two neighbours of a product's depth lie in
one word: two channels of a query or key, two positions of a value or weight.

E head width, in pairs; H query heads, J key/value heads, T tokens, Q queries of a tile.
"""

from __future__ import annotations

from numba import float32, njit, prange, uint32

from lightrm.kernels.cpu.attention_loop import KEYS, MASKED, apply_rule, clear, gather, products, raise_maxima, shrink
from lightrm.kernels.cpu.head_loops import SIXTEEN, halved
from lightrm.kernels.cpu.row_loops import PLAIN, exponential, over_rows
from lightrm.kernels.cpu.scratch import float_rows, release, reserve, word_rows
from lightrm.kernels.cpu.simd import LANES, VECTOR
from lightrm.kernels.paths import HEADER

score, mix = products("bfloat16")


@njit(**PLAIN)
def paired(low, high):
    """Two floats, rounded to bfloat16, in one word."""
    return uint32(halved(low)) | uint32(uint32(halved(high)) << SIXTEEN)


@njit(**PLAIN)
def online_softmax(score_KQ, weight_PQ, total_Q, most_Q, shrink_Q, keys):
    """As `attention_loop.online_softmax`; the weights go to weight_PQ, two keys in a word."""
    raise_maxima(score_KQ, total_Q, most_Q, shrink_Q, keys)
    used = most_Q.shape[0]
    if keys % 2 == 1:
        score_KQ[keys, :used] = MASKED
    for p in range((keys + 1) // 2):
        first, second, words = score_KQ[2 * p], score_KQ[2 * p + 1], weight_PQ[p]
        for i in range(used):
            x, y = first[i], second[i]
            low = exponential(x - most_Q[i]) + (x - x)  # NaN and Inf become NaN, numbers stay
            high = exponential(y - most_Q[i]) + (y - y)
            low = float32(0) if x == MASKED else low
            high = float32(0) if y == MASKED else high
            words[i] = paired(low, high)
            total_Q[i] += low + high


@njit(**PLAIN)
def gather_values(value_TE, table, start, stop, block_PE):
    """As `gather`, with two positions in a word; the second of the last word may be missing, and is 0."""
    depth, width = (table.shape[0] - HEADER) // 2, value_TE.shape[1]
    for d in range(depth):
        begins, shift = table[HEADER + 2 * d], table[HEADER + 2 * d + 1]
        ends = table[HEADER + 2 * d + 2] if d + 1 < depth else stop
        for position in range(max(begins, start), min(ends, stop)):
            row, words = value_TE[position + shift], block_PE[(position - start) // 2]
            if (position - start) % 2 == 0:
                for e in range(width):
                    words[e] = uint32(row[e])
            else:
                for e in range(width):
                    words[e] |= uint32(uint32(row[e]) << SIXTEEN)


@njit(**PLAIN)
def attend(query, key_TW, value_TE, table, head, scale, cap, window, slope, out):
    row, count, begins, width = table[0], table[1], table[2], query.shape[2]
    used, end = -(-count // VECTOR) * VECTOR, begins + count
    padded = -(-width // LANES) * LANES
    words, pairs = width // 2, KEYS // 2
    room = reserve(4 * (used * (words + padded + KEYS + pairs + 3) + KEYS * words + pairs * padded))
    query_WQ = word_rows(room, words, used)
    out_QE = float_rows(room + 4 * used * words, used, padded)
    score_KQ = float_rows(room + 4 * used * (words + padded), KEYS, used)
    weight_PQ = word_rows(room + 4 * used * (words + padded + KEYS), pairs, used)
    sums_3Q = float_rows(room + 4 * used * (words + padded + KEYS + pairs), 3, used)
    block_KW = word_rows(room + 4 * used * (words + padded + KEYS + pairs + 3), KEYS, words)
    block_PE = word_rows(room + 4 * (used * (words + padded + KEYS + pairs + 3) + KEYS * words), pairs, padded)
    for x in (query_WQ, weight_PQ, block_KW, block_PE):
        clear(x)
    for x in (out_QE, score_KQ, sums_3Q):
        clear(x)
    total_Q, most_Q, shrink_Q = sums_3Q[0], sums_3Q[1], sums_3Q[2]
    for i in range(used):
        most_Q[i] = MASKED
    for i in range(count):
        for e in range(words):
            query_WQ[e, i] = paired(query[row + i, head, 2 * e] * scale, query[row + i, head, 2 * e + 1] * scale)
    for start in range(max(begins - window + 1, 0) // KEYS * KEYS, end, KEYS):
        stop = min(start + KEYS, end)
        keys = stop - start
        gather(key_TW, table, start, stop, block_KW)
        score(block_KW, query_WQ, score_KQ, keys)
        apply_rule(score_KQ, start, stop, begins, end, cap, window, slope)
        online_softmax(score_KQ, weight_PQ, total_Q, most_Q, shrink_Q, keys)
        shrink(out_QE, shrink_Q)
        gather_values(value_TE, table, start, stop, block_PE)
        mix(weight_PQ, block_PE, out_QE, (keys + 1) // 2)
    for i in range(count):
        for e in range(width):
            out[row + i, head, e] = out_QE[i, e] / total_Q[i]
    release(room)


@over_rows
def attention_rows(query_THE, key_JTW, value_JTE, tables, scale, cap, window, slopes_H, out_THE):
    heads, tiles = query_THE.shape[1], tables.shape[0]
    for task in prange(heads * tiles):  # a thread takes whole heads: tiles late in a sequence cost more
        head = task // tiles
        j = head * key_JTW.shape[0] // heads
        table = tables[task % tiles]
        attend(query_THE, key_JTW[j], value_JTE[j], table, head, scale, cap, window, slopes_H[head], out_THE)
