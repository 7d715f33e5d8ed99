"""What a fidelity measurement leaves with a model: a sentence, and how far a difference of two scores can be off."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def order_error(exact: NDArray[np.float64], quick: NDArray[np.float64]) -> float:
    """The largest error of a difference that could have changed the order of its two answers; 0 if none could.

    exact, quick: by how much the first answer of each pair scores above the second, float64 (pairs,). An error can
    change an order, by one of its signs, where it is as large as the quick difference: two answers that stand further
    apart by quick scores than the result are ordered as the exact scores order them.
    """
    error = np.abs(quick - exact)
    return float(error[np.abs(quick) <= error].max(initial=0.0))


@dataclass(frozen=True, slots=True)
class Bound:
    """The largest `order_error` of `prompts` prompts, in raw scores: answers further apart than it are in order.

    A further prompt drawn like these has an order error beyond it with probability 1 / (prompts + 1) at most: the last
    of N + 1 exchangeable values is the largest no more often (split conformal prediction, Vovk et al. 2005).
    """

    error: float
    prompts: int

    @property
    def confidence(self) -> float:
        return self.prompts / (self.prompts + 1)

    def __str__(self) -> str:
        return f"{self.error:.4f}, the largest that could change an order on {self.prompts} prompts"


@dataclass(frozen=True, slots=True)
class FidelityNote:
    """summary: one line; reference: the scheme it was measured against; pair_error: the bound of a ranking."""

    summary: str
    reference: str
    pair_error: Bound
