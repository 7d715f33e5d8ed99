"""What earlier layers lost, predicted from the rows that a matrix reads: ridge regression on `Moments`.

The ridge is chosen from RIDGES by cross-validation between the halves of the rows: D is fitted on one half, and
|y - D x|^2 = |y|^2 - 2 <D, y^T x> + <D x^T x, D> is computed on the other. Few outputs decide for all, and their D is
approached by conjugate gradients (Hestenes and Stiefel 1952): a ridge of a third of the mean or more makes them quick,
and a factorization for each ridge and half would cost more than all else. D itself is then solved for directly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightrm.loading.second_moments import Half, Moments

RIDGES = (3.0, 1.0, 0.3)  # of the mean of the second moment's diagonal; from strong to weak, each begins at the last
JUDGED = 16  # outputs that decide on a ridge for all of them, evenly spaced; up to twice as many
CLOSE = 1e-2  # what is left of y^T x when the gradients stop: a loss is off by less than a hundredth of what D explains
MOST_STEPS = 60


def judged(outputs: int) -> slice:
    """Return which outputs decide."""
    return slice(None, None, max(1, outputs // JUDGED))


def regressed(moments: Moments, given_OI: torch.Tensor | None = None) -> torch.Tensor | None:
    """Return the weight (O, I) that predicts y from x; None if a given weight, or else 0, predicts it as well.

    What is judged is what the given weight lacks; the ridge draws towards it: (y^T x + ridge given) inverse(x^T x +
    ridge). The result takes the place of `moments.cross_OI`; the halves are merged.
    """
    ridge = best_ridge(moments.halves) if len(moments.halves) > 1 else None
    whole = moments.merged()
    if ridge is None:
        return None
    more = whole.part(ridge)
    if given_OI is not None:
        moments.cross_OI.add_(given_OI, alpha=more)
    return whole.clone().damp_(more).factor_().solved_(moments.cross_OI)


def best_ridge(halves: Sequence[Half]) -> float | None:
    """Return the ridge whose D, fitted on one half, errs least on the other; None if D = 0 errs less than all."""
    losses = [0.0] * len(RIDGES)
    for fitted, other in zip(halves, reversed(halves), strict=True):
        d_JI = torch.zeros_like(fitted.judged_JI)
        for k, ridge in enumerate(RIDGES):
            d_JI = approached(d_JI, fitted, ridge)
            losses[k] += left_of(d_JI, other)
    best = min(range(len(RIDGES)), key=losses.__getitem__)
    return RIDGES[best] if losses[best] < 0 else None


def approached(d_JI: torch.Tensor, half: Half, ridge: float) -> torch.Tensor:
    """Return cross @ inverse(moment + ridge * mean of its diagonal), about; every row by itself, from d on."""
    more = half.moment.part(ridge)
    left = half.judged_JI - half.moment.times(d_JI) - more * d_JI
    enough = CLOSE**2 * half.judged_JI.square().sum(1)
    towards, size = left.clone(), left.square().sum(1)
    d_JI = d_JI.clone()
    for _ in range(MOST_STEPS):
        if bool((size <= enough).all()):
            break
        turned = half.moment.times(towards) + more * towards
        step = size / (towards * turned).sum(1).clamp(min=1e-30)
        d_JI += step[:, None] * towards
        left -= step[:, None] * turned
        before, size = size, left.square().sum(1)
        towards = left + (size / before.clamp(min=1e-30))[:, None] * towards
    return d_JI


def left_of(d_JI: torch.Tensor, half: Half) -> float:
    """Return |y - D x|^2 - |y|^2 over the rows of a half."""
    return float((d_JI * (half.moment.times(d_JI) - 2 * half.judged_JI)).sum())
