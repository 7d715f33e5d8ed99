"""The gate of a head: an MLP that weighs the head's outputs, always in float32.

    linear, activation, ..., linear; then softmax if it is one; times a factor; then a transform of the weights

ArmoRM and QRM read it at the end of the prompt, in the same sequence as the answer; URM where the answer is read.

S sequences, D width, K outputs of the head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from lightrm.architecture import GateForm
from lightrm.kernels import passes


def selu(x_SD: torch.Tensor) -> torch.Tensor:
    """SELU (arXiv 1706.02515), row by row: a vector's last numbers may be computed in another way than its first."""
    return torch.stack([functional.selu(row) for row in x_SD]) if len(x_SD) else x_SD


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"relu": torch.relu, "selu": selu}


@dataclass(frozen=True, slots=True)
class Gate:
    """weights, biases: of the layers, (rows, D) first. factor: (1,). transform: (K, K) or None, see `__call__`."""

    form: GateForm
    weights: tuple[torch.Tensor, ...]
    biases: tuple[torch.Tensor | None, ...]
    factor: torch.Tensor
    transform_KK: torch.Tensor | None = None

    def __call__(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """Return the weight of each output, float32 (S, K): the gate's own times the transposed transform."""
        act = ACTIVATIONS[self.form.activation]
        x = hidden_SD
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = passes.value_head(x if k == 0 else act(x), weight, bias)
        x = (x.softmax(-1) if self.form.softmax else x) * self.factor
        return x if self.transform_KK is None else passes.value_head(x, self.transform_KK, None)

    def __str__(self) -> str:
        where = "the prompt" if self.form.pattern else "the answer"
        return f"a gate of {len(self.weights)} layers on {where}"
