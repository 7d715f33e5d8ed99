"""Rotations that spread outliers over channels: block Hadamard matrices, as in QuaRot (arXiv 2404.00456), but without
its random signs, which made no difference to scores.

    hadamard(x, B) = x (H_B (x) I_m)     width = B m, H_B Sylvester's matrix over sqrt(B)
    spread(x)      = x (H_B (x) C_m)     B the largest power of two in the width, C_m Hartley's matrix

Channel b * m + j is mixed with the B channels of the same j, so the transform works on whole rows of neighbouring
channels and vectorizes without shuffles. `hadamard` is cheap enough for a kernel at run time. `spread` mixes every
channel with every other one and is used on weights. Both matrices are symmetric and orthogonal, hence their own
inverses.
"""

from __future__ import annotations

import math

import torch


def block_of(width: int, most: int | None = None) -> int:
    """Return the largest power of two that divides the width, at most `most` (itself a power of two)."""
    block = width & -width
    return block if most is None else min(block, most)


def sylvester(size: int) -> torch.Tensor:
    """Return Sylvester's Hadamard matrix of +1 and -1, float32 (size, size); size is a power of two.

    scipy.linalg.hadamard returns the same matrix, but takes 0.4 s to import.
    """
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def hartley(size: int) -> torch.Tensor:
    """Hartley's orthogonal matrix, float32 (size, size): cos + sin of 2 pi i j / size, over sqrt(size)."""
    angle = 2 * math.pi / size * torch.outer(*(torch.arange(size, dtype=torch.float64),) * 2).remainder(size)
    return ((angle.cos() + angle.sin()) / math.sqrt(size)).float()


def hadamard(x: torch.Tensor, block: int) -> torch.Tensor:
    """Apply the block Hadamard transform along the last axis, float32. Uses two small products, since H_ab = H_a (x)
    H_b."""
    width = x.shape[-1]
    first = 2 ** (block.bit_length() // 2)
    parts = x.float().reshape(-1, first, block // first, width // block)
    left, right = (sylvester(n).to(x.device) for n in (first, block // first))
    mixed = torch.einsum("nabj,ac,bd->ncdj", parts, left, right)
    return (mixed / math.sqrt(block)).reshape(x.shape)


def spread(x: torch.Tensor) -> torch.Tensor:
    """Mix all channels along the last axis, float32."""
    block = block_of(x.shape[-1])
    turned, rest = hadamard(x, block), x.shape[-1] // block
    return turned if rest == 1 else (turned.reshape(-1, rest) @ hartley(rest).to(x.device)).reshape(x.shape)
