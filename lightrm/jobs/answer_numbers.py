"""What a job writes of each answer: a score, or the scores of its steps, or its attributes, by the kind of model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightrm.engine.step_scores import REDUCERS
from lightrm.jobs.job_outputs import SCORES, Added, Number
from lightrm.scorer import RewardModel
from lightrm.text.templates import Turn

Answer = list[list[int]]  # the sequences of which an answer's numbers are made: one, or one for each step


class AnswerNumbers:
    """added: the field that is written."""

    def __init__(self, rm: RewardModel) -> None:
        """Raises TokenizerError for a model that scores no text."""
        self.rm, self.steps, head = rm, rm.text.steps, rm.engine.head
        self.head = head.attributes() if head.undecided else None
        self.added = SCORES
        if self.steps is None:
            rm.text.check()
        elif self.steps.reduce is None:
            self.added = Added("steps")
        if self.head is not None:
            self.added = Added("attributes", head.names)

    def encode(self, turns: Sequence[Turn], responses: Sequence[str]) -> tuple[list[Answer], int]:
        """Return the sequences of each answer, and how many answers were cut. Errors as `RewardModel.score`."""
        if self.steps is not None:
            return [self.steps.encode(turns, self.steps.form.divided(text)) for text in responses], 0
        found = self.rm.text.encode(turns, responses)
        return [[ids] for ids in self.rm.text.read(e.token_ids for e in found)], sum(e.cut > 0 for e in found)

    def made(self, found: list[float] | list[list[float]]) -> Number:
        """Return what is written of an answer. found: what the engine gave for its sequences."""
        if self.steps is not None:
            if self.steps.reduce is None:
                return found
            return float(np.float32(REDUCERS[self.steps.reduce](np.asarray(found, np.float32))))
        (one,) = found
        return one if self.head is None else dict(zip(self.added.names, one, strict=True))  # type: ignore[arg-type]
