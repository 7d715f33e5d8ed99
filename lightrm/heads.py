"""The value head: last hidden state -> one score, always in float32.

    linear        (1, D) weight, with or without bias
    k-row linear  (k, D) weight: the mean over its k outputs
    ReLU MLP      linear, ReLU, linear

then the post-step: (x - mean) / std where the checkpoint normalizes its scores, and a sign where a model's output
grows with harm (a cost). Both are shown in the repr, since they change what a number means.

S sequences, D width, K outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightrm import ops


@dataclass(frozen=True, slots=True)
class PostStep:
    """score = sign * (x - mean) / std."""

    mean: float = 0.0
    std: float = 1.0
    negate: bool = False

    def __str__(self) -> str:
        parts = []
        if self.mean != 0.0 or self.std != 1.0:
            parts.append(f"(x - {self.mean:.4g}) / {self.std:.4g}")
        if self.negate:
            parts.append("negated: the model scores cost")
        return ", ".join(parts) or "raw"


@dataclass(frozen=True, slots=True)
class ValueHead:
    """weights: one (K, D) matrix, or two for an MLP; biases beside them, None where the file has none."""

    weights: tuple[torch.Tensor, ...]
    biases: tuple[torch.Tensor | None, ...]
    post: PostStep = PostStep()

    @torch.inference_mode()
    def __call__(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """float32 (S,)."""
        x = hidden_SD
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = ops.value_head(x if k == 0 else x.relu(), weight, bias)
        score_S = (x.mean(-1) - self.post.mean) / self.post.std
        return -score_S if self.post.negate else score_S

    def __str__(self) -> str:
        rows = self.weights[-1].shape[0]
        kind = "linear" if len(self.weights) == 1 else "ReLU MLP"
        bias = "with bias" if self.biases[-1] is not None else "no bias"
        mean = f", mean of {rows} outputs" if rows > 1 else ""
        return f"{kind}, {bias}{mean}, {self.post}"
