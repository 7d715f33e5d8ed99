"""Position schemes as small tables: RoPE's cosines and sines, ALiBi's slopes. Always float32.

T tokens, H query heads, E head width.
"""

from __future__ import annotations

import math

import torch

from lightrm.architecture import Rope


def inverse_frequencies(rope: Rope, head_width: int) -> torch.Tensor:
    """Return the rotation of each pair of channels in radians per position, float32 (E/2,)."""
    exponent = torch.arange(0, head_width, 2, dtype=torch.float32) / head_width
    frequency = 1.0 / rope.theta**exponent
    if rope.kind == "linear":
        return frequency / rope.factor
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / frequency
        longest = rope.original_positions / rope.low_frequency_factor
        shortest = rope.original_positions / rope.high_frequency_factor
        smooth = (rope.original_positions / wavelength - rope.low_frequency_factor) / (
            rope.high_frequency_factor - rope.low_frequency_factor
        )
        blended = (1 - smooth) * frequency / rope.factor + smooth * frequency
        slow = torch.where(wavelength > longest, frequency / rope.factor, blended)
        return torch.where(wavelength < shortest, frequency, slow)
    return frequency


def rope_tables(frequency: torch.Tensor, position_ids_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin of the rotation at each position, both float32 (T, E/2)."""
    angle = position_ids_T.to(torch.float32)[:, None] * frequency[None, :]
    return angle.cos(), angle.sin()


def alibi_slopes(heads: int) -> torch.Tensor:
    """Return ALiBi's slope of each head, float32 (H,).

    For a power of two n the slopes are 2^(-8k/n), k = 1..n. For other counts, as in BLOOM and Baichuan-13B: those of
    the next smaller power of two, then every other one of the next larger.
    """
    smaller = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * k / smaller) for k in range(1, smaller + 1)]
    slopes += [2 ** (-8 * k / (2 * smaller)) for k in range(1, 2 * (heads - smaller), 2)]
    return torch.tensor(slopes, dtype=torch.float32)
