# mypy: ignore-errors
"""The passes between products, most of them one program per row, each reading and writing the row once.

A row that a product left as int32 sums (SCALED) stands for `sums * row_scale * scale + bias`; a row of floats stands
for itself. Results are int8 rows with a scale (`schemes.int8`) or floats. The slow versions are in `kernels.integer`
and `kernels.reference`. T tokens, D width, F feed-forward width, E head width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lightrm.schemes.int8 import LEVELS, TINY

LEVELS_F, TINY_F = tl.constexpr(float(LEVELS)), tl.constexpr(TINY)
ROUNDER = tl.constexpr(1.5 * 2**23)  # adding and taking away rounds to a whole number, half to even


@triton.jit
def peak_of(x):
    """Return the largest magnitude, at least TINY. Compares the bits as integers, in which NaN is larger than every
    number."""
    bits = tl.abs(x).to(tl.int32, bitcast=True)
    peak = tl.max(tl.ravel(bits), 0).to(tl.float32, bitcast=True)
    return tl.where(peak < TINY_F, TINY_F, peak)


@triton.jit
def to_int8(x, factor):
    return ((x * factor + ROUNDER) - ROUNDER).to(tl.int8)


@triton.jit
def butterflies(x, STEP: tl.constexpr):
    """One level of the fast Hadamard transform along the rows: a and b, STEP rows apart, become a + b and a - b."""
    rows: tl.constexpr = x.shape[0]
    width: tl.constexpr = x.shape[1]
    pairs = tl.permute(tl.reshape(x, (rows // (2 * STEP), 2, STEP * width)), (0, 2, 1))
    a, b = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (rows, width))


@triton.jit
def norm_row(
    x,
    product,
    row_scale,
    scale,
    bias,
    weight,
    rows,
    shift,
    out,
    out_scale,
    eps,
    spread,
    D,
    x_stride,
    product_stride,
    ADDED: tl.constexpr,
    SCALED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    NORMED: tl.constexpr,
    QUANTIZED: tl.constexpr,
    GATHERED: tl.constexpr,
    SHIFTED: tl.constexpr,
    LEVEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x += product if ADDED, then RMSNorm if NORMED, then the Hadamard transform in blocks of 2^LEVEL, then int8 or
    float. GATHERED: reads row rows[t] of x. WEIGHTED: the norm has a weight; a float result with one has no transform.

    SHIFTED: a vector is subtracted from the transformed row before it is rounded to int8. A row of D numbers is read as
    2^LEVEL rows of D / 2^LEVEL, padded to BLOCK: column by column, this is the transform of `schemes.hadamard`.
    """
    t = tl.program_id(0).to(tl.int64)
    source = tl.load(rows + t).to(tl.int64) if GATHERED else t
    ROWS: tl.constexpr = 2**LEVEL
    each = D // ROWS
    j = tl.arange(0, BLOCK)[None, :]
    d = tl.arange(0, ROWS)[:, None] * each + j
    inside = (j < each) & (d < D)
    v = tl.load(x + source * x_stride + d, mask=inside, other=0).to(tl.float32)
    if ADDED:
        added = tl.load(product + t * product_stride + d, mask=inside, other=0).to(tl.float32)
        if SCALED:
            added = added * (tl.load(row_scale + t) * tl.load(scale + d, mask=inside, other=0))
            added += tl.load(bias + d, mask=inside, other=0)
        v += added
        tl.store(x + source * x_stride + d, v.to(x.dtype.element_ty), mask=inside)
    mean = tl.sum(tl.ravel(v * v), 0) / D if NORMED else 0.0
    # NaN where the squares overflow: the row would be scaled to zeros.
    shrink = 1 / tl.sqrt_rn(mean + eps) + (mean - mean) if NORMED else 1.0
    if QUANTIZED and WEIGHTED:
        v = v * tl.load(weight + d, mask=inside, other=0).to(tl.float32)
    for step in tl.static_range(LEVEL):
        v = butterflies(v, 2**step)
    shrink *= spread
    if QUANTIZED:
        if SHIFTED:
            v = v * shrink - tl.load(shift + d, mask=inside, other=0)
            shrink = 1.0
        peak = peak_of(v)
        tl.store(out + t * D + d, to_int8(v, tl.div_rn(LEVELS_F, peak)), mask=inside)
        tl.store(out_scale + t, tl.div_rn(peak, LEVELS_F) * shrink)
    else:
        v = v * shrink
        if WEIGHTED:  # rounded before the weight as LLaMA does, or only after a float32 weight as Gemma does
            if weight.dtype.element_ty != tl.float32:
                v = v.to(x.dtype.element_ty).to(tl.float32)
            v = v * tl.load(weight + d, mask=inside, other=0).to(tl.float32)
        tl.store(out + t * D + d, v.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate_row(
    product,
    row_scale,
    scale,
    bias,
    out,
    out_scale,
    F,
    product_stride,
    spread,
    factor,
    cubic,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    QUANTIZED: tl.constexpr,
    LEVEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """activation(gate) * up, the Hadamard transform in blocks of 2^LEVEL, then int8 or float.

    A row of F numbers is read as 2^LEVEL rows of F / 2^LEVEL, padded to BLOCK: column by column, this is the transform
    of `schemes.hadamard`. spread is 1 / sqrt(2^LEVEL). factor and cubic: see `operands.CURVES`.
    """
    t = tl.program_id(0).to(tl.int64)
    ROWS: tl.constexpr = 2**LEVEL
    each = F // ROWS
    j = tl.arange(0, BLOCK)[None, :]
    f = tl.arange(0, ROWS)[:, None] * each + j
    inside = (j < each) & (f < F)
    gate = tl.load(product + t * product_stride + f, mask=inside, other=0).to(tl.float32)
    up = tl.load(product + t * product_stride + F + f, mask=inside, other=0).to(tl.float32)
    if SCALED:
        row = tl.load(row_scale + t)
        gate = gate * (row * tl.load(scale + f, mask=inside, other=0))
        up = up * (row * tl.load(scale + F + f, mask=inside, other=0))
    if BIASED:
        gate += tl.load(bias + f, mask=inside, other=0)
        up += tl.load(bias + F + f, mask=inside, other=0)
    x = gate * up / (1 + tl.exp(-(factor * (gate + cubic * (gate * gate * gate)))))
    for step in tl.static_range(LEVEL):
        x = butterflies(x, 2**step)
    if QUANTIZED:
        peak = peak_of(x * spread)
        tl.store(out + t * F + f, to_int8(x, spread * tl.div_rn(LEVELS_F, peak)), mask=inside)
        tl.store(out_scale + t, tl.div_rn(peak, LEVELS_F))
    else:
        tl.store(out + t * F + f, (x * spread).to(out.dtype.element_ty), mask=inside)


@triton.jit
def head_row(
    product,
    row_scale,
    scale,
    bias,
    cos,
    sin,
    norms,
    out,
    heads,
    queries,
    turned,
    width,
    pairs,
    eps,
    product_stride,
    out_stride,
    SCALED: tl.constexpr,
    TURNED: tl.constexpr,
    NORMED: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Return the heads of a fused qkv product as floats, the first `turned` of them (query, key) normed and under RoPE
    (half-split).

    `out` may be the product itself, since one program reads and writes an element. cos and sin: float32 (T, pairs);
    channels e and e + pairs turn together, those from 2 * pairs on stay. norms: float32 (2, width), the weights of the
    first `queries` heads and of the others.
    """
    t = tl.program_id(0).to(tl.int64)
    half = width // 2
    h, e = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (h < heads) & (e < half)
    a_e = tl.where(e < pairs, e, pairs + e)
    b_e = tl.where(e < pairs, pairs + e, half + e)
    a_at, b_at = h * width + a_e, h * width + b_e
    a = tl.load(product + t * product_stride + a_at, mask=inside, other=0).to(tl.float32)
    b = tl.load(product + t * product_stride + b_at, mask=inside, other=0).to(tl.float32)
    if SCALED:
        row = tl.load(row_scale + t)
        a = a * (row * tl.load(scale + a_at, mask=inside, other=0)) + tl.load(bias + a_at, mask=inside, other=0)
        b = b * (row * tl.load(scale + b_at, mask=inside, other=0)) + tl.load(bias + b_at, mask=inside, other=0)
    turn = inside & (h < turned)
    if NORMED:
        mean = tl.sum(a * a + b * b, 1) / width
        shrink = (1 / tl.sqrt_rn(mean + eps) + (mean - mean))[:, None]
        weight_at = norms + tl.where(h < queries, 0, width)
        a = tl.where(turn, a * shrink * tl.load(weight_at + a_e, mask=inside, other=0), a)
        b = tl.where(turn, b * shrink * tl.load(weight_at + b_e, mask=inside, other=0), b)
    if TURNED:
        c = tl.load(cos + t * pairs + e, mask=e < pairs, other=1)
        s = tl.load(sin + t * pairs + e, mask=e < pairs, other=0)
        a, b = tl.where(turn, a * c - b * s, a), tl.where(turn, b * c + a * s, b)
    tl.store(out + t * out_stride + a_at, a.to(out.dtype.element_ty), mask=inside)
    tl.store(out + t * out_stride + b_at, b.to(out.dtype.element_ty), mask=inside)


@triton.jit
def widen_rows(
    packed, multiplier, out, N, K,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Widen int4 in the layout of `schemes.int4` to int8, BLOCK bytes of ROWS rows at a time."""
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    byte = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (n < N) & (byte < K // 2)
    bytes_ = tl.load(packed + n * (K // 2) + byte, mask=inside, other=0)
    first = byte // HALF * 2 * HALF + byte % HALF
    for half in tl.static_range(2):
        k = first + half * HALF
        times = tl.load(multiplier + n * (K // GROUP) + k // GROUP, mask=inside, other=1).to(tl.int16)
        less = tl.abs(times) * (8 - (times < 0).to(tl.int16))
        nibble = (bytes_ >> (4 * half)) & 15
        tl.store(out + n * K + k, (nibble.to(tl.int16) * tl.abs(times) - less).to(tl.int8), mask=inside)


@triton.jit
def value_row(x, rows, weight, bias, out, D, x_stride, BIASED: tl.constexpr, BLOCK: tl.constexpr):
    """The value head: row rows[s] of x times each row of weight (K, D), float32 (S, K)."""
    s, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK)
    inside = d < D
    v = tl.load(x + tl.load(rows + s).to(tl.int64) * x_stride + d, mask=inside, other=0).to(tl.float32)
    y = tl.sum(v * tl.load(weight + k * D + d, mask=inside, other=0).to(tl.float32), 0)
    if BIASED:
        y += tl.load(bias + k)
    tl.store(out + s * tl.num_programs(1) + k, y)
