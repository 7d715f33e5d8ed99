"""The value head: last hidden state -> one score, or one number for each attribute, always in float32.

    linear        (K, D) weight, with or without bias
    ReLU MLP      linear, ReLU, linear
    gated         linear, and a network that weighs its outputs (`model.gate`)

The K outputs become one score by their mean (Ziya), or by the gate's weights. If they are attributes, each with a name
of its own, there is no score until somebody says which one, or how they are weighed.

Then the post-step: (x - mean) / std if the checkpoint normalizes its scores, a sign if the model's output grows with
harm (a cost), a sigmoid if the score is a probability. The repr shows all, since they change what a number means.

S sequences, D width, K outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from lightrm.architecture import PostStep
from lightrm.kernels import passes
from lightrm.model.gate import Gate


@dataclass(frozen=True, slots=True)
class ValueHead:
    """weights: one (K, D) matrix, or two for an MLP. biases: one for each weight, None if the file has none.

    names: of the outputs, if they are attributes; empty if they are not. each: return the K outputs as they are.
    """

    weights: tuple[torch.Tensor, ...]
    biases: tuple[torch.Tensor | None, ...]
    post: PostStep = field(default_factory=PostStep)
    names: tuple[str, ...] = ()
    gate: Gate | None = None
    each: bool = False

    @torch.inference_mode()
    def __call__(self, hidden_SD: torch.Tensor, prompt_SD: torch.Tensor | None = None) -> torch.Tensor:
        """Return the scores, float32 (S,), or (S, K) if each output counts by itself.

        hidden: at the token that is read, (S, D). prompt: at the end of the prompt, for a gate that reads there.
        """
        x = hidden_SD
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = passes.value_head(x if k == 0 else x.relu(), weight, bias)
        if self.each:
            return x
        if self.gate is not None:
            return (x * self.gate(hidden_SD if prompt_SD is None else prompt_SD)).sum(-1)
        score_S = (x.mean(-1) - self.post.mean) / self.post.std
        score_S = -score_S if self.post.negate else score_S
        return probability(score_S) if self.post.probability else score_S

    @property
    def outputs(self) -> int:
        return len(self.weights[-1])

    @property
    def undecided(self) -> bool:
        """Whether there are several attributes, and nothing makes one score of them."""
        return bool(self.names) and self.outputs > 1 and self.gate is None

    def attributes(self) -> ValueHead:
        """Return the head that gives every attribute by itself."""
        return replace(self, gate=None, each=True)

    def weighed(self, weights: Sequence[float]) -> ValueHead:
        """Return the head with one output: the sum of the attributes, each times its weight."""
        weight_KD, bias_K = self.weights[-1], self.biases[-1]
        by = torch.tensor(weights, dtype=torch.float32, device=weight_KD.device)
        bias = None if bias_K is None else (by @ bias_K)[None]
        return replace(
            self,
            weights=(*self.weights[:-1], (by @ weight_KD)[None]),
            biases=(*self.biases[:-1], bias),
            names=(),
            gate=None,
        )

    def __str__(self) -> str:
        rows = self.outputs
        kind = "linear" if len(self.weights) == 1 else "ReLU MLP"
        bias = "with bias" if self.biases[-1] is not None else "no bias"
        if self.names:
            many = f", {rows} attributes" + ("" if self.gate is None else f" weighed by {self.gate}")
        else:
            many = f", mean of {rows} outputs" if rows > 1 else ""
        return f"{kind}, {bias}{many}, {self.post}"


def probability(logit_S: torch.Tensor) -> torch.Tensor:
    """Return 1 / (1 + exp(-x)) of each number, float32 (S,). One by one, in float64: a vector's last numbers may be
    computed in another way than its first ones."""
    found = [1 / (1 + math.exp(-x)) if not x < -700 else 0.0 for x in logit_S.tolist()]
    return torch.tensor(found, dtype=torch.float32)
