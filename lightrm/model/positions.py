"""Position schemes as small tables: RoPE's cosines and sines, ALiBi's slopes. Always float32.

T tokens, H query heads, E head width, R channels of a head that turn.
"""

from __future__ import annotations

import math

import torch

from lightrm.architecture import LinearScaling, Llama3Scaling, LongRopeScaling, Rope, YarnScaling


def inverse_frequencies(rope: Rope, head_width: int, long: bool = False) -> torch.Tensor:
    """Return the rotation of each pair of channels in radians per position, float32 (R/2,).

    long: whether the sequences have more than the original positions, which matters for LongRoPE alone.
    """
    turned, scaling = rope.turned(head_width), rope.scaling
    exponent = torch.arange(0, turned, 2, dtype=torch.float32) / turned
    frequency = 1.0 / rope.theta**exponent
    if isinstance(scaling, LinearScaling):
        return frequency / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        return llama3_frequencies(frequency, scaling)
    if isinstance(scaling, YarnScaling):
        return yarn_frequencies(frequency, scaling, rope.theta)
    if isinstance(scaling, LongRopeScaling):
        factors = scaling.long_factors if long else scaling.short_factors
        return 1.0 / (torch.tensor(factors, dtype=torch.float32) * rope.theta**exponent)
    return frequency


def llama3_frequencies(frequency: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    wavelength = 2 * math.pi / frequency
    longest = scaling.original_positions / scaling.low_frequency_factor
    shortest = scaling.original_positions / scaling.high_frequency_factor
    smooth = (scaling.original_positions / wavelength - scaling.low_frequency_factor) / (
        scaling.high_frequency_factor - scaling.low_frequency_factor
    )
    blended = (1 - smooth) * frequency / scaling.factor + smooth * frequency
    slow = torch.where(wavelength > longest, frequency / scaling.factor, blended)
    return torch.where(wavelength < shortest, frequency, slow)


def yarn_frequencies(frequency: torch.Tensor, scaling: YarnScaling, theta: float) -> torch.Tensor:
    """Blend each frequency with its interpolation, by a ramp over the channels."""
    turned = 2 * len(frequency)

    def channel(turns: float) -> float:
        """Return the channel, a fraction, that turns so often within the original positions."""
        return turned * math.log(scaling.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(scaling.fast), channel(scaling.slow)
    if scaling.whole:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, turned - 1)
    high += 0.001 * (low == high)  # as transformers: no division by zero
    ramp = ((torch.arange(len(frequency), dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return frequency / scaling.factor * ramp + frequency * (1 - ramp)


def attention_factor(rope: Rope) -> float:
    """Return what cos and sin are multiplied by."""
    scaling = rope.scaling
    return scaling.attention_factor if isinstance(scaling, YarnScaling | LongRopeScaling) else 1.0


def rope_tables(
    frequency: torch.Tensor, position_ids_T: torch.Tensor, factor: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin of the rotation at each position times a factor, both float32 (T, R/2)."""
    angle = position_ids_T.to(torch.float32)[:, None] * frequency[None, :]
    return angle.cos() * factor, angle.sin() * factor


def alibi_slopes(heads: int) -> torch.Tensor:
    """Return ALiBi's slope of each head, float32 (H,).

    For a power of two n the slopes are 2^(-8k/n), k = 1..n. For other counts, as in BLOOM and Baichuan-13B: those of
    the next smaller power of two, then every other one of the next larger.
    """
    smaller = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * k / smaller) for k in range(1, smaller + 1)]
    slopes += [2 ** (-8 * k / (2 * smaller)) for k in range(1, 2 * (heads - smaller), 2)]
    return torch.tensor(slopes, dtype=torch.float32)
