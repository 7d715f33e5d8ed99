"""Rounding that compensates its own error: GPTQ (arXiv 2210.17323), onto the grid of `schemes.int4`.

Columns are rounded one after the other. What rounding column i changed in the layer's output is undone as far as
possible by the columns that are still in float, under the second moment H = X^T X of the layer's inputs:

    w[:, j] -= (w[:, i] - q[:, i]) * U[i, j] / U[i, i]   for j > i,   U = upper Cholesky factor of inverse(H)

A group's multiplier is chosen when its first column comes up, from the weights as compensated until then. Within a
block of columns the update is applied at once, to the later blocks in one product.
"""

from __future__ import annotations

import torch

from lightrm.schemes.int4 import HIGH, LOW, Int4, best_multiplier, channel_scale, pack

DAMPING = 0.01  # of the mean of H's diagonal, added to it: the paper's value
BLOCK = 128


def compensated(weight_OI: torch.Tensor, moment_II: torch.Tensor, group: int) -> Int4:
    """Round a weight to int4; moment_II float32 (I, I), summed over calibration rows; the group divides I."""
    outputs, inputs = weight_OI.shape
    weight = weight_OI.float().clone()
    scale_O = channel_scale(weight)
    factor = inverse_factor(moment_II)
    q_OI = torch.empty(outputs, inputs, dtype=torch.int8, device=weight.device)
    multipliers = torch.empty(outputs, inputs // group, dtype=torch.int8, device=weight.device)
    step = scale_O
    for start in range(0, inputs, BLOCK):
        end = min(start + BLOCK, inputs)
        errors = torch.empty(outputs, end - start, device=weight.device)
        for i in range(start, end):
            if i % group == 0:
                multiplier = best_multiplier(weight[:, i : i + group], scale_O)
                multipliers[:, i // group] = multiplier
                step = scale_O * multiplier
            q = (weight[:, i] / step).round_().clamp_(LOW, HIGH)
            q_OI[:, i] = q.to(torch.int8)
            error = (weight[:, i] - q * step) / factor[i, i]
            weight[:, i + 1 : end] -= error[:, None] * factor[i, i + 1 : end]
            errors[:, i - start] = error
        weight[:, end:] -= errors @ factor[start:end, end:]
    return Int4(pack(q_OI, group), multipliers, scale_O)


def inverse_factor(moment_II: torch.Tensor) -> torch.Tensor:
    """Upper triangular U with U^T U = inverse(H), H damped; in float64, for H may be nearly singular."""
    moment = moment_II.double()
    diagonal = moment.diagonal()
    mean = float(diagonal.mean())
    moment = moment + torch.eye(len(moment), dtype=torch.float64, device=moment.device) * max(DAMPING * mean, 1e-12)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()
