"""The token ids of some answers, and how one score for each is made of what the engine gives for them.

An answer is one sequence. By a process reward model it is a sequence for each step, which ends where the step is read
(`text.steps`), and its score is a reduction of the steps' scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lightrm.engine.scoring_engine import Scored

Ids = list[int]
Reducer = Callable[[np.ndarray], float]


@dataclass(frozen=True, slots=True)
class AnswerIds:
    """sequences: to score, those of one answer beside each other. steps: how many each answer has, and reduce: makes
    one score of theirs; None where each answer is one sequence."""

    sequences: list[Ids]
    steps: tuple[int, ...] | None = None
    reduce: Reducer | None = None

    @property
    def starts(self) -> list[int]:
        """The first sequence of each answer, and where the last one ends."""
        return [0, *np.cumsum(self.counts).tolist()]

    @property
    def counts(self) -> tuple[int, ...]:
        """Sequences of each answer."""
        return (1,) * len(self.sequences) if self.steps is None else self.steps

    @property
    def whole(self) -> list[Ids]:
        """The ids of each answer; of one in steps up to where the last is read."""
        return [self.sequences[end - 1] for end in self.starts[1:]]

    def made(self, scores: np.ndarray) -> np.ndarray:
        """Return one score for each answer, float32 (n,). scores: of each sequence."""
        if self.reduce is None:
            return scores
        starts = self.starts
        found = [self.reduce(scores[start:end]) for start, end in pairwise(starts)]
        return np.asarray(found, dtype=np.float32)

    def settled(self, found: Iterator[Scored]) -> Iterator[tuple[int, float]]:
        """Yield the position and the score of each answer as soon as all of its sequences have theirs. found: groups of
        sequences with their scores, in any order."""
        scores = np.empty(len(self.sequences), dtype=np.float32)
        left, starts = list(self.counts), self.starts
        of = np.repeat(np.arange(len(left)), self.counts)
        for group, some in found:
            scores[group] = some
            for answer in of[group].tolist():
                left[answer] -= 1
                if not left[answer]:
                    own = scores[starts[answer] : starts[answer + 1]]
                    yield answer, float(own[0] if self.reduce is None else np.float32(self.reduce(own)))


def of_steps(answers: Sequence[Sequence[Ids]], reduce: Reducer) -> AnswerIds:
    """Return the ids of answers in steps."""
    return AnswerIds([ids for steps in answers for ids in steps], tuple(map(len, answers)), reduce)


def joined(parts: Sequence[AnswerIds]) -> AnswerIds:
    """Return the answers of one model, one after the other."""
    sequences = [ids for part in parts for ids in part.sequences]
    if not parts or parts[0].steps is None:
        return AnswerIds(sequences)
    return AnswerIds(sequences, tuple(count for part in parts for count in part.counts), parts[0].reduce)
