"""Rounding that compensates its own error: GPTQ (arXiv 2210.17323), to 4 bits in groups or 8 bits per row.

Columns are rounded one after the other. The change that rounding column i makes to the layer's output is undone as far
as possible by the columns that are still in float, under the second moment H = X^T X of the layer's inputs:

    w[:, j] -= (w[:, i] - q[:, i]) * U[i, j] / U[i, i]   for j > i,   U = upper Cholesky factor of inverse(H)

The step of a group is chosen when its first column is reached, from the weights as compensated so far. The update is
applied at once within a block of columns (`kernels.passes.round_columns`), and to later blocks as one product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from lightrm.kernels import passes
from lightrm.schemes import grouped, int4, int8
from lightrm.schemes.int4 import HIGH, LOW

DAMPING = 0.01  # of the mean of H's diagonal, added to it: the paper's value
RIDGES = (3.0, 1.0, 0.3)  # of the same mean, for `regressed`
JUDGED = 512  # outputs that decide on a ridge for all of them
BLOCK = 128
SOLVED_AT_ONCE = 512


def compensated(
    weight_OI: torch.Tensor,
    moment_II: torch.Tensor,
    group: int,
    choose: Callable[[torch.Tensor], torch.Tensor],
    bounds: tuple[int, int] = (LOW, HIGH),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight to q * step. Returns q int8 (O, I) within `bounds`, and step (O, G) in the dtype that `choose`
    returns.

    moment_II: float32 (I, I), summed over calibration rows. choose: weights of one group (O, K), as compensated so far
    -> their steps (O,). group divides I.
    """
    inputs = weight_OI.shape[1]
    weight = weight_OI.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    factor = inverse_factor(moment_II)
    values: list[torch.Tensor] = []
    steps: list[torch.Tensor] = []
    for start in range(0, inputs, BLOCK):
        end = min(start + BLOCK, inputs)
        errors: list[torch.Tensor] = []
        for first, last in pairwise([start, *range(start - start % group + group, end, group), end]):
            if first % group == 0:
                steps.append(choose(weight[:, first : first + group]))
            q, error = passes.round_columns(weight, range(first, last), end, steps[-1].float(), factor, bounds)
            values.append(q)
            errors.append(error)
        weight[:, end:].addmm_(torch.cat(errors, 1), factor[start:end, end:], alpha=-1)
    return torch.cat(values, 1), torch.stack(steps, 1)


def compensated_int4(weight_OI: torch.Tensor, moment_II: torch.Tensor, group: int) -> int4.Int4:
    """Round to `schemes.int4`, whose step is the channel's scale times a small integer."""
    scale_O = int4.channel_scale(weight_OI)
    q_OI, step_OG = compensated(weight_OI, moment_II, group, lambda part: scale_O * int4.best_multiplier(part, scale_O))
    multiplier_OG = (step_OG / scale_O[:, None]).round().to(torch.int8)
    return int4.Int4(int4.pack(q_OI, multiplier_OG), multiplier_OG, scale_O)


