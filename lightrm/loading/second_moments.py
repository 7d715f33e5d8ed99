"""Sums over calibration rows, pack by pack: what a matrix reads, and what its output lacks. See `Moments`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from lightrm.kernels.products import large_product
from lightrm.loading.symmetric import Symmetric

Judge = Callable[[torch.Tensor], torch.Tensor]  # y (T, O) -> those few outputs by which a regression is judged, (T, J)
HalfRows = tuple[int, torch.Tensor, torch.Tensor]  # 0 or 1; x (T, I), y (T, O)


@dataclass(frozen=True, slots=True)
class Half:
    """Sums over one half of the rows. judged_JI: sum of judge(y)^T (x - mean); moment: of (x - mean)^T (x - mean)."""

    judged_JI: torch.Tensor
    moment: Symmetric


@dataclass(slots=True)
class Moments:
    """Sums over all rows: x (I,) that a matrix reads, and y (O,) that its output lacks; float32.

    mean_I: mean of x. lack_O: mean of y. cross_OI: sum of y^T (x - mean). halves: the rest, once for the even and once
    for the odd packs of rows; only one if there is a single pack, or after `merged`.
    """

    mean_I: torch.Tensor
    lack_O: torch.Tensor
    cross_OI: torch.Tensor
    halves: tuple[Half, ...]

    @classmethod
    def of(cls, rows: Iterable[HalfRows], judge: Judge, centered: bool = True) -> Moments:
        """Sum over rows, in one run through them: around the mean of the first ones, and corrected for the mean of all
        at the end. centered=False takes 0 for the mean of x."""
        sums: dict[int, Sums] = {}
        center_I = cross_OI = lack_O = torch.empty(0)
        for half, x_TI, y_TO in rows:
            if not sums:
                center_I = x_TI.mean(0) if centered else torch.zeros_like(x_TI[0])
                lack_O, cross_OI = torch.zeros_like(y_TO[0]), y_TO.new_zeros(y_TO.shape[1], x_TI.shape[1])
            around_TI, judged_TJ = x_TI - center_I, judge(y_TO)
            if half not in sums:
                sums[half] = Sums.zeros(judged_TJ.shape[1], around_TI)
            sums[half].add(around_TI, judged_TJ)
            cross_OI += large_product(y_TO.T, around_TI.T)
            lack_O += y_TO.sum(0)
        tokens = sum(part.tokens for part in sums.values())
        off_I = torch.stack([part.x_I for part in sums.values()]).sum(0) / tokens
        if centered:
            cross_OI -= lack_O[:, None] * off_I
            center_I = center_I + off_I
        halves = tuple(sums[half].around(off_I if centered else None) for half in sorted(sums))
        return cls(center_I, lack_O / tokens, cross_OI, halves)

    def merged(self) -> Symmetric:
        """Return the second moment of all rows. It takes the place of the first half's, and the others are dropped."""
        first, *others = self.halves
        for other in others:
            first.moment.add_(other.moment)
        self.halves = (first,)
        return first.moment


@dataclass(slots=True)
class Sums:
    """What is summed over one half, around a number that is close to the mean."""

    tokens: int
    x_I: torch.Tensor
    y_J: torch.Tensor
    judged_JI: torch.Tensor
    moment: Symmetric

    @classmethod
    def zeros(cls, judged: int, like_TI: torch.Tensor) -> Sums:
        width = like_TI.shape[1]
        wide, moment = like_TI.new_zeros(judged, width), Symmetric.zeros(width, like_TI.device)
        return cls(0, like_TI.new_zeros(width), like_TI.new_zeros(judged), wide, moment)

    def add(self, x_TI: torch.Tensor, judged_TJ: torch.Tensor) -> None:
        self.tokens += len(x_TI)
        self.x_I += x_TI.sum(0)
        self.y_J += judged_TJ.sum(0)
        self.judged_JI.addmm_(judged_TJ.T, x_TI)
        self.moment.add_rows_(x_TI)

    def around(self, off_I: torch.Tensor | None) -> Half:
        """Return the sums around a mean that is off by so much."""
        if off_I is not None:
            self.judged_JI -= self.y_J[:, None] * off_I
            self.moment.add_pair_(self.tokens / 2 * off_I - self.x_I, off_I)
        return Half(self.judged_JI, self.moment)
