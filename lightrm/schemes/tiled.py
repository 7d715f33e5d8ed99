"""The 4-bit formats in the layout of one kernel: nibbles packed as in `schemes.int4`, with float levels.

    weight[o, i] = level[o, g] * (n[o, i] - zero[o, g]) * scale[o],   g = i / group      rounded to the level's dtype

Made once, at load, from a GPTQ weight or from `schemes.int4`. Activation order shuffles the inputs of GPTQ's groups;
here the inputs are sorted by group. `order_I` lists their original places, and the columns of x are put in that order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightrm.schemes.grouped import Grouped, unpack
from lightrm.schemes.int4 import LOW, Int4, block_of, nibbles, pack_nibbles

BITS = 4
SMALLEST_BLOCK = 32  # inputs whose nibbles share bytes, at least: what a product takes at a time


@dataclass(frozen=True, slots=True)
class Tiled:
    """packed uint8 (O, I / 2), zero uint8 and level (O, G), order int64 (I,) or None, scale float32 (O,) or None."""

    packed: torch.Tensor
    zero_OG: torch.Tensor
    level_OG: torch.Tensor
    order_I: torch.Tensor | None = None
    scale_O: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.packed), 2 * self.packed.shape[1]

    @property
    def factors(self) -> torch.Tensor:
        return self.level_OG

    @property
    def nbytes(self) -> int:
        held = (self.packed, self.zero_OG, self.level_OG, self.order_I, self.scale_O)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def rows(self, start: int, end: int) -> torch.Tensor:
        """Return output channels start .. end dequantized, (end - start, I), inputs in file order; in the dtype of the
        levels, or float32 if there is a scale."""
        outputs = slice(start, end)
        group = self.shape[1] // self.zero_OG.shape[1]
        zero, level = (x[outputs].float().repeat_interleave(group, 1) for x in (self.zero_OG, self.level_OG))
        exact = ((nibbles(self.packed[outputs]).float() - zero) * level).to(self.level_OG.dtype)
        if self.scale_O is not None:
            exact = exact * self.scale_O[outputs, None]
        if self.order_I is None:
            return exact
        found = torch.empty_like(exact)
        found[:, self.order_I] = exact
        return found


def tiled(weight: Grouped) -> Tiled | None:
    """Convert a GPTQ weight. Returns None for what the kernel does not support: 8 bits, groups of different sizes, and
    inputs that no block of 32 divides."""
    (_, inputs), groups = weight.shape, len(weight.scale_GO)
    counts = torch.bincount(weight.group_I, minlength=groups)
    if weight.bits != BITS or block_of(inputs) < SMALLEST_BLOCK or bool((counts != inputs // groups).any()):
        return None
    order_I = torch.argsort(weight.group_I, stable=True)
    moved = not torch.equal(order_I, torch.arange(inputs, device=order_I.device))
    values_OI = unpack(weight.packed.T, BITS).to(torch.uint8)
    packed = pack_nibbles(values_OI[:, order_I] if moved else values_OI)
    zero_OG, level_OG = weight.zero_GO.T.to(torch.uint8).contiguous(), weight.scale_GO.T.contiguous()
    return Tiled(packed, zero_OG, level_OG, order_I if moved else None)


def tiled_int4(weight: Int4, dtype: torch.dtype) -> Tiled | None:
    """Convert a weight of `schemes.int4`, whose multipliers are exact in every float dtype. Returns None as `tiled`
    does."""
    if block_of(2 * weight.packed.shape[1]) < SMALLEST_BLOCK:
        return None
    negative = weight.multiplier_OG < 0
    zero_OG = -LOW - negative.to(torch.uint8)
    return Tiled(weight.packed, zero_OG.to(torch.uint8), weight.multiplier_OG.abs().to(dtype), None, weight.scale_O)
