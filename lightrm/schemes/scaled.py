"""8-bit weights with scales on a grid: one for the matrix, for each channel, for each group of inputs or each block.

    weight[o, i] = (q[o, i] - zero[o / R, i / C]) * scale[o / R, i / C]      rounded to `dtype`

q is int8 or an 8-bit float (e4m3, arXiv 2209.05433). R x C is the block that shares a scale; the last ones may be
smaller. No kernel of lightrm runs this form: it is widened and then rounded as the scheme asks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Scaled:
    """values: int8 or float8 (O, I). scale, zero: on the grid; zero None means 0. block: rows and columns that share a
    scale."""

    values_OI: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    block: tuple[int, int]
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.values_OI.shape[0], self.values_OI.shape[1]

    def rows(self, start: int, end: int) -> torch.Tensor:
        """Return output channels start .. end dequantized, (end - start, I), in `dtype`."""
        exact = self.values_OI[start:end].float()
        if self.zero is not None:
            exact -= self.spread(self.zero, start, end)
        return exact.mul_(self.spread(self.scale, start, end)).to(self.dtype)

    def spread(self, grid: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """Return what a grid holds for each weight of some rows, float32; one column if it is the same for all."""
        rows = grid[torch.arange(start, end) // self.block[0]].float()
        return rows if rows.shape[1] == 1 else rows.repeat_interleave(self.block[1], 1)[:, : self.shape[1]]
