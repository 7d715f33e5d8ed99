# mypy: ignore-errors
"""w4a16: float rows times a 4-bit weight of another program's format, widened in registers.

    out[m, n] = (sum_k x[m, k] * w[n, k]) * scale[n] + bias[n],     w = level[g(k), n] * (nibble[n, k] - zero[g(k), n])

w is rounded to the dtype of its levels, as the format defines it, then to that of x. Nibbles are packed as in
`schemes.int4`, with the inputs sorted by group. The inner dimension runs in blocks of 2 * HALF inputs as two products,
as in `triton_products`, always in the same order: a row's result does not depend on its neighbours.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lightrm.kernels.cuda.triton_products import dot, group_values, place

THOUSAND = tl.constexpr(0x6400)  # the bits of 1024 in float16, where the last ten count by ones


@triton.jit
def level(nibble, zero, scale):
    """scale * (nibble - zero), rounded once. 1024 + nibble is assembled from bits, which is cheaper than a
    conversion."""
    lifted = (nibble.to(tl.int16) | THOUSAND).to(tl.float16, bitcast=True)
    steps = lifted - (zero.to(tl.float16) + 1024)
    if scale.dtype == tl.float16:
        found = steps * scale
    else:
        found = (steps.to(tl.float32) * scale.to(tl.float32)).to(scale.dtype)
    return found


@triton.jit
def grouped_product(
    x,
    packed,
    zero,
    level_scale,
    scale,
    bias,
    out,
    M,
    N,
    K,
    x_stride,
    packed_stride,
    group_stride,
    out_stride,
    GROUP: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    HALF: tl.constexpr,
    BAND: tl.constexpr,
):
    """packed uint8 (N, K / 2), zero uint8 and level_scale (N, K / GROUP); 2 HALF divides K."""
    m, n, m_read, n_read = place(M, N, ROWS, OUTPUTS, BAND)
    k = tl.arange(0, HALF)
    x_at = x + m_read.to(tl.int64)[None, :] * x_stride + k[:, None]
    packed_at = packed + n_read.to(tl.int64)[:, None] * packed_stride + k[None, :]
    zero_at = zero + n_read.to(tl.int64) * group_stride
    level_at = level_scale + n_read.to(tl.int64) * group_stride
    sums = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for start in range(0, K, 2 * HALF):
        bytes_ = tl.load(packed_at + start // 2)
        zeros, levels = group_values(zero_at, start, GROUP, HALF), group_values(level_at, start, GROUP, HALF)
        first = level(bytes_ & 15, zeros, levels).to(x.dtype.element_ty)
        sums = dot(first, tl.load(x_at + start), sums, PRECISION)
        after = start + HALF
        zeros, levels = group_values(zero_at, after, GROUP, HALF), group_values(level_at, after, GROUP, HALF)
        last = level(bytes_ >> 4, zeros, levels).to(x.dtype.element_ty)
        sums = dot(last, tl.load(x_at + after), sums, PRECISION)
    if SCALED:
        sums *= tl.load(scale + n_read)[:, None]
    if BIASED:
        sums += tl.load(bias + n_read).to(tl.float32)[:, None]
    out_at = out + m.to(tl.int64)[:, None] * out_stride + n[None, :]
    tl.store(out_at, tl.trans(sums.to(out.dtype.element_ty)), mask=(m < M)[:, None] & (n < N)[None, :])
