"""Rounding that compensates its own error: GPTQ (arXiv 2210.17323), to 4 bits in groups or 8 bits per row.

Columns are rounded one after the other. The change that rounding a column makes to the layer's output is undone as far
as possible by the columns that are still in float, under the second moment H = X^T X of the layer's inputs. With R
upper triangular, R R^T = H, a column has become, when its turn comes,

    w[:, i] + sum over j < i of (w[:, j] - q[:, j]) R[j, i] / R[i, i]

where w is the weight as it was. This is the paper's update, whose factor of inverse(H) is inverse(R), without the
inverse (the same as Babai's nearest plane: arXiv 2507.18553). What earlier columns owe to a block of columns is one
product; within the block, `kernels.passes.round_columns` applies the paper's update with the inverse of R's block. The
step of a group is chosen when its first column is reached, from the weights as compensated so far.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from lightrm.kernels import passes
from lightrm.kernels.products import large_product
from lightrm.loading.symmetric import Factor, Symmetric, inverse
from lightrm.schemes import grouped, int4, int8
from lightrm.schemes.int4 import HIGH, LOW

DAMPING = 0.01  # of the mean of H's diagonal, added to it: the paper's value
BLOCK = 128


def compensated(
    weight_OI: torch.Tensor,
    factor: Factor,
    group: int,
    choose: Callable[[torch.Tensor], torch.Tensor],
    bounds: tuple[int, int] = (LOW, HIGH),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round a weight, float32, to q * step. Returns q int8 (O, I) within `bounds`, step (O, G) in the dtype that
    `choose` returns, and what is lost, weight - q * step, float32 (O, I).

    factor: see `factored`. choose: weights of one group (O, K), as compensated so far -> their steps (O,). group
    divides I.
    """
    outputs, inputs = weight_OI.shape
    lost_OI = weight_OI.T.clone(memory_format=torch.contiguous_format).T  # w, then w - q * step; columns without gaps
    q_OI = torch.empty(outputs, inputs, dtype=torch.int8, device=weight_OI.device)
    steps = [choose(lost_OI)] if group == inputs else []
    side = BLOCK if group == inputs else max(group, BLOCK - BLOCK % group)
    for start in range(0, inputs, side):
        end = min(start + side, inputs)
        upper = factor.columns(start, end)
        within = inverse(upper[start:]).float()
        was = lost_OI[:, start:end]
        owed_BO = large_product(upper[:start].T, lost_OI[:, :start])
        now = large_product(owed_BO.T.contiguous(), within.T).add_(was)
        for first in range(0, end - start, min(group, end - start)):
            last = min(first + group, end - start)
            if group < inputs:
                steps.append(choose(now[:, first:last]))
            q, _ = passes.round_columns(now, range(first, last), end - start, steps[-1].float(), within, bounds)
            q_OI[:, start + first : start + last] = q
            was[:, first:last] -= q * steps[-1].float()[:, None]
    return q_OI, torch.stack(steps, 1), lost_OI


def compensated_int4(weight_OI: torch.Tensor, factor: Factor, group: int) -> tuple[int4.Int4, torch.Tensor]:
    """Round to `schemes.int4`, whose step is the channel's scale times a small integer. Returns what is lost, too."""
    scale_O = int4.channel_scale(weight_OI)
    q_OI, step_OG, lost_OI = compensated(
        weight_OI, factor, group, lambda part: scale_O * int4.best_multiplier(part, scale_O)
    )
    multiplier_OG = (step_OG / scale_O[:, None]).round().to(torch.int8)
    return int4.Int4(int4.pack(q_OI, multiplier_OG), multiplier_OG, scale_O), lost_OI


def compensated_int8(weight_OI: torch.Tensor, factor: Factor) -> tuple[int8.Rowwise, torch.Tensor]:
    """Round to `schemes.int8`, with a float32 scale for each row. Returns what is lost, too."""
    scale_O = int8.peaks(weight_OI) / int8.LEVELS
    inputs, bounds = weight_OI.shape[1], (-int8.LEVELS, int8.LEVELS)
    q_OI, _, lost_OI = compensated(weight_OI, factor, inputs, lambda row: scale_O, bounds)
    return int8.Rowwise(q_OI, scale_O), lost_OI


def compensated_grouped(
    weight_OI: torch.Tensor, factor: Factor, group: int, bits: int = 4
) -> tuple[grouped.Grouped, torch.Tensor]:
    """Round to symmetric GPTQ values, with a float16 step for each group. Returns what is lost, too."""
    step = partial(grouped.best_step, bits=bits)
    q_OI, step_OG, lost_OI = compensated(weight_OI, factor, group, step, grouped.bounds(bits))
    return grouped.pack(q_OI, step_OG, bits), lost_OI


def factored(moment: Symmetric) -> Factor:
    """Return R of a second moment (I, I), summed over calibration rows, and damped. It takes the moment's place."""
    return moment.damp_(moment.part(DAMPING)).factor_()
