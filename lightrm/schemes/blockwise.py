"""bitsandbytes' 4-bit format: sixteen levels, and one scale for each block of consecutive numbers (arXiv 2305.14314).

    weight[n] = level[q[n]] * maximum[n / block]      n counts an O x I weight row by row; rounded to the file's dtype

The kinds "nf4" and "fp4" differ in their levels. A byte holds two numbers, the first in its high half. With double
quantization the scales (each the largest magnitude of its block) are themselves stored in 8 bits:

    maximum[b] = table[code[b]] * outer[b / outer block] + offset
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True)
class Nested:
    """Double quantization of the scales. table: float32 (256,); outer: float32, one for each `block` scales."""

    table: torch.Tensor
    outer: torch.Tensor
    block: int
    offset: float


@dataclass(frozen=True, slots=True)
class Blockwise:
    """A weight in this format.

    packed: uint8 (O * I / 2,). maximum: float32 (blocks,), or uint8 codes (blocks,) if `nested` is given. level:
    float32 (16,). dtype: of the dequantized weight.
    """

    packed: torch.Tensor
    maximum: torch.Tensor
    level: torch.Tensor
    shape: tuple[int, int]
    block: int
    kind: str
    dtype: torch.dtype
    nested: Nested | None = None

    @property
    def factors(self) -> torch.Tensor:
        return self.maximum if self.nested is None else self.nested.outer

    @property
    def nbytes(self) -> int:
        inner = 0 if self.nested is None else self.nested.table.nbytes + self.nested.outer.nbytes
        return self.packed.nbytes + self.maximum.nbytes + self.level.nbytes + inner

    def to(self, device: torch.device) -> Blockwise:
        nested = self.nested
        if nested is not None:
            nested = replace(nested, table=nested.table.to(device), outer=nested.outer.to(device))
        packed, maximum, level = (t.to(device) for t in (self.packed, self.maximum, self.level))
        return replace(self, packed=packed, maximum=maximum, level=level, nested=nested)

    def maxima(self, start: int, end: int) -> torch.Tensor:
        """Return the scales of blocks start .. end, float32."""
        codes = self.maximum[start:end]
        if self.nested is None:
            return codes
        outer = self.nested.outer[torch.arange(start, end, device=codes.device) // self.nested.block]
        return self.nested.table[codes.long()] * outer + self.nested.offset

    def rows(self, start: int, end: int) -> torch.Tensor:
        """Return output channels start .. end dequantized, (end - start, I), in `dtype`."""
        first, last = start * self.shape[1], end * self.shape[1]
        halves = self.packed[first // 2 : (last + 1) // 2]
        q = torch.stack([halves >> 4, halves & 15], 1).view(-1)[first % 2 :][: last - first]
        block, after = first // self.block, -(-last // self.block)
        spread = self.maxima(block, after).repeat_interleave(self.block)[first - block * self.block :][: last - first]
        return (self.level[q.long()] * spread).to(self.dtype).view(end - start, self.shape[1])
