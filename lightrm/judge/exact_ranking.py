"""A ranking that full precision would give, without full precision for every answer.

A measured limit says: two answers whose quick scores are further apart are in the order of full precision. Answers are
parted into groups wherever the next quick score is further off than that; groups keep their places, and inside each of
more than one answer all are scored again in full precision and sorted by that. A score that was not computed again is
the quick one, and not to be compared with the others.

The new scores show errors. Where the error of a difference is so large that, by its other sign, it could have turned an
order round, and larger than the limit, the limit is too small for this prompt: for it, it is raised to the largest such
error, and what now is too close is scored again as well, until nothing changes. Other prompts keep the limit that was
given: an answer's place does not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightrm.judge.bounds import Bound, Limit, order_error

Scores = NDArray[np.float32]
Answers = Sequence[tuple[int, int]]  # (prompt, position) of each


class Ranked(NamedTuple):
    """One response with its score and its position in the input; exact: whether the score is of full precision."""

    score: float
    position: int
    response: str
    exact: bool = False


class Ranking(list[Ranked]):
    """Responses, best first."""

    @property
    def rescored(self) -> int:
        """How many of them were scored again."""
        return sum(ranked.exact for ranked in self)


class Rankings(list[Ranking]):
    """One ranking for each prompt; effort: what full precision was needed for, None where it was not asked for."""

    effort: Effort | None = None


@dataclass(frozen=True, slots=True)
class Effort:
    """rescored of `answers` answers went through full precision too, `rescored_tokens` of `tokens` distinct tokens.

    limits: as they were given, for each number of answers; raised: for how many prompts they proved too small.
    """

    answers: int
    rescored: int
    tokens: int
    rescored_tokens: int
    limits: Mapping[int, Limit]
    raised: int

    @property
    def limit(self) -> Limit:
        """The largest, and the lowest confidence."""
        limits = self.limits.values()
        return Limit(
            max((one.gap for one in limits), default=0.0), min((one.confidence for one in limits), default=0.0)
        )

    def __str__(self) -> str:
        raised = f"; raised for {self.raised}" if self.raised else ""
        share = 100 * self.rescored_tokens / max(self.tokens, 1)
        return (
            f"{self.rescored} of {self.answers} answers scored again, {share:.1f} % of the tokens; "
            f"the others stand further apart than {self.limit}{raised}"
        )


def settled(
    quick: Sequence[Scores], limits: Sequence[float], rescore: Callable[[list[tuple[int, int]]], Iterable[float]]
) -> tuple[list[Scores], list[float]]:
    """Full-precision scores where they are needed, NaN elsewhere, and the limit that sufficed for each prompt.

    quick, limits: each prompt's scores and limit; rescore: (prompt, position) of answers -> their scores in full
    precision.
    """
    full = [np.full(len(scores), np.nan, np.float32) for scores in quick]
    raised = list(limits)
    wanted = [(k, i) for k, scores in enumerate(quick) for i in too_close(scores, raised[k])]
    while wanted:
        for (k, i), score in zip(wanted, rescore(wanted), strict=True):
            full[k][i] = score
        raised = [max(b, error_of(q, f)) for b, q, f in zip(raised, quick, full, strict=True)]
        close = ((k, i) for k, scores in enumerate(quick) for i in too_close(scores, raised[k]))
        wanted = [(k, i) for k, i in close if np.isnan(full[k][i])]
    return full, raised


def too_close(quick: Scores, limit: float) -> list[int]:
    """Which of a prompt's answers stand within the limit of another."""
    return sorted(i for group in groups(quick, limit) if len(group) > 1 for i in group)


def groups(quick: Scores, limit: float) -> list[list[int]]:
    """A prompt's answers from the best quick score down, parted wherever the next is further off than the limit."""
    order = np.argsort(-quick, kind="stable")
    gaps = -np.diff(quick[order].astype(np.float64))
    return [group.tolist() for group in np.split(order, np.flatnonzero(gaps > limit) + 1)]


def error_of(quick: Scores, full: Scores) -> float:
    """The order error among a prompt's answers that were scored again."""
    known = ~np.isnan(full)
    return order_error(full[known], quick[known])


def ranking(quick: Scores, full: Scores, limit: float, responses: Sequence[str]) -> Ranking:
    """Groups stand in the quick order, inside them the full one does; equal scores keep their input order."""
    order: list[int] = []
    for group in groups(quick, limit):
        order += sorted(group, key=lambda i: (-full[i], i)) if len(group) > 1 else group
    known = ~np.isnan(full)
    return Ranking(Ranked(float(full[i] if known[i] else quick[i]), i, responses[i], bool(known[i])) for i in order)


def plain_ranking(scores: Scores, responses: Sequence[str]) -> Ranking:
    """Best first, by one kind of score; equal ones keep their input order."""
    return Ranking(Ranked(float(scores[i]), int(i), responses[i]) for i in np.argsort(-scores, kind="stable"))


def exact_rankings(
    quick: Sequence[Scores], responses: Sequence[Sequence[str]], bound: Bound, confidence: float, *,
    rescore: Callable[[Answers], Iterable[float]], tokens: Callable[[Answers], int],
) -> Rankings:  # fmt: skip
    """Return the rankings of full precision, and what they took.

    quick: each prompt's scores, float32 (n,); rescore: answers -> their scores in full precision; tokens: answers ->
    how many distinct tokens they have.
    """
    limits = {n: bound.limit(n, confidence) for n in sorted({len(scores) for scores in quick}) if n > 1}
    gaps = [limits[len(scores)].gap if len(scores) > 1 else 0.0 for scores in quick]
    again: list[tuple[int, int]] = []

    def noted(answers: Answers) -> Iterable[float]:
        again.extend(answers)
        return rescore(answers)

    full, raised = settled(quick, gaps, noted)
    found = Rankings(ranking(*one) for one in zip(quick, full, raised, responses, strict=True))
    every = [(k, i) for k, scores in enumerate(quick) for i in range(len(scores))]
    found.effort = Effort(
        answers=len(every),
        rescored=len(again),
        tokens=tokens(every),
        rescored_tokens=tokens(again),
        limits=limits,
        raised=sum(after > before for before, after in zip(gaps, raised, strict=True)),
    )
    return found
