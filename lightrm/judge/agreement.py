"""How well two scorings of the same answers agree: differences, correlations, order. numpy on scores, nothing else.

Two arrays, `reference` and `found`, both float (n,), and `prompt`, int (n,), which says which answers compete.
Differences are in units of the reference's within-prompt standard deviation: the square root of the variance within a
prompt (n - 1 in the denominator), pooled over prompts by their degrees of freedom. A flip is a pair of answers to one
prompt that the two scorings order differently. Pairs that tie in the reference are left out; a pair that ties only in
`found` is a flip. Kendall's tau-b: Kendall, Biometrika 1945.

Intervals come from a bootstrap over prompts: whole prompts are drawn with replacement, so that answers to one prompt
stay together, and the 2.5 and 97.5 percentiles are taken. The draws depend only on a seed and the prompts. So two
schemes on the same data have the same draws, and their differences are paired.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau, rankdata

from lightrm.typed_json import INFINITE

Array = NDArray[np.float64]
DRAWS = 1000
SEED = 20260701
MARGINS = (0.0, 0.1, 0.25, 0.5, 1.0, np.inf)  # of a pair in the reference, in within-prompt standard deviations


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % interval. n: the number of answers, pairs or prompts behind it."""

    value: float
    low: float
    high: float
    n: int

    def text(self, digits: int) -> str:
        """Return the figure with its interval: "0.912 (0.905 - 0.918)"."""
        return f"{self.value:.{digits}f} ({self.low:.{digits}f} - {self.high:.{digits}f})"

    def percent(self, digits: int) -> str:
        """Return a share with its interval in percent: "12.3 % (10.1 - 14.5)"."""
        value, low, high = (f"{100 * x:.{digits}f}" for x in (self.value, self.low, self.high))
        return f"{value} % ({low} - {high})"


@dataclass(frozen=True, slots=True)
class Bucket:
    """Flips among pairs whose difference in the reference lies in [low, high) within-prompt standard deviations."""

    low: float
    high: float = field(metadata=INFINITE)
    pairs: int
    flips: int


@dataclass(frozen=True, slots=True)
class Agreement:
    """mean_error, p99_error: of |found - reference|, in within-prompt standard deviations of the reference.
    tau_within: tau-b of the answers to a prompt, averaged over prompts.
    top1: share of the prompts with two or more answers whose best answer is the same.
    accuracy: share of the labelled pairs that `found` orders as labelled, None without labels.
    spread: the within-prompt standard deviation, in raw scores."""

    spread: float
    mean_error: Estimate
    p99_error: Estimate
    pearson: Estimate
    spearman: Estimate
    tau: Estimate
    tau_within: Estimate
    flips: Estimate
    top1: Estimate
    accuracy: Estimate | None
    buckets: tuple[Bucket, ...]


class Prompts:
    """Which answers compete. prompt: int (n,), the prompt of each answer. The same prompts always give the same
    draws."""

    def __init__(self, prompt: NDArray[np.int64], draws: int | None = None) -> None:
        _, self.index, self.sizes = np.unique(prompt, return_inverse=True, return_counts=True)
        self.draws = DRAWS if draws is None else draws
        order = np.argsort(self.index, kind="stable")
        self.members = np.split(order, np.cumsum(self.sizes)[:-1])
        pairs = [members[np.stack(np.triu_indices(len(members), 1), 1)] for members in self.members]
        self.pairs = np.concatenate(pairs)  # (pairs, 2) of answers
        self.pair_prompt = self.index[self.pairs[:, 0]]

    def __len__(self) -> int:
        return len(self.sizes)

    def by_prompt(self, of_answers: NDArray[Any]) -> Array:
        """Sum values of answers over each prompt, float64 (prompts,)."""
        return np.bincount(self.index, of_answers, minlength=len(self)).astype(np.float64)

    def by_pairs(self, of_pairs: NDArray[Any]) -> Array:
        """Sum values of pairs over each prompt, float64 (prompts,)."""
        return np.bincount(self.pair_prompt, of_pairs, minlength=len(self)).astype(np.float64)

    def drawn(self) -> Iterator[NDArray[np.int64]]:
        """Yield the prompts of each draw, int (prompts,)."""
        rng = np.random.default_rng(SEED)
        for _ in range(self.draws):
            yield rng.integers(0, len(self), len(self))


def spread_of(reference: Array, prompts: Prompts) -> float:
    """Return the within-prompt standard deviation; that of all answers if no prompt has two different scores."""
    deviation = reference - (prompts.by_prompt(reference) / prompts.sizes)[prompts.index]
    freedom = int((prompts.sizes - 1).sum())
    pooled = float(np.sqrt((deviation**2).sum() / freedom)) if freedom else 0.0
    return pooled or float(reference.std()) or 1.0


