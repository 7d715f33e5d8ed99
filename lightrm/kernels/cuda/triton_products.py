# mypy: ignore-errors
"""Integer products: int8 rows times an int8 or int4 weight, int32 sums, and scales and bias applied before the store.

    out[m, n] = (sum_k x[m, k] * weight[n, k]) * row_scale[m] * scale[n] + bias[n]     (+ out[m, n], for the residual)

The weight is the left operand: on Hopper that operand may come from registers, where int4 is widened. The inner
dimension runs in blocks of 2 * HALF inputs, as two products. This is the layout of `schemes.int4`, where the low halves
of a block's bytes are its first inputs and the high halves its last ones. On 8.x cards, two products also keep Triton
from moving bytes through the loop one by one, which would cost more than the product.

Integer sums do not depend on their order. M rows, N out features, K in features.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lightrm.kernels.cuda.launch import INTERPRETED

# Four bytes of nibbles at once: n * times stays below 226 in every byte; then bytewise n * times - less, where the
# borrow of a byte is kept out of the next one by its top bit, which is put right at the end.
WIDEN = """{
    .reg .b32 n, u, t, f;
    and.b32 f, $3, 0xff;
    and.b32 n, $2, 0x0f0f0f0f;
    mul.lo.u32 u, n, f;
    or.b32 t, u, 0x80808080;
    sub.u32 t, t, $4;
    lop3.b32 $0, t, u, 0x80808080, 0xD2;
    shr.u32 n, $2, 4;
    and.b32 n, n, 0x0f0f0f0f;
    and.b32 f, $5, 0xff;
    mul.lo.u32 u, n, f;
    or.b32 t, u, 0x80808080;
    sub.u32 t, t, $6;
    lop3.b32 $1, t, u, 0x80808080, 0xD2;
}"""
WIDEN_ASM = tl.constexpr(WIDEN)
EMULATED = tl.constexpr(INTERPRETED)


@triton.jit
def place(M, N, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, BAND: tl.constexpr):
    """Return rows m and out features n of this program's tile, and those to read. Past the edge, the first one is read
    and its result dropped.

    Tiles are ordered in bands of BAND tile rows, down each band first, so that programs close in time share data in L2.
    """
    tile = tl.program_id(0)
    band = BAND * tl.cdiv(N, OUTPUTS)
    first = tile // band * BAND
    height = tl.minimum(tl.cdiv(M, ROWS) - first, BAND)
    m = (first + tile % band % height) * ROWS + tl.arange(0, ROWS)
    n = tile % band // height * OUTPUTS + tl.arange(0, OUTPUTS)
    return m, n, tl.where(m < M, m, 0), tl.where(n < N, n, 0)


@triton.jit
def dot(a, b, sums, PRECISION: tl.constexpr):
    """A float product.

    The interpreter's product is numpy's, which sums in another order than a card and reads bfloat16 as integers. There
    the sum runs in float64, so that a test sees only the kernel's own rounding.
    """
    if EMULATED:
        left, right = a.to(tl.float32).to(tl.float64), b.to(tl.float32).to(tl.float64)
        sums += tl.dot(left, right, out_dtype=tl.float64).to(tl.float32)
    else:
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    return sums


@triton.jit
def group_values(pointer, start, GROUP: tl.constexpr, HALF: tl.constexpr):
    """Return the values of the groups of inputs start .. start + HALF: (N, HALF), or (N, 1) if there is only one
    group."""
    if GROUP % HALF == 0:
        values = tl.load(pointer[:, None] + start // GROUP)
    elif HALF % GROUP == 0:
        GROUPS: tl.constexpr = HALF // GROUP
        each = tl.load(pointer[:, None] + start // GROUP + tl.arange(0, GROUPS)[None, :])
        spread = tl.broadcast_to(each[:, :, None], (each.shape[0], GROUPS, GROUP))
        values = tl.reshape(spread, (each.shape[0], HALF))
    else:
        values = tl.load(pointer[:, None] + (start + tl.arange(0, HALF))[None, :] // GROUP)
    return values


@triton.jit
def offset_of(multiplier):
    """|multiplier| * n - multiplier * q: see `schemes.int4`."""
    return (tl.abs(multiplier) * (8 - (multiplier < 0).to(tl.int8))).to(tl.int8)


@triton.jit
def widened(bytes_, low, high):
    """Return the first and the last inputs of a block as int8, from its bytes and the multipliers of both halves."""
    times_low, less_low = tl.abs(low).to(tl.int8), offset_of(low)
    times_high, less_high = tl.abs(high).to(tl.int8), offset_of(high)
    if not EMULATED:
        first, last = tl.inline_asm_elementwise(
            WIDEN_ASM,
            "=r,=r,r,r,r,r,r",
            [
                bytes_,
                tl.broadcast_to(times_low, bytes_.shape),
                tl.broadcast_to(less_low, bytes_.shape),
                tl.broadcast_to(times_high, bytes_.shape),
                tl.broadcast_to(less_high, bytes_.shape),
            ],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        first = ((bytes_ & 15).to(tl.int16) * times_low - less_low).to(tl.int8)
        last = ((bytes_ >> 4).to(tl.int16) * times_high - less_high).to(tl.int8)
    return first, last


@triton.jit
def integer_product(
    x,
    weight,
    multiplier,
    row_scale,
    scale,
    bias,
    out,
    M,
    N,
    K,
    x_stride,
    weight_stride,
    multiplier_stride,
    out_stride,
    INT4: tl.constexpr,
    GROUP: tl.constexpr,
    BIASED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    HALF: tl.constexpr,
    BAND: tl.constexpr,
):
    """INT4: weight is uint8 (N, K / 2) and multiplier (N, K / GROUP); otherwise weight is int8 (N, K). WHOLE: 2 HALF
    divides K."""
    m, n, m_read, n_read = place(M, N, ROWS, OUTPUTS, BAND)
    k = tl.arange(0, HALF)
    x_at = x + m_read.to(tl.int64)[None, :] * x_stride + k[:, None]
    weight_at = weight + n_read.to(tl.int64)[:, None] * weight_stride + k[None, :]
    multiplier_at = multiplier + n_read.to(tl.int64) * multiplier_stride
    sums = tl.zeros((OUTPUTS, ROWS), tl.int32)
    for start in range(0, K, 2 * HALF):
        if INT4:
            low = group_values(multiplier_at, start, GROUP, HALF)
            high = group_values(multiplier_at, start + HALF, GROUP, HALF)
            first, last = widened(tl.load(weight_at + start // 2), low, high)
            sums = tl.dot(first, tl.load(x_at + start), sums, out_dtype=tl.int32)
            sums = tl.dot(last, tl.load(x_at + start + HALF), sums, out_dtype=tl.int32)
        elif WHOLE:
            sums = tl.dot(tl.load(weight_at + start), tl.load(x_at + start), sums, out_dtype=tl.int32)
            first, last = tl.load(weight_at + start + HALF), tl.load(x_at + start + HALF)
            sums = tl.dot(first, last, sums, out_dtype=tl.int32)
        else:
            for half in tl.static_range(2):
                inside = k < K - start - half * HALF
                left = tl.load(weight_at + start + half * HALF, mask=inside[None, :], other=0)
                right = tl.load(x_at + start + half * HALF, mask=inside[:, None], other=0)
                sums = tl.dot(left, right, sums, out_dtype=tl.int32)
    y = sums.to(tl.float32) * (tl.load(row_scale + m_read)[None, :] * tl.load(scale + n_read)[:, None])
    if BIASED:
        y += tl.load(bias + n_read)[:, None]
    out_at = out + m.to(tl.int64)[:, None] * out_stride + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    if RESIDUAL:
        y = tl.trans(y) + tl.load(out_at, mask=inside, other=0).to(tl.float32)
        tl.store(out_at, y.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(out_at, tl.trans(y.to(out.dtype.element_ty)), mask=inside)
