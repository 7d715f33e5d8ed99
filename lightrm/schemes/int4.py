"""int4 in two levels: a float scale for each output channel, a small integer multiplier for each group of inputs.

    weight[o, i] ~ scale[o] * multiplier[o, g(i)] * q[o, i]      q in -8 .. 7, |multiplier| in 1 .. 15

multiplier * q lies in -120 .. 120, so a group widens to int8 exactly, and the integer product of w8a8 follows with
scale[o] alone (two-level integer scales as in QServe, arXiv 2405.04532, here symmetric). The multiplier has a sign:
-8 reaches further than 7, and the sign puts it on the side of the group's larger extreme.

Packing, (O, I) -> uint8 (O, I / 2): in each group, byte k holds q + 8 of input k in its low and of input k + group / 2
in its high half, so that either half of the bytes widens to a contiguous run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightrm.errors import SchemeError
from lightrm.schemes.int8 import TINY

LOW, HIGH = -(2**3), 2**3 - 1
MOST = (2**7 - 1) // -LOW  # the largest multiplier that keeps multiplier * LOW in int8
SMALLEST_GROUP = 8
ROWS = 64  # channels rounded at once: they stay in cache


@dataclass(frozen=True, slots=True)
class Int4:
    """packed uint8 (O, I / 2), multiplier int8 (O, I / group), scale float32 (O,)."""

    packed: torch.Tensor
    multiplier_OG: torch.Tensor
    scale_O: torch.Tensor

    @property
    def group(self) -> int:
        return 2 * self.packed.shape[1] // self.multiplier_OG.shape[1]


def group_for(width: int, asked: int) -> int:
    """The largest power of two up to `asked` that divides the width. Raises SchemeError if it would be tiny."""
    group = asked
    while width % group:
        group //= 2
    if group < SMALLEST_GROUP:
        raise SchemeError(f"int4 needs groups of at least {SMALLEST_GROUP} inputs, and none divides {width}: use w8a8")
    return group


def channel_scale(weight_OI: torch.Tensor) -> torch.Tensor:
    """float32 (O,): the largest weight of a channel is LOW times the largest multiplier."""
    return weight_OI.float().abs().amax(1).clamp(min=TINY) / (MOST * -LOW)


def best_multiplier(weight_NK: torch.Tensor, scale_N: torch.Tensor) -> torch.Tensor:
    """The multiplier of N groups of K inputs each, under the scale of the group's channel: int8 (N,).

    Tried are the smallest that clips nothing and the two below it, which clip a little and round finer.
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
    """Round to nearest. The group divides I."""
    parts = [quantize_rows(rows, group) for rows in weight_OI.split(ROWS)]
    return Int4(*(torch.cat(part) for part in zip(*parts, strict=True)))


def quantize_rows(weight_OI: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    outputs, inputs = weight_OI.shape
    scale_O = channel_scale(weight_OI)
    weight_NK = weight_OI.float().reshape(-1, group)
    scale_N = scale_O.repeat_interleave(inputs // group)
    multiplier_N = best_multiplier(weight_NK, scale_N)
    q = (weight_NK / (scale_N * multiplier_N)[:, None]).round_().clamp_(LOW, HIGH).to(torch.int8)
    return pack(q.view(outputs, inputs), group), multiplier_N.view(outputs, -1), scale_O


def pack(q_OI: torch.Tensor, group: int) -> torch.Tensor:
    """int8 in -8 .. 7 (O, I) -> uint8 (O, I / 2), in the order that the module describes."""
    outputs, inputs = q_OI.shape
    halves = (q_OI - LOW).to(torch.uint8).view(outputs, inputs // group, 2, group // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(outputs, inputs // 2)


def unpack(packed: torch.Tensor, group: int) -> torch.Tensor:
    """The inverse of `pack`: int8 (O, I)."""
    bytes_ = packed.view(len(packed), -1, 1, group // 2)
    return (torch.cat([bytes_ & 15, bytes_ >> 4], 2).to(torch.int8) + LOW).view(len(packed), -1)


def dequantize(weight: Int4) -> torch.Tensor:
    """float32 (O, I)."""
    multiplier = weight.multiplier_OG.repeat_interleave(weight.group, 1)
    return unpack(weight.packed, weight.group).float() * multiplier * weight.scale_O[:, None]
