"""Float rows in, a weight in its final format out: `Packer` rounds row by row, `WholePacker` a whole matrix.

Rows arrive a few at a time, so that there is never a second copy of the matrix. The signal and the noise are summed on
the way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from lightrm.kernels import products
from lightrm.kernels.operands import Held, Parts
from lightrm.schemes import int4, int8
from lightrm.schemes.blockwise import Blockwise
from lightrm.schemes.grammar import Scheme
from lightrm.schemes.grouped import Grouped, joined
from lightrm.schemes.quality import energies

PACKED_AT_ONCE = 2**18  # numbers that are rounded at one time


def packer_for(
    scheme: Scheme, outputs: int, inputs: int, device: torch.device, measures: bool = True
) -> Packer | WholePacker:
    """Return the packer of a scheme. measures: sum the signal and the noise."""
    if scheme.weights == "nf4":
        return WholePacker(products.quantize_blockwise, device, measures)
    return Packer(scheme, outputs, inputs, device, measures)


class Packer:
    """Packs float, int8 or int4."""

    def __init__(self, scheme: Scheme, outputs: int, inputs: int, device: torch.device, measures: bool = True) -> None:
        self.scheme, self.measures = scheme, measures
        self.signal = self.noise = 0.0
        self.group = int4.group_for(inputs, scheme.group) if scheme.weights == "int4" else inputs
        empty = partial(torch.empty, device=device)
        if scheme.weights == "float":
            self.held = [empty(outputs, inputs, dtype=scheme.dtype)]
        elif scheme.weights == "int8":
            self.held = [empty(outputs, inputs, dtype=torch.int8), empty(outputs)]
        else:
            multipliers = empty(outputs, inputs // self.group, dtype=torch.int8)
            self.held = [empty(outputs, inputs // 2, dtype=torch.uint8), multipliers, empty(outputs)]

    def put(self, start: int, rows_OI: torch.Tensor) -> None:
        """Place rows from `start` on."""
        for part in torch.split(rows_OI, max(1, PACKED_AT_ONCE // rows_OI.shape[1])):
            rows = part.to(self.held[0].device)
            parts = self.pack(rows)
            self.place(start, parts)
            if self.measures:
                signal, noise = energies(rows, self.stands_for(parts))
                self.signal, self.noise = self.signal + signal, self.noise + noise
            start += len(rows)

    def place(self, start: int, parts: tuple[torch.Tensor, ...]) -> None:
        """Place rows in the final format, from `start` on."""
        for whole, made in zip(self.held, parts, strict=True):
            whole[start : start + len(made)] = made

    def pack(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return some rows in the final format."""
        if self.scheme.weights == "float":
            return (rows.to(self.scheme.dtype),)
        if self.scheme.weights == "int8":
            return int8.quantize_rows(rows)
        made = int4.quantize(rows, self.group)
        return made.packed, made.multiplier_OG, made.scale_O

    def stands_for(self, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return packed rows dequantized, float32."""
        if self.scheme.weights == "float":
            return parts[0].float()
        if self.scheme.weights == "int8":
            return int8.dequantize_rows(*parts)
        return int4.Int4(*parts).float()

    def weight(self) -> Held:
        if self.scheme.weights == "float":
            return self.held[0]
        if self.scheme.weights == "int8":
            return int8.Rowwise(self.held[0], self.held[1])
        return int4.Int4(*self.held)


class WholePacker:
    """Packs another program's format from a whole matrix. Each part of a fused layer is rounded by itself."""

    def __init__(
        self, make: Callable[[torch.Tensor], Grouped | Blockwise], device: torch.device, measures: bool = True
    ) -> None:
        self.make, self.device, self.measures = make, device, measures
        self.parts: list[Grouped | Blockwise] = []
        self.signal = self.noise = 0.0

    def put(self, start: int, rows_OI: torch.Tensor) -> None:
        made = self.make(rows_OI.to(self.device))
        self.parts.append(made)
        if not self.measures:
            return
        step = max(1, PACKED_AT_ONCE // rows_OI.shape[1])
        for at, rows in zip(range(0, len(rows_OI), step), torch.split(rows_OI, step), strict=True):
            signal, noise = energies(rows.to(self.device), made.rows(at, at + len(rows)))
            self.signal, self.noise = self.signal + signal, self.noise + noise

    def place(self, start: int, rows: Grouped) -> None:
        """Place rows in the final format, from `start` on: with those before them they are one matrix."""
        before = [part for part in self.parts if isinstance(part, Grouped)]
        assert start == sum(part.shape[0] for part in before)
        self.parts = [joined([*before, rows])]

    def weight(self) -> Held:
        return Parts(tuple(self.parts))
