"""int8: symmetric, one float scale a row. Of weights, a row is an output channel; of activations, a token.

    scale = max |x| / 127        q = round(x / scale), half to even        x ~ q * scale

A row of zeros has scale TINY / 127 and stays zeros. NaN or Inf in a row makes its scale NaN or Inf: what is multiplied
by it shows, and is never a plausible number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LEVELS = 2**7 - 1
TINY = 1e-30  # keeps 127 / peak finite in float32


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, C) of any float dtype -> int8 (R, C) and the float32 scale of each row (R,)."""
    x = x.float()
    peak = x.abs().amax(-1).clamp(min=TINY)
    factor = torch.full_like(peak, LEVELS) / peak  # LEVELS / peak would be the reciprocal times LEVELS, one bit off
    values = (x * factor[:, None]).round_().nan_to_num_(0, LEVELS, -LEVELS)
    return values.to(torch.int8), peak / LEVELS


def dequantize_rows(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 (R, C)."""
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

    def rows(self, start: int, end: int) -> torch.Tensor:
        """Output channels start .. end as floats, (end - start, I)."""
        return self.outputs(start, end).float()

    def outputs(self, start: int, end: int) -> Rowwise:
        """Output channels start .. end, no copy."""
        return Rowwise(self.values_OI[start:end], self.scale_O[start:end])

    def float(self) -> torch.Tensor:
        """What it stands for, float32 (O, I)."""
        return dequantize_rows(self.values_OI, self.scale_O)

    @property
    def nbytes(self) -> int:
        return self.values_OI.nbytes + self.scale_O.nbytes
