"""One linear layer. The model text calls it; only this file and the rooms below know how the weight is held."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightrm import ops


@dataclass(frozen=True, slots=True)
class Linear:
    """weight_OI (O, I) in the compute dtype, bias_O (O,) or None."""

    weight_OI: torch.Tensor
    bias_O: torch.Tensor | None = None

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        return ops.linear(x_TI, self.weight_OI, self.bias_O)