def agreement(reference: Array, found: Array, prompts: Prompts, worth: Array | None = None) -> Agreement:
    """Compare two scorings. worth: float64 (n,), NaN for answers without a label: see `data.preferences`."""
    reference, found = np.asarray(reference, np.float64), np.asarray(found, np.float64)
    spread = spread_of(reference, prompts)
    error = np.abs(found - reference) / spread
    margin = margins(reference, prompts)
    decided = margin != 0
    flipped = decided & (np.sign(margin) != np.sign(margins(found, prompts)))
    shares = {
        "mean_error": (prompts.by_prompt(error), prompts.sizes.astype(np.float64)),
        "tau_within": taus(reference, found, prompts),
        "flips": (prompts.by_pairs(flipped), prompts.by_pairs(decided)),
        "top1": same_best(reference, found, prompts),
        "accuracy": labelled(found, prompts, worth),
    }
    wholes = {"p99_error": p99, "pearson": pearson, "spearman": spearman, "tau": tau_b}
    arrays = np.stack([reference, found, error])
    value = {name: share(top.sum(), bottom.sum()) for name, (top, bottom) in shares.items()}
    value |= {name: figure(*arrays) for name, figure in wholes.items()}
    draws: dict[str, list[float]] = {name: [] for name in value}
    for chosen in prompts.drawn():
        for name, (top, bottom) in shares.items():
            draws[name].append(share(top[chosen].sum(), bottom[chosen].sum()))
        answers = arrays[:, np.concatenate([prompts.members[k] for k in chosen])]
        for name, figure in wholes.items():
            draws[name].append(figure(*answers))
    n = {name: len(error) for name in wholes} | {name: round(bottom.sum()) for name, (_, bottom) in shares.items()}
    made = {name: estimate(value[name], np.asarray(draws[name]), n[name]) for name in value}
    return Agreement(
        spread=spread,
        mean_error=made["mean_error"],
        p99_error=made["p99_error"],
        pearson=made["pearson"],
        spearman=made["spearman"],
        tau=made["tau"],
        tau_within=made["tau_within"],
        flips=made["flips"],
        top1=made["top1"],
        accuracy=made["accuracy"] if n["accuracy"] else None,
        buckets=buckets(np.abs(margin) / spread, decided, flipped),
    )


def estimate(value: float, draws: Array, n: int) -> Estimate:
    known = draws[np.isfinite(draws)]
    low, high = np.percentile(known, (2.5, 97.5)) if len(known) else (np.nan, np.nan)
    return Estimate(float(value), float(low), float(high), n)


def share(top: float, bottom: float) -> float:
    return float(top / bottom) if bottom else float("nan")


def margins(scores: Array, prompts: Prompts) -> Array:
    """Return the score of the first answer minus that of the second, for each pair."""
    return scores[prompts.pairs[:, 0]] - scores[prompts.pairs[:, 1]]


def p99(reference: Array, found: Array, error: Array) -> float:
    return float(np.quantile(error, 0.99))


def pearson(reference: Array, found: Array, error: Array | None = None) -> float:
    a, b = reference - reference.mean(), found - found.mean()
    return share(float(a @ b), float(np.sqrt((a @ a) * (b @ b))))


def spearman(reference: Array, found: Array, error: Array | None = None) -> float:
    return pearson(rankdata(reference), rankdata(found))


def tau_b(reference: Array, found: Array, error: Array | None = None) -> float:
    return float(kendalltau(reference, found).statistic)


def taus(reference: Array, found: Array, prompts: Prompts) -> tuple[Array, Array]:
    """Return tau-b of each prompt's answers, computed from the signs of its pairs; and 1 for each prompt where it is
    defined."""
    a, b = np.sign(margins(reference, prompts)), np.sign(margins(found, prompts))
    bottom = np.sqrt(prompts.by_pairs(a != 0) * prompts.by_pairs(b != 0))
    asked = prompts.by_pairs(a != 0) > 0  # a prompt that only `found` ties has tau 0
    return np.divide(prompts.by_pairs(a * b), bottom, out=np.zeros_like(bottom), where=bottom > 0), asked.astype(float)


def same_best(reference: Array, found: Array, prompts: Prompts) -> tuple[Array, Array]:
    """Return 1 for each prompt whose first best answer is the same in both; and 1 for each prompt with two or more
    answers."""
    same = [reference[m].argmax() == found[m].argmax() for m in prompts.members]
    contested = prompts.sizes > 1
    return (np.asarray(same) & contested).astype(np.float64), contested.astype(np.float64)


def labelled(found: Array, prompts: Prompts, worth: Array | None) -> tuple[Array, Array]:
    """Return the number of pairs ordered as labelled, and of labelled pairs, for each prompt."""
    if worth is None:
        return np.zeros(len(prompts)), np.zeros(len(prompts))
    wanted = np.nan_to_num(margins(worth, prompts))
    right = (wanted != 0) & (np.sign(wanted) == np.sign(margins(found, prompts)))
    return prompts.by_pairs(right), prompts.by_pairs(wanted != 0)


def buckets(margin: Array, decided: NDArray[np.bool_], flipped: NDArray[np.bool_]) -> tuple[Bucket, ...]:
    inside = [(low, high, decided & (margin >= low) & (margin < high)) for low, high in pairwise(MARGINS)]
    return tuple(Bucket(low, high, int(pairs.sum()), int((pairs & flipped).sum())) for low, high, pairs in inside)


def flips_less(reference: Array, found: Array, other: Array, prompts: Prompts) -> Estimate:
    """Return how much lower the share of flips is in `found` than in `other`, paired; above zero means fewer flips."""
    margin = margins(reference, prompts)
    decided = margin != 0
    wrong = [(np.sign(margin) != np.sign(margins(scores, prompts))) & decided for scores in (other, found)]
    top, bottom = prompts.by_pairs(wrong[0].astype(float) - wrong[1]), prompts.by_pairs(decided)
    draws = np.asarray([share(top[chosen].sum(), bottom[chosen].sum()) for chosen in prompts.drawn()])
    return estimate(share(top.sum(), bottom.sum()), draws, round(bottom.sum()))
