"""How close a quantized tensor is to the original."""

from __future__ import annotations

import math

import torch

from lightrm.schemes.int8 import TINY

AT_ONCE = 2**18  # numbers that are in float64 at one time


def ratio_db(signal: float, noise: float) -> float:
    """10 log10(signal / noise), in dB; inf without noise."""
    return math.inf if noise == 0 else 10 * math.log10(max(signal, TINY) / noise)


def energies(exact: torch.Tensor, found: torch.Tensor) -> tuple[float, float]:
    """Return the sum of squares of a tensor and that of its error, in float64."""
    pairs = zip(*(tensor.reshape(-1).split(AT_ONCE) for tensor in (exact, found)), strict=True)
    sums = [(energy(one), energy(other.double().sub_(one))) for one, other in pairs]
    signals, noises = zip(*sums, strict=True)
    return sum(signals), sum(noises)


def energy(tensor: torch.Tensor) -> float:
    """Return the sum of squares of a tensor, in float64, of which no whole copy is made."""
    return sum(float(part.double().square_().sum()) for part in tensor.reshape(-1).split(AT_ONCE))


def sqnr_db(exact: torch.Tensor, found: torch.Tensor) -> float:
    """Signal to quantization noise ratio: sum exact^2 over sum (exact - found)^2, in dB."""
    return ratio_db(*energies(exact, found))