def compensated_int8(weight_OI: torch.Tensor, moment_II: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to `schemes.int8`: int8 (O, I) and a float32 scale for each row."""
    _, scale_O = int8.quantize_rows(weight_OI)
    inputs = weight_OI.shape[1]
    q_OI, _ = compensated(weight_OI, moment_II, inputs, lambda row: scale_O, (-int8.LEVELS, int8.LEVELS))
    return q_OI, scale_O


def compensated_grouped(weight_OI: torch.Tensor, moment_II: torch.Tensor, group: int, bits: int = 4) -> grouped.Grouped:
    """Round to symmetric GPTQ values, with a float16 step for each group."""
    step = partial(grouped.best_step, bits=bits)
    return grouped.pack(*compensated(weight_OI, moment_II, group, step, grouped.bounds(bits)), bits)


def inverse_factor(moment_II: torch.Tensor) -> torch.Tensor:
    """Return upper triangular U with U^T U = inverse(H), H damped. Computed in float64, since H may be nearly singular.

    U is the inverse of R, upper triangular with R R^T = H. R is found as the Cholesky factor of H with rows and columns
    in reverse order, reversed back.
    """
    reversed_II = damp(moment_II.flip(0, 1).double(), DAMPING)
    return triangular_inverse(torch.linalg.cholesky(reversed_II).flip(0, 1)).float()


def damp(moment_II: torch.Tensor, share: float) -> torch.Tensor:
    """Add a share of the diagonal's mean to the diagonal, in place."""
    diagonal = moment_II.diagonal()
    diagonal += max(share * float(diagonal.mean()), 1e-12)
    return moment_II


def triangular_inverse(upper_II: torch.Tensor) -> torch.Tensor:
    """Return the inverse of an upper triangular matrix, contiguous. A library's solver would take the identity as a
    full matrix; this divides the matrix into halves:

    inverse([A B; 0 C]) = [inverse(A), -inverse(A) B inverse(C); 0, inverse(C)]
    """
    size = len(upper_II)
    if size <= SOLVED_AT_ONCE:
        solved: torch.Tensor = torch.linalg.solve_triangular(upper_II, torch.eye(size).to(upper_II), upper=True)
        return solved.contiguous()
    half = size // 2
    left, right = triangular_inverse(upper_II[:half, :half]), triangular_inverse(upper_II[half:, half:])
    found = torch.zeros_like(upper_II, memory_format=torch.contiguous_format)
    found[:half, :half], found[half:, half:] = left, right
    found[:half, half:] = -(left @ upper_II[:half, half:] @ right)
    return found


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums over all rows: x (I,) that a matrix reads, and y (O,) that its output lacks; float32.

    mean_I: mean of x. lack_O: mean of y. halves: sum y^T (x - mean) (O, I) and sum (x - mean)^T (x - mean) (I, I), once
    for the even and once for the odd packs of rows; only one if there is a single pack.
    """

    mean_I: torch.Tensor
    lack_O: torch.Tensor
    halves: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    @classmethod
    def of(cls, inputs: Sequence[torch.Tensor], lacking: Iterable[torch.Tensor], centered: bool = True) -> Moments:
        """Sum over packs. inputs, lacking: (T, I) and (T, O) for each pack; centered=False takes 0 for the mean of
        x."""
        tokens, width = sum(map(len, inputs)), inputs[0].shape[1]
        sums = torch.stack([x.sum(0) for x in inputs])
        mean_I = sums.sum(0) / tokens if centered else sums.new_zeros(width)
        lack: list[torch.Tensor] = []
        halves: list[tuple[torch.Tensor, torch.Tensor]] = []
        for k, (x_TI, y_TO) in enumerate(zip(inputs, lacking, strict=True)):
            if k < 2:
                halves.append((x_TI.new_zeros(y_TO.shape[1], width), x_TI.new_zeros(width, width)))
            cross_OI, moment_II = halves[k % 2]
            around = x_TI - mean_I
            cross_OI.addmm_(y_TO.T, around)
            moment_II.addmm_(around.T, around)
            lack.append(y_TO.sum(0))
        return cls(mean_I, torch.stack(lack).sum(0) / tokens, tuple(halves))

    def through(self, weight_OI: torch.Tensor) -> Moments:
        """Return the sums for a lack of weight @ y instead of y, without a product for every row."""
        halves = tuple((weight_OI @ cross, moment) for cross, moment in self.halves)
        return Moments(self.mean_I, weight_OI @ self.lack_O, halves)

    @property
    def moment_II(self) -> torch.Tensor:
        """The second moment of all rows."""
        first, *others = (moment for _, moment in self.halves)
        return sum(others, first)


def regressed(halves: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor | None:
    """Return the weight D (O, I) that predicts outputs y from rows x, by ridge regression; None if it would not help.

    halves: (sum y^T x, sum x^T x) of two halves of the rows, float32 (O, I) and (I, I). The ridge is chosen from RIDGES
    by cross-validation: D is fitted on one half, and |y - D x|^2 = |y|^2 - 2 <D, y^T x> + <D x^T x, D> is computed on
    the other. If there are many outputs, JUDGED of them, evenly spaced, decide.
    """
    every = max(1, len(halves[0][0]) // JUDGED)
    asked = [(cross[::every], moment) for cross, moment in halves]
    losses = []
    for ridge in RIDGES:
        made = [ridge_regression(*half, ridge) for half in asked]
        losses.append(sum(left_of(d, *half) for d, half in zip(made, reversed(asked), strict=True)))
    best = min(range(len(RIDGES)), key=losses.__getitem__)
    if not losses[best] < 0:
        return None
    cross, moment = (a + b for a, b in zip(*halves, strict=True))
    return ridge_regression(cross, moment, RIDGES[best])


def ridge_regression(cross_OI: torch.Tensor, moment_II: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return cross @ inverse(moment + ridge * mean of its diagonal)."""
    factor = torch.linalg.cholesky(damp(moment_II.clone(), ridge))
    solved: torch.Tensor = torch.cholesky_solve(cross_OI.T, factor).T
    return solved


def left_of(d_OI: torch.Tensor, cross_OI: torch.Tensor, moment_II: torch.Tensor) -> float:
    """Return |y - D x|^2 - |y|^2 over rows with these sums."""
    return float((d_OI * (d_OI @ moment_II - 2 * cross_OI)).sum())
