"""int4 weights with two levels of scales: a float scale per output channel, an integer multiplier per group of inputs.

    weight[o, i] ~ scale[o] * multiplier[o, g(i)] * q[o, i]      q in -8 .. 7, |multiplier| in 1 .. 15

multiplier * q lies in -120 .. 120, so a group widens to int8 exactly, and the integer product is that of w8a8 with
scale[o] alone (two-level integer scales as in QServe, arXiv 2405.04532, here symmetric). The multiplier has a sign
because -8 reaches further than 7: the sign puts -8 on the side of the group's larger extreme.

There is one layout (O, I) -> uint8 (O, I / 2), on disk, in memory and for every kernel. A row is cut into blocks of 128
inputs, or of the largest smaller power of two that divides I. This does not depend on the groups. 64 bytes hold a
block:

    byte        0       1       2    ...   63          16 neighbouring bytes are one load, and
    low half    n[0]    n[1]    n[2] ...   n[63]       widen to 16 neighbouring inputs from the low halves
    high half   n[64]   n[65]   n[66] ...  n[127]      and 16 from the high ones: no shuffle in either

n is an unsigned nibble: n = q + 8 if the multiplier is positive, n = 7 - q if it is negative, so that

    multiplier * q = |multiplier| * n - offset,     offset = |multiplier| * (8 or 7)

Four bytes of n times |multiplier| stay within four bytes, so a GPU widens them with one 32-bit multiplication.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightrm.errors import SchemeError
from lightrm.schemes.int8 import peaks

LOW, HIGH = -(2**3), 2**3 - 1
MOST = (2**7 - 1) // -LOW  # the largest multiplier that keeps multiplier * LOW in int8
SMALLEST_GROUP = 8
LARGEST_BLOCK = 128
ROWS = 64  # channels rounded at once: they stay in cache


@dataclass(frozen=True, slots=True)
class Int4:
    """A weight in this format: packed uint8 (O, I / 2), multiplier int8 (O, I / group), scale float32 (O,)."""

    packed: torch.Tensor
    multiplier_OG: torch.Tensor
    scale_O: torch.Tensor

    @property
    def group(self) -> int:
        return 2 * self.packed.shape[1] // self.multiplier_OG.shape[1]

    def outputs(self, start: int, end: int) -> Int4:
        """Return output channels start .. end without a copy."""
        return Int4(self.packed[start:end], self.multiplier_OG[start:end], self.scale_O[start:end])

    def float(self) -> torch.Tensor:
        """Return the dequantized weight, float32 (O, I)."""
        return widen(self.packed, self.multiplier_OG).float() * self.scale_O[:, None]

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.multiplier_OG.nbytes + self.scale_O.nbytes


def group_for(width: int, asked: int) -> int:
    """Return the largest power of two up to `asked` that divides the width. Raises SchemeError if it is below 8."""
    group = asked
    while width % group:
        group //= 2
    if group < SMALLEST_GROUP:
        raise SchemeError(f"int4 needs groups of at least {SMALLEST_GROUP} inputs, and none divides {width}: use w8a8")
    return group


def channel_scale(weight_OI: torch.Tensor) -> torch.Tensor:
    """Return the scale of each channel, float32 (O,): LOW times the largest multiplier is the channel's largest
    weight."""
    return peaks(weight_OI.float()) / (MOST * -LOW)


def best_multiplier(weight_NK: torch.Tensor, scale_N: torch.Tensor) -> torch.Tensor:
    """Return the multiplier of each of N groups of K inputs, given the scale of its channel: int8 (N,).

    Tries the smallest multiplier that clips nothing and the two below it, which clip a little and round finer.
    """
    low, high = weight_NK.amin(1), weight_NK.amax(1)
    sign = torch.where(high > -low, -1.0, 1.0)
    whole = (torch.maximum(high, -low) / (scale_N * -LOW)).ceil()
    least = torch.full_like(scale_N, float("inf"))
    chosen = torch.ones_like(scale_N)
    for fewer in range(3):
        multiplier = (whole - fewer).clamp(1, MOST) * sign
        step = (scale_N * multiplier)[:, None]
        error = (weight_NK / step).round_().clamp_(LOW, HIGH).mul_(step).sub_(weight_NK).square_().sum(1)
        better = error < least
        least, chosen = torch.where(better, error, least), torch.where(better, multiplier, chosen)
    return chosen.to(torch.int8)


def quantize(weight_OI: torch.Tensor, group: int) -> Int4:
    """Round a weight to the nearest values. group must divide I."""
    parts = [quantize_rows(rows, group) for rows in weight_OI.split(ROWS)]
    return Int4(*(torch.cat(part) for part in zip(*parts, strict=True)))


def quantize_rows(weight_OI: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    outputs, inputs = weight_OI.shape
    scale_O = channel_scale(weight_OI)
    weight_NK = weight_OI.float().reshape(-1, group)
    scale_N = scale_O.repeat_interleave(inputs // group)
    multiplier_N = best_multiplier(weight_NK, scale_N)
    q = (weight_NK / (scale_N * multiplier_N)[:, None]).round_().clamp_(LOW, HIGH).to(torch.int8)
    multiplier_OG = multiplier_N.view(outputs, -1)
    return pack(q.view(outputs, inputs), multiplier_OG), multiplier_OG, scale_O


def block_of(inputs: int) -> int:
    """Return the number of inputs in a block of the layout."""
    return min(inputs & -inputs, LARGEST_BLOCK)


def pack(q_OI: torch.Tensor, multiplier_OG: torch.Tensor) -> torch.Tensor:
    """Pack values in -8 .. 7, int8 (O, I), into uint8 (O, I / 2), in the layout that the module describes."""
    negative = multiplier_OG.repeat_interleave(q_OI.shape[1] // multiplier_OG.shape[1], 1) < 0
    return pack_nibbles(torch.where(negative, HIGH - q_OI, q_OI - LOW).to(torch.uint8))


def pack_nibbles(nibble_OI: torch.Tensor) -> torch.Tensor:
    """Pack nibbles in 0 .. 15, uint8 (O, I), into uint8 (O, I / 2)."""
    outputs, inputs = nibble_OI.shape
    halves = nibble_OI.view(outputs, -1, 2, block_of(inputs) // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(outputs, inputs // 2)


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Return n of every input, uint8 (O, I)."""
    bytes_ = packed.view(len(packed), -1, 1, block_of(2 * packed.shape[1]) // 2)
    return torch.cat([bytes_ & 15, bytes_ >> 4], 2).view(len(packed), -1)


def offsets(multiplier_OG: torch.Tensor) -> torch.Tensor:
    """Return |multiplier| * n - multiplier * q for each group, int8 (O, G)."""
    return multiplier_OG.abs() * (-LOW - (multiplier_OG < 0).to(torch.int8))


def widen(packed: torch.Tensor, multiplier_OG: torch.Tensor) -> torch.Tensor:
    """Return multiplier * q, int8 (O, I): the weight without the scale of its channel."""
    group = 2 * packed.shape[1] // multiplier_OG.shape[1]
    spread, offset = (x.repeat_interleave(group, 1) for x in (multiplier_OG.abs(), offsets(multiplier_OG)))
    return (nibbles(packed).short() * spread - offset).to(torch.int8)
