"""int8, symmetric, with one float scale per row. A row is an output channel of a weight, or a token of activations.

    scale = max |x| / 127        q = round(x / scale), half to even        x ~ q * scale

A row of zeros gets the scale TINY / 127 and stays zero. If a row holds NaN or Inf, its scale is NaN or Inf, so that
every product with it is visibly wrong and never a plausible number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LEVELS = 2**7 - 1
TINY = 1e-30  # keeps 127 / peak finite in float32


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize (R, C) of any float dtype. Returns int8 (R, C) and the scale of each row, float32 (R,)."""
    x = x.float()
    peak = peaks(x)
    factor = torch.full_like(peak, LEVELS) / peak  # LEVELS / peak would be the reciprocal times LEVELS, one bit off
    values = (x * factor[:, None]).round_().nan_to_num_(0, LEVELS, -LEVELS)
    return values.to(torch.int8), peak / LEVELS


def peaks(x: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude of each row, float32; its scale is that over LEVELS."""
    return x.abs().amax(-1).clamp(min=TINY)


def dequantize_rows(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return float32 (R, C)."""
    return values.float() * scale[:, None]


@dataclass(frozen=True, slots=True)
class Rowwise:
    """An int8 weight: values int8 (O, I), scale float32 (O,)."""

    values_OI: torch.Tensor
    scale_O: torch.Tensor

    @property
    def factors(self) -> torch.Tensor:
        return self.scale_O

    @property
    def shape(self) -> tuple[int, int]:
        return self.values_OI.shape[0], self.values_OI.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def to(self, device: torch.device) -> Rowwise:
        return Rowwise(self.values_OI.to(device), self.scale_O.to(device))

    def reordered(self, order_O: torch.Tensor) -> Rowwise:
        """Return the output channels in another order."""
        return Rowwise(self.values_OI[order_O], self.scale_O[order_O])

    def rows(self, start: int, end: int) -> torch.Tensor:
        """Return output channels start .. end dequantized, float32 (end - start, I)."""
        return self.outputs(start, end).float()

    def outputs(self, start: int, end: int) -> Rowwise:
        """Return output channels start .. end without a copy."""
        return Rowwise(self.values_OI[start:end], self.scale_O[start:end])

    def float(self) -> torch.Tensor:
        """Return the dequantized weight, float32 (O, I)."""
        return dequantize_rows(self.values_OI, self.scale_O)

    @property
    def nbytes(self) -> int:
        return self.values_OI.nbytes + self.scale_O.nbytes
