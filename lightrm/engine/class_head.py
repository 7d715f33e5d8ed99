"""What makes scores of the outputs of a class of transformers, which has computed its own head already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True)
class ClassHead:
    """text: the head's tensors, in words. names: of the outputs, if they are attributes. weights: none, or one matrix
    (1, K) that makes one score of K outputs. each: return the outputs as they are."""

    text: str
    names: tuple[str, ...] = ()
    weights: tuple[torch.Tensor, ...] = ()
    each: bool = False

    def __call__(self, outputs_SK: torch.Tensor) -> torch.Tensor:
        """Return the scores, float32 (S,) on the CPU, or (S, K) if each output counts by itself."""
        outputs_SK = outputs_SK.float().cpu()
        if self.each:
            return outputs_SK
        return (outputs_SK @ self.weights[0].T)[:, 0] if self.weights else outputs_SK[:, 0]

    @property
    def undecided(self) -> bool:
        return bool(self.names)

    def attributes(self) -> ClassHead:
        return replace(self, each=True)

    def weighed(self, weights: Sequence[float]) -> ClassHead:
        return replace(self, names=(), weights=(torch.tensor([list(weights)], dtype=torch.float32),))

    def __str__(self) -> str:
        return f"{self.text}, {len(self.names)} attributes" if self.names else self.text
