"""What a fidelity measurement leaves with a model: a sentence, and how far a difference of two scores can be off."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bound:
    """The largest error of a difference between two answers to one prompt, in raw scores, over `prompts` prompts.

    A further prompt drawn like these has an error beyond it with probability 1 / (prompts + 1) at most: the last of
    N + 1 exchangeable values is the largest no more often (split conformal prediction, Vovk et al. 2005).
    """

    error: float
    prompts: int

    @property
    def confidence(self) -> float:
        return self.prompts / (self.prompts + 1)

    def __str__(self) -> str:
        return f"{self.error:.4f}, the largest error of a difference on {self.prompts} prompts"


@dataclass(frozen=True, slots=True)
class FidelityNote:
    """summary: one line; reference: the scheme it was measured against; pair_error: of differences, in raw scores."""

    summary: str
    reference: str
    pair_error: Bound
