"""The grid of GPTQ files (arXiv 2210.17323; the format is auto-gptq's): float scales and zero points for each group.

    weight[o, i] = scale[g(i), o] * (q[i, o] - zero[g(i), o])      rounded to the dtype of the scales

q and the zero points are unsigned, 4 or 8 bits each, 32 / bits of them in an int32 word, lowest bits first: q along I,
zero points along O. g(i) is i / group size, or, under activation order, anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

WORD = 32


@dataclass(frozen=True, slots=True)
class Grouped:
    """packed int32 (I * bits / 32, O), zero int16 (G, O), scale (G, O), group int64 (I,)."""

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

    def rows(self, start: int, end: int) -> torch.Tensor:
        """Output channels start .. end as floats in the dtype of the scales, (end - start, I)."""
        values_OI = unpack(self.packed[:, start:end].T, self.bits)
        offset_OI = values_OI - self.zero_GO[:, start:end].T[:, self.group_I]
        # In float32 and rounded once: what a product in half precision gives, without half-precision arithmetic.
        exact_OI = self.scale_GO[:, start:end].T.float()[:, self.group_I] * offset_OI
        return exact_OI.to(self.scale_GO.dtype)


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 words (N, W) -> the values they hold, int32 (N, W * 32 / bits), lowest bits first."""
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32, device=words.device)
    values: torch.Tensor = (words.to(torch.int32)[:, :, None] >> shifts) & (2**bits - 1)
    return values.flatten(1)


def zero_points(stored_GO: torch.Tensor, bits: int, version: int) -> torch.Tensor:
    """Stored zero points -> real ones. Symmetric files give themselves away, whatever their metadata says.

    Symmetric quantization has its zero at 2^(bits-1): version 1 stores one less, version 2 that value.
    """
    middle = 2 ** (bits - 1)
    if bool((stored_GO == middle).all()):
        version = 2
    elif bool((stored_GO == middle - 1).all()):
        version = 1
    return stored_GO + int(version == 1)
