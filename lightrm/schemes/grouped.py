"""The format of GPTQ files (arXiv 2210.17323, as auto-gptq stores it): a float scale and a zero point for each group.

    weight[o, i] = scale[g(i), o] * (q[i, o] - zero[g(i), o])      rounded to the dtype of the scales

q and the zero points are unsigned integers of 2, 4 or 8 bits, packed into int32 words with the lowest bits first: q
along I, zero points along O. g(i) is i / group size, or any assignment if the file uses activation order.

lightrm reads all of these. It writes those that every tool and kernel supports: 4 or 8 bits, symmetric (zero point 8,
values -8 .. 7, or 128 and -128 .. 127), float16 scales, groups in order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightrm.schemes.int4 import ROWS

WORD = 32
SHRUNK = (1.0, 0.95, 0.9, 0.85, 0.8)  # of the step that clips nothing
LEAST = 2.0**-14  # the smallest normal float16


@dataclass(frozen=True, slots=True)
class Grouped:
    """A weight in this format: packed int32 (I * bits / 32, O), zero int16 (G, O), scale (G, O), group int64 (I,)."""

    packed: torch.Tensor
    zero_GO: torch.Tensor
    scale_GO: torch.Tensor
    group_I: torch.Tensor
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[1], len(self.group_I)

    @property
    def dtype(self) -> torch.dtype:
        return self.scale_GO.dtype

    @property
    def factors(self) -> torch.Tensor:
        return self.scale_GO

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.packed, self.zero_GO, self.scale_GO, self.group_I))

    def to(self, device: torch.device) -> Grouped:
        packed, zero_GO, scale_GO = (t.to(device) for t in (self.packed, self.zero_GO, self.scale_GO))
        return Grouped(packed, zero_GO, scale_GO, self.group_I.to(device), self.bits)

    def reordered(self, order_O: torch.Tensor) -> Grouped:
        """Return the output channels in another order, still packed."""
        packed, zero_GO, scale_GO = (t[:, order_O].contiguous() for t in (self.packed, self.zero_GO, self.scale_GO))
        return Grouped(packed, zero_GO, scale_GO, self.group_I, self.bits)

    def rows(self, start: int, end: int) -> torch.Tensor:
        """Return output channels start .. end dequantized, (end - start, I), in the dtype of the scales."""
        values_OI = unpack(self.packed[:, start:end].T, self.bits)
        offset_OI = values_OI - self.zero_GO[:, start:end].T[:, self.group_I]
        # In float32 and rounded once: what a product in half precision gives, without half-precision arithmetic.
        exact_OI = self.scale_GO[:, start:end].T.float()[:, self.group_I] * offset_OI
        return exact_OI.to(self.scale_GO.dtype)


def bounds(bits: int) -> tuple[int, int]:
    """Return the lowest and the highest value of a symmetric grid."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def best_step(weight_NK: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """Return the step of each of N groups of K inputs, float16 (N,).

    Tries the step that clips nothing and some slightly smaller ones, and takes the one with the least squared error.
    """
    weight_NK, (low, high) = weight_NK.float(), bounds(bits)
    reach = torch.maximum(weight_NK.amax(1) / high, weight_NK.amin(1) / low)
    least = torch.full_like(reach, float("inf"))
    chosen = torch.ones_like(reach, dtype=torch.float16)
    for share in SHRUNK:
        step = (reach * share).clamp(min=LEAST).half()
        exact = step.float()[:, None]
        error = (weight_NK / exact).round_().clamp_(low, high).mul_(exact).sub_(weight_NK).square_().sum(1)
        better = error < least
        least, chosen = torch.where(better, error, least), torch.where(better, step, chosen)
    return chosen


def quantize(weight_OI: torch.Tensor, group: int, bits: int = 4) -> Grouped:
    """Round a weight to the nearest values in 4 or 8 bits, symmetric. group must divide I."""
    return joined([quantize_rows(rows, group, bits) for rows in weight_OI.split(ROWS)])


def quantize_rows(weight_OI: torch.Tensor, group: int, bits: int) -> Grouped:
    outputs, inputs = weight_OI.shape
    weight_NK = weight_OI.float().reshape(-1, group)
    step = best_step(weight_NK, bits)
    q = (weight_NK / step.float()[:, None]).round_().clamp_(*bounds(bits)).to(torch.int8)
    return pack(q.view(outputs, inputs), step.view(outputs, -1), bits)


def pack(q_OI: torch.Tensor, step_OG: torch.Tensor, bits: int = 4) -> Grouped:
    """Pack values within `bounds`, int8 (O, I), with float16 steps (O, G). Groups are in order; I is a multiple of
    8."""
    (outputs, inputs), groups, middle = q_OI.shape, step_OG.shape[1], 2 ** (bits - 1)
    packed = pack_words(q_OI.short() + middle, bits)
    zero_GO = torch.full((groups, outputs), middle, dtype=torch.int16, device=q_OI.device)
    group_I = torch.arange(inputs, device=q_OI.device) // (inputs // groups)
    return Grouped(packed.T.contiguous(), zero_GO, step_OG.half().T.contiguous(), group_I, bits)


def joined(parts: list[Grouped]) -> Grouped:
    """Stack matrices with the same groups along the output channels."""
    if len(parts) == 1:
        return parts[0]
    packed, zero_GO, scale_GO = (
        torch.cat([getattr(part, name) for part in parts], 1) for name in ("packed", "zero_GO", "scale_GO")
    )
    return Grouped(packed, zero_GO, scale_GO, parts[0].group_I, parts[0].bits)


def columns(weight: Grouped, start: int, end: int) -> Grouped:
    """Return output channels start .. end, still packed."""
    packed, zero_GO, scale_GO = (t[:, start:end] for t in (weight.packed, weight.zero_GO, weight.scale_GO))
    return Grouped(packed, zero_GO, scale_GO, weight.group_I, weight.bits)


def pack_words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack unsigned values (N, C) into int32 words (N, C * bits / 32), lowest bits first. A word must be full."""
    unsigned = values.view(len(values), -1, WORD // bits)
    words = torch.zeros(unsigned.shape[:2], dtype=torch.int32, device=values.device)
    for k in range(WORD // bits):
        words |= unsigned[:, :, k].to(torch.int32) << bits * k
    return words


def unpack_dense(words: torch.Tensor, bits: int) -> torch.Tensor:
    """As `unpack` for bits that do not divide a word, so that values lie across two: 32 of them in `bits` words."""
    runs = words.to(torch.int32).view(len(words), -1, bits).long() & (2**WORD - 1)
    starts = torch.arange(WORD, device=words.device) * bits
    pairs = torch.cat([runs, torch.zeros_like(runs[:, :, :1])], 2)
    low, high = pairs[:, :, starts // WORD], pairs[:, :, starts // WORD + 1]
    values: torch.Tensor = (low | high << WORD) >> starts % WORD & (2**bits - 1)
    return values.to(torch.int32).flatten(1)


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the values in int32 words (N, W) as int32 (N, W * 32 / bits), lowest bits first."""
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32, device=words.device)
    values: torch.Tensor = (words.to(torch.int32)[:, :, None] >> shifts) & (2**bits - 1)
    return values.flatten(1)
