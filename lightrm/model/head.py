"""The value head: last hidden state -> one score, always in float32.

    linear        (1, D) weight, with or without bias
    k-row linear  (k, D) weight: the mean over its k outputs
    ReLU MLP      linear, ReLU, linear

Then the post-step: (x - mean) / std if the checkpoint normalizes its scores, and a sign if the model's output grows
with harm (a cost). The repr shows both, since they change what a number means.

S sequences, D width, K outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lightrm.architecture import PostStep
from lightrm.kernels import passes


@dataclass(frozen=True, slots=True)
class ValueHead:
    """weights: one (K, D) matrix, or two for an MLP. biases: one for each weight, None if the file has none."""

    weights: tuple[torch.Tensor, ...]
    biases: tuple[torch.Tensor | None, ...]
    post: PostStep = field(default_factory=PostStep)

    @torch.inference_mode()
    def __call__(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """Return the scores, float32 (S,), of hidden states (S, D)."""
        x = hidden_SD
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = passes.value_head(x if k == 0 else x.relu(), weight, bias)
        score_S = (x.mean(-1) - self.post.mean) / self.post.std
        return -score_S if self.post.negate else score_S

    def __str__(self) -> str:
        rows = self.weights[-1].shape[0]
        kind = "linear" if len(self.weights) == 1 else "ReLU MLP"
        bias = "with bias" if self.biases[-1] is not None else "no bias"
        mean = f", mean of {rows} outputs" if rows > 1 else ""
        return f"{kind}, {bias}{mean}, {self.post}"
