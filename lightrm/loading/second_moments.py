"""Sums over calibration rows, pack by pack: what a matrix reads, and what is to be predicted from it. See `Moments`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from lightrm.kernels.products import add_large_product
from lightrm.loading.symmetric import Symmetric

# x (T, I), y (T, O) -> what few outputs lack, by which a regression is judged, (T, J)
Judge = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
HalfRows = tuple[int, torch.Tensor, torch.Tensor]  # 0 or 1; x (T, I), y (T, O)


@dataclass(frozen=True, slots=True)
class Half:
    """Sums over one half of the rows. judged_JI: of judge(x, y)^T (x - mean); moment: of (x - mean)^T (x - mean)."""

    judged_JI: torch.Tensor
    moment: Symmetric


@dataclass(slots=True)
class Moments:
    """Sums over all rows: x (I,) that a matrix reads, and y (O,) that is to be predicted; float32.

    mean_I, mean_O: of x and of y. cross_OI: sum of y^T (x - mean); its columns have no gaps. halves: the rest, once for
    the even and once for the odd packs of rows; only one if there is a single pack, or after `merged`.
    """

    mean_I: torch.Tensor
    mean_O: torch.Tensor
    cross_OI: torch.Tensor
    halves: tuple[Half, ...]

    @classmethod
    def of(cls, rows: Iterable[HalfRows], judge: Judge, centered: bool = True) -> Moments:
        """Sum over rows, in one run through them: around the mean of the first ones, and corrected for the mean of all
        at the end. centered=False takes 0 for the mean of x."""
        sums: dict[int, Sums] = {}
        center_I = cross_OI = sum_O = torch.empty(0)
        for half, x_TI, y_TO in rows:
            if not sums:
                center_I = x_TI.mean(0) if centered else torch.zeros_like(x_TI[0])
                sum_O, cross_OI = torch.zeros_like(y_TO[0]), y_TO.new_zeros(x_TI.shape[1], y_TO.shape[1]).T
            around_IT = x_TI.T.clone(memory_format=torch.contiguous_format).sub_(center_I[:, None])
            judged_TJ = judge(x_TI, y_TO)
            if half not in sums:
                sums[half] = Sums.zeros(judged_TJ.shape[1], len(center_I), x_TI.device)
            sums[half].add(around_IT, judged_TJ)
            add_large_product(cross_OI.T, around_IT, y_TO.T.contiguous())
            sum_O += y_TO.sum(0)
            del around_IT, x_TI, y_TO  # before the next rows are made
        tokens = sum(part.tokens for part in sums.values())
        off_I = torch.stack([part.x_I for part in sums.values()]).sum(0) / tokens
        if centered:
            cross_OI.addr_(sum_O, off_I, alpha=-1)
            center_I = center_I + off_I
        halves = tuple(sums[half].around(off_I if centered else None) for half in sorted(sums))
        return cls(center_I, sum_O / tokens, cross_OI, halves)

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
    def zeros(cls, judged: int, width: int, device: torch.device) -> Sums:
        made = partial(torch.zeros, device=device)
        return cls(0, made(width), made(judged), made(judged, width), Symmetric.zeros(width, device))

    def add(self, x_IT: torch.Tensor, judged_TJ: torch.Tensor) -> None:
        self.tokens += len(judged_TJ)
        self.x_I += x_IT.sum(1)
        self.y_J += judged_TJ.sum(0)
        self.judged_JI.addmm_(judged_TJ.T, x_IT.T)
        self.moment.add_rows_(x_IT)

    def around(self, off_I: torch.Tensor | None) -> Half:
        """Return the sums around a mean that is off by so much."""
        if off_I is not None:
            self.judged_JI.addr_(self.y_J, off_I, alpha=-1)
            self.moment.add_pair_(self.tokens / 2 * off_I - self.x_I, off_I)
        return Half(self.judged_JI, self.moment)
