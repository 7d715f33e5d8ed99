"""How close a quantized tensor is to the original."""

from __future__ import annotations

import math

import torch

from lightrm.schemes.int8 import TINY


def ratio_db(signal: float, noise: float) -> float:
    """10 log10(signal / noise), in dB; inf without noise."""
    return math.inf if noise == 0 else 10 * math.log10(max(signal, TINY) / noise)


def energies(exact: torch.Tensor, found: torch.Tensor) -> tuple[float, float]:
    """Return the sum of squares of a tensor and that of its error, in float64."""
    exact = exact.double()
    return float(exact.square().sum()), float((found.double() - exact).square_().sum())


def sqnr_db(exact: torch.Tensor, found: torch.Tensor) -> float:
    """Signal to quantization noise ratio: sum exact^2 over sum (exact - found)^2, in dB."""
    return ratio_db(*energies(exact, found))
