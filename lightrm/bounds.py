"""What a fidelity measurement leaves with a model: a sentence, and how far apart two scores in wrong order can be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.995
Scores = NDArray[np.floating]


def wrong_gap(exact: Scores, quick: Scores) -> float:
    """The largest difference of two quick scores that stand in another order than the exact ones; 0 if none do.

    exact, quick: of one prompt's answers, float (n,). The order is right if all answers that are no further apart are
    ordered by their exact scores. A tie that was torn is another order.
    """
    f, q = np.asarray(exact, np.float64), np.asarray(quick, np.float64)
    most = 0.0
    for i in range(1, len(f)):
        gaps = q[i] - q[:i]
        most = max(most, np.abs(gaps[np.sign(gaps) != np.sign(f[i] - f[:i])]).max(initial=0.0))
    return float(most)


def order_error(exact: Scores, quick: Scores) -> float:
    """The largest error of a difference that could have turned the order of its two answers round; 0 if none could.

    exact, quick: as in `wrong_gap`, which is never larger. An error can do so, by one of its signs, where it is no
    smaller than the quick difference.
    """
    f, q = np.asarray(exact, np.float64), np.asarray(quick, np.float64)
    most = 0.0
    for i in range(1, len(f)):
        gaps = q[i] - q[:i]
        error = np.abs(gaps - (f[i] - f[:i]))
        most = max(most, error[np.abs(gaps) <= error].max(initial=0.0))
    return float(most)


@dataclass(frozen=True, slots=True)
class Limit:
    """How far apart, in raw scores, answers are in order; confidence: that they are, for all answers of a further
    prompt; 0 where nobody measured that."""

    gap: float
    confidence: float = 0.0

    def __str__(self) -> str:
        sure = f", which is enough for {100 * self.confidence:.2f} % of prompts or more" if self.confidence else ""
        return f"{self.gap:.4f}{sure}"


@dataclass(frozen=True, slots=True)
class Bound:
    """The wrong gaps of `prompts` prompts that were measured, in raw scores: those above 0, largest first. error: the
    largest of their order errors.

    Of N + 1 exchangeable values the last is above the k-th largest of the others with probability k / (N + 1) at most
    (split conformal prediction, Vovk et al. 2005): for a further prompt drawn like these, the k-th largest wrong gap is
    enough with a confidence of 1 - k / (N + 1). Where N prompts are too few for the confidence that is asked for, the
    largest order error is taken: it is surer than N / (N + 1), nobody knows by how much.
    """

    prompts: int
    gaps: tuple[float, ...]
    error: float

    def limit(self, confidence: float = CONFIDENCE) -> Limit:
        """The smallest gap of that confidence; with too few prompts for it, what these can say. See above."""
        k = int((1 - confidence) * (self.prompts + 1) + 1e-9)  # 1 - 0.995 is a little less than 0.005
        if k == 0:
            return Limit(self.error, self.prompts / (self.prompts + 1))
        return Limit(self.gaps[k - 1] if k <= len(self.gaps) else 0.0, 1 - k / (self.prompts + 1))

    @classmethod
    def of(cls, prompts: Iterable[tuple[Scores, Scores]]) -> Bound:
        """From the exact and the quick scores of each prompt; a prompt with a single answer says nothing."""
        many = [(exact, quick) for exact, quick in prompts if len(exact) > 1]
        gaps = sorted((wrong_gap(*one) for one in many), reverse=True)
        error = max((order_error(*one) for one in many), default=math.inf)
        return cls(len(many), tuple(gap for gap in gaps if gap), error)

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> Bound:
        """From what `dataclasses.asdict` made of one, in JSON. Raises KeyError or TypeError on anything else."""
        return cls(raw["prompts"], tuple(raw["gaps"]), math.inf if raw["error"] is None else raw["error"])

    def __str__(self) -> str:
        return f"{self.limit()}, from {self.prompts}"


@dataclass(frozen=True, slots=True)
class FidelityNote:
    """summary: one line; reference: the scheme it was measured against; bound: for exact rankings."""

    summary: str
    reference: str
    bound: Bound
