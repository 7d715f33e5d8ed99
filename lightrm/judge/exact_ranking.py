"""The ranking of full precision, with full precision for only some of the answers.

A measured limit says: two answers whose quick scores are further apart are in the order of full precision. The answers
are sorted by quick score and divided into groups wherever the next score is further away than the limit. The groups
keep their order. In a group of two or more, all answers are scored again in full precision and sorted by that. Other
answers keep their quick score, which must not be compared with the new ones.

The new scores show the errors of the quick ones. If the error of a difference exceeds the limit, and could have
reversed an order with its other sign, the limit is too small for this prompt. It is then raised to the largest such
error, and answers that are now too close are scored again too, until nothing changes. Other prompts keep their limit,
so an answer's place does not depend on the batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lightrm.judge.bounds import Bound, Limit, order_error

Scores = NDArray[np.float32]
Answers = Sequence[tuple[int, int]]  # (prompt, position) of each


@dataclass(frozen=True, slots=True)
class Ranked:
    """One response with its score.

    index: its place among the responses that were passed. response: its text; empty if it was not asked for. exact:
    whether the score is of full precision.

    `ranked["corpus_id"]`, `ranked["score"]` and `ranked["text"]` read index, score and response by the names that
    sentence-transformers' `CrossEncoder.rank` gives them.
    """

    score: float
    index: int
    response: str
    exact: bool = False

    def __getitem__(self, name: str) -> int | float | str:
        """Raises KeyError for another name."""
        values: dict[str, int | float | str] = {"corpus_id": self.index, "score": self.score, "text": self.response}
        return values[name]

    @property
    def position(self) -> int:
        """The earlier name of `index`. Deprecated."""
        warnings.warn("Ranked.position is index now, and goes in lightrm 0.2", DeprecationWarning, stacklevel=2)
        return self.index


class Ranking(list[Ranked]):
    """Responses, best first."""

    @property
    def rescored(self) -> int:
        """How many of the responses were scored again."""
        return sum(ranked.exact for ranked in self)


class Rankings(list[Ranking]):
    """One ranking for each prompt. effort: how much was scored again; None unless exact rankings were asked for."""

    effort: Effort | None = None

    def shown(self, top_k: int | None, responses: bool) -> Rankings:
        """Return the first `top_k` of each ranking, all if it is None, with their texts or without."""
        short = Rankings(Ranking(one if responses else replace(one, response="") for one in r[:top_k]) for r in self)
        short.effort = self.effort
        return short


@dataclass(frozen=True, slots=True)
class Effort:
    """How much was scored again: `rescored` of `answers` answers, `rescored_tokens` of `tokens` distinct tokens.

    limits: the limit for each number of answers. raised: for how many prompts it was too small and was raised.
    """

    answers: int
    rescored: int
    tokens: int
    rescored_tokens: int
    limits: Mapping[int, Limit]
    raised: int

    @property
    def limit(self) -> Limit:
        """The largest limit, with the lowest confidence."""
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
    """Return full-precision scores where they are needed, NaN elsewhere, and the final limit of each prompt.

    quick, limits: scores and limit of each prompt. rescore: answers as (prompt, position) -> their full-precision
    scores.
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
    """Return which of a prompt's answers are within the limit of another."""
    return sorted(i for group in groups(quick, limit) if len(group) > 1 for i in group)


def groups(quick: Scores, limit: float) -> list[list[int]]:
    """Return a prompt's answers sorted by quick score, best first, divided wherever the next is further away than the
    limit."""
    order = np.argsort(-quick, kind="stable")
    gaps = -np.diff(quick[order].astype(np.float64))
    return [group.tolist() for group in np.split(order, np.flatnonzero(gaps > limit) + 1)]


def error_of(quick: Scores, full: Scores) -> float:
    """Return the order error among the answers of a prompt that were scored again."""
    known = ~np.isnan(full)
    return order_error(full[known], quick[known])


def ranking(quick: Scores, full: Scores, limit: float, responses: Sequence[str]) -> Ranking:
    """Return one ranking: groups in quick order, answers inside a group in full order. Equal scores keep their input
    order."""
    order: list[int] = []
    for group in groups(quick, limit):
        order += sorted(group, key=lambda i: (-full[i], i)) if len(group) > 1 else group
    known = ~np.isnan(full)
    return Ranking(Ranked(float(full[i] if known[i] else quick[i]), i, responses[i], bool(known[i])) for i in order)


def plain_ranking(scores: Scores, responses: Sequence[str]) -> Ranking:
    """Return the ranking by one kind of score, best first. Equal scores keep their input order."""
    return Ranking(Ranked(float(scores[i]), int(i), responses[i]) for i in np.argsort(-scores, kind="stable"))


def exact_rankings(
    quick: Sequence[Scores], responses: Sequence[Sequence[str]], bound: Bound, confidence: float, *,
    rescore: Callable[[Answers], Iterable[float]], tokens: Callable[[Answers], int],
) -> Rankings:  # fmt: skip
    """Return the rankings of full precision, with the effort that they took.

    quick: scores of each prompt, float32 (n,). rescore: answers -> their full-precision scores. tokens: answers -> how
    many distinct tokens they have.
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
