"""Scores of an answer's steps, by a process reward model, and one score of them for the whole answer.

Each step is the beginning of the answer's ids up to the token at which the step is read (`text.steps`). All of them go
to the engine together; what they share is computed once, so that the steps of an answer cost one pass over it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from lightrm.display.progress import token_progress
from lightrm.engine.engine import Engine
from lightrm.errors import InputError
from lightrm.text.columns import items, kind
from lightrm.text.conversation import text_of
from lightrm.text.steps import StepTexts
from lightrm.text.templates import Turn

Ids = list[int]
EXPECTED = "expected a list of steps, each a string, or a list of answers, each a list of steps"


def product(scores: np.ndarray) -> float:
    return float(np.prod(scores, dtype=np.float64))


REDUCERS: dict[str, Callable[[np.ndarray], float]] = {
    "min": lambda scores: float(scores.min()),
    "product": product,
    "last": lambda scores: float(scores[-1]),
    "mean": lambda scores: float(scores.mean(dtype=np.float64)),
}


class StepScorer:
    """The process side of a model."""

    def __init__(self, texts: StepTexts, engine: Engine) -> None:
        self.texts, self.engine = texts, engine

    def score(self, asked: Sequence[tuple[list[Turn], list[str]]], progress: bool) -> list[np.ndarray]:
        """Return the score of each step of some answers, float32 (steps,) each. asked: a conversation with the steps of
        its answer."""
        return self.score_ids([self.texts.encode(turns, steps) for turns, steps in asked], progress)

    def score_ids(self, answers: Sequence[Sequence[Ids]], progress: bool) -> list[np.ndarray]:
        """As `score`, of the ids up to where each step is read."""
        sequences = [ids for steps in answers for ids in steps]
        starts = np.cumsum([0, *map(len, answers)])
        with token_progress(sum(map(len, sequences)), progress) as advance:
            scores = self.engine.all_scores(sequences, advance)
        return [scores[start:end] for start, end in pairwise(starts)]


def reducer(name: str | None) -> Callable[[np.ndarray], float]:
    """Return what makes one score of an answer's steps. Raises InputError, which names the choices, for None."""
    if name is None:
        raise InputError(
            "this is a process reward model: it scores each step of an answer, by score_steps. For one score, load "
            f"it with reduce= one of {', '.join(map(repr, REDUCERS))}"
        )
    return REDUCERS[name]


def steps_of(steps: object) -> tuple[list[list[str]], bool]:
    """Return answers in steps, and whether the caller gave several. Raises InputError."""
    given = items(steps, EXPECTED)
    if all(isinstance(step, str) for step in given):
        return [[text_of(step, f"step {k}") for k, step in enumerate(given)]], False
    if any(isinstance(answer, str) for answer in given):
        raise InputError(f"{EXPECTED}, found both in {kind(steps)}")
    return steps_of_each(given), True


def steps_of_each(answers: object) -> list[list[str]]:
    """Return the steps of one answer to each of several prompts. Raises InputError, which names the answer."""
    given = items(answers, "answers must be a list of lists of steps")
    listed = [items(answer, f"answer {k} must be a list of steps") for k, answer in enumerate(given)]
    return [
        [text_of(step, f"step {i} of answer {k}") for i, step in enumerate(answer)] for k, answer in enumerate(listed)
    ]
