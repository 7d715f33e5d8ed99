# mypy: ignore-errors
"""Packed causal attention (online softmax, arXiv 2205.14135) over paths of token ranges.

A tile is some queries of one segment. Its keys are positions 0 .. end of a path: the ranges of its ancestors, then its
own. The row of a tile in `tables`, int32:

    0 first query row   1 queries   2 position of the first query on its path   3 unused
    4 + 2 d             position where range d of the path begins
    5 + 2 d             token of a position p in range d, minus p

Keys come in blocks of KEYS positions, counted along the path. So the sums of a query are the same whether its prompt is
shared or not, and whatever else is in the pack. Softmax in float32. E head width, H query heads, J key/value heads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lightrm.kernels.cuda.triton_products import dot
from lightrm.kernels.cuda.triton_rows import LEVELS_F, TINY_F, to_int8

HEADER = tl.constexpr(4)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def token_at(table, position, DEPTH: tl.constexpr):
    token = position + tl.load(table + HEADER + 1)
    for d in tl.static_range(1, DEPTH):
        begins, shift = tl.load(table + HEADER + 2 * d), tl.load(table + HEADER + 1 + 2 * d)
        token = tl.where(position >= begins, position + shift, token)
    return token


@triton.jit
def hyperbolic_tangent(x):
    """Near 0 by its continued fraction, x / (1 + x^2 / (3 + x^2 / (5 + ...))); elsewhere 1 - 2 / (e^2x + 1)."""
    s = x * x
    near = x * (945 + s * (105 + s)) / (945 + s * (420 + 15 * s))
    far = 1 - 2 / (tl.exp2(x * (2 * LOG2_E)) + 1)
    return tl.where(s < 0.25, near, far)


@triton.jit
def attend(
    q, sums, most, total, key, value, table, start, end, at, slope, cap, window, key_stride, value_stride, width,
    scale, SLOPED: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr,
    DEPTH: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Process one block of keys: compute scores, then update the running maximum, total and sums."""
    position = start + tl.arange(0, KEYS)
    e = tl.arange(0, WIDTH)
    if MASKED:  # positions past the end read the first token and count for nothing
        token = token_at(table, tl.where(position < end, position, 0), DEPTH).to(tl.int64)
    else:
        token = token_at(table, position, DEPTH).to(tl.int64)
    k = tl.load(key + token[None, :] * key_stride + e[:, None], mask=(e < width)[:, None], other=0)
    score = dot(q, k, tl.zeros((q.shape[0], KEYS), tl.float32), PRECISION) * scale
    if CAPPED:
        score = cap * hyperbolic_tangent(score / cap) + (score - score)  # NaN and Inf become NaN
    if SLOPED:
        ahead = position.to(tl.float32)[None, :] - at.to(tl.float32)[:, None]
        score = tl.fma(ahead, slope, score)
    if MASKED:
        score = tl.where(position[None, :] <= at[:, None], score, float("-inf"))
    if WINDOWED:
        score = tl.where(at[:, None] - position[None, :] < window, score, float("-inf"))
    above = tl.maximum(most, tl.max(score, 1))
    finite = tl.where(above == float("-inf"), 0.0, above) if WINDOWED else above  # no key of this query yet
    weight = tl.exp2((score - finite[:, None]) * LOG2_E)  # scaled after the difference: that keeps far keys exact
    shrink = tl.exp2((most - finite) * LOG2_E)
    v = tl.load(value + token[:, None] * value_stride + e[None, :], mask=(e < width)[None, :], other=0)
    sums = dot(weight.to(v.dtype), v, sums * shrink[:, None], PRECISION)
    return sums, above, total * shrink + tl.sum(weight, 1)


@triton.jit
def attention_tile(
    query,
    key,
    value,
    out,
    tables,
    slopes,
    values,
    value_scale,
    arrived,
    scale,
    cap,
    window,
    width,
    table_width,
    query_stride,
    key_stride,
    value_stride,
    SHARED_BY: tl.constexpr,
    SLOPED: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    QUANTIZED: tl.constexpr,
    DEPTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (tiles, H). SHARED_BY query heads read one key/value head. scale, cap and window: see `operands.ScoreRule`.

    QUANTIZED: the program that finishes a tile's last head rounds the complete rows of `out` to int8 `values` with
    `value_scale`. arrived: int32 zeros (tiles,), counts finished heads.
    """
    tile, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    table = tables + tile.to(tl.int64) * table_width
    first, queries, begins = tl.load(table), tl.load(table + 1), tl.load(table + 2)
    i, e = tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    row, here = (first + i).to(tl.int64), i < queries
    at = begins + i
    q_mask = here[:, None] & (e < width)[None, :]
    q = tl.load(query + row[:, None] * query_stride + head * width + e[None, :], mask=q_mask, other=0)
    slope = tl.load(slopes + head) if SLOPED else 0.0
    key += head // SHARED_BY * width
    value += head // SHARED_BY * width
    sums = tl.zeros((QUERIES, WIDTH), tl.float32)
    most = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    end = begins + queries
    seen_by_all = begins // KEYS * KEYS
    first_block = tl.maximum(begins - window + 1, 0) // KEYS * KEYS if WINDOWED else 0
    for start in range(first_block, seen_by_all, KEYS):
        sums, most, total = attend(
            q, sums, most, total, key, value, table, start, end, at, slope, cap, window, key_stride, value_stride,
            width, scale, SLOPED, CAPPED, WINDOWED, False, DEPTH, KEYS, WIDTH, PRECISION,
        )  # fmt: skip
    for start in range(seen_by_all, end, KEYS):
        sums, most, total = attend(
            q, sums, most, total, key, value, table, start, end, at, slope, cap, window, key_stride, value_stride,
            width, scale, SLOPED, CAPPED, WINDOWED, True, DEPTH, KEYS, WIDTH, PRECISION,
        )  # fmt: skip
    stride = heads * width
    out_at = out + row[:, None] * stride + head * width + e[None, :]
    tl.store(out_at, (sums / total[:, None]).to(out.dtype.element_ty), mask=q_mask)
    if QUANTIZED:
        tl.debug_barrier()  # every thread has stored its part before the tile is counted
        if tl.atomic_add(arrived + tile, 1, sem="acq_rel") == heads - 1:
            quantize_tile(out, values, value_scale, row, here, stride, WIDTH)


@triton.jit
def quantize_tile(out, values, value_scale, row, here, stride, STEP: tl.constexpr):
    """Round the tile's rows to int8, as in `schemes.int8`. Other multiprocessors wrote them, so this one's cache is
    bypassed."""
    e = tl.arange(0, STEP)
    at = row[:, None] * stride + e[None, :]
    bits = tl.zeros((row.shape[0],), tl.int32)
    for start in range(0, stride, STEP):
        mask = here[:, None] & (start + e < stride)[None, :]
        x = tl.load(out + at + start, mask=mask, other=0, cache_modifier=".cg").to(tl.float32)
        bits = tl.maximum(bits, tl.max(tl.abs(x).to(tl.int32, bitcast=True), 1))
    peak = bits.to(tl.float32, bitcast=True)
    peak = tl.where(peak < TINY_F, TINY_F, peak)
    for start in range(0, stride, STEP):
        mask = here[:, None] & (start + e < stride)[None, :]
        x = tl.load(out + at + start, mask=mask, other=0, cache_modifier=".cg").to(tl.float32)
        tl.store(values + at + start, to_int8(x, tl.div_rn(LEVELS_F, peak)[:, None]), mask=mask)
    tl.store(value_scale + row, tl.div_rn(peak, LEVELS_F), mask=here)
