"""The statistics, against definitions written out by hand and against what is known of random scores."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import kendalltau, norm

from lightrm.judge.agreement import Prompts, agreement, flips_less, spread_of

RNG = np.random.default_rng(3)
PROMPT = np.concatenate([np.repeat(np.arange(60), 2), np.repeat(np.arange(60, 90), 5), [90, 91]])[RNG.permutation(272)]
REFERENCE = np.round(RNG.normal(size=272), 1)  # with ties
FOUND = np.round(REFERENCE + RNG.normal(scale=0.3, size=272), 1)
WORTH = np.where(RNG.random(272) < 0.2, np.nan, RNG.integers(0, 3, 272))


def pairs_of(prompt: np.ndarray) -> list[tuple[int, int]]:
    return [(i, j) for i, j in itertools.combinations(range(len(prompt)), 2) if prompt[i] == prompt[j]]


def test_figures_are_their_definitions() -> None:
    a = agreement(REFERENCE, FOUND, Prompts(PROMPT, draws=20), WORTH)
    groups = [np.flatnonzero(k == PROMPT) for k in np.unique(PROMPT)]
    squares = sum(((REFERENCE[g] - REFERENCE[g].mean()) ** 2).sum() for g in groups)
    spread = math.sqrt(squares / sum(len(g) - 1 for g in groups))
    assert a.spread == pytest.approx(spread)
    error = np.abs(FOUND - REFERENCE) / spread
    assert a.mean_error.value == pytest.approx(error.mean())
    assert a.p99_error.value == pytest.approx(np.quantile(error, 0.99))
    pairs = pairs_of(PROMPT)
    decided = [(i, j) for i, j in pairs if REFERENCE[i] != REFERENCE[j]]
    wrong = [(i, j) for i, j in decided if (FOUND[i] - FOUND[j]) * (REFERENCE[i] - REFERENCE[j]) <= 0]
    assert a.flips.value == pytest.approx(len(wrong) / len(decided))
    assert a.flips.n == len(decided)
    assert sum(b.pairs for b in a.buckets) == len(decided)
    assert sum(b.flips for b in a.buckets) == len(wrong)
    taus = [kendalltau(REFERENCE[g], FOUND[g]).statistic for g in groups if len(g) > 1 and np.ptp(REFERENCE[g])]
    assert a.tau_within.value == pytest.approx(np.nan_to_num(taus).mean())
    assert a.tau.value == pytest.approx(kendalltau(REFERENCE, FOUND).statistic)
    many = [g for g in groups if len(g) > 1]
    assert a.top1.value == pytest.approx(np.mean([REFERENCE[g].argmax() == FOUND[g].argmax() for g in many]))
    assert a.top1.n == 90
    labelled = [(i, j) for i, j in pairs if WORTH[i] > WORTH[j] or WORTH[i] < WORTH[j]]
    right = [(i, j) for i, j in labelled if (WORTH[i] - WORTH[j]) * (FOUND[i] - FOUND[j]) > 0]
    assert a.accuracy is not None
    assert (a.accuracy.value, a.accuracy.n) == (pytest.approx(len(right) / len(labelled)), len(labelled))


def test_the_same_scores_agree_wholly() -> None:
    a = agreement(REFERENCE, REFERENCE, Prompts(PROMPT, draws=20))
    assert (a.mean_error.value, a.flips.value, a.top1.value) == (0, 0, 1)
    for figure in (a.tau, a.tau_within, a.pearson, a.spearman):
        assert (figure.value, figure.low) == (pytest.approx(1), pytest.approx(1))
    assert a.accuracy is None
    reverse = agreement(REFERENCE, -REFERENCE, Prompts(PROMPT, draws=20))
    assert (reverse.flips.value, reverse.tau_within.value) == (1, -1)


def test_answers_without_competition_are_no_prompt_to_rank() -> None:
    lonely = agreement(np.asarray([1.0, 2.0]), np.asarray([1.0, 2.5]), Prompts(np.asarray([0, 1]), draws=10))
    assert math.isnan(lonely.flips.value)
    assert (lonely.flips.n, lonely.top1.n) == (0, 0)
    assert spread_of(np.asarray([1.0, 2.0]), Prompts(np.asarray([0, 1]))) == 0.5


def test_intervals_cover() -> None:
    """Of 95 % intervals, about 95 in 100 hold the figure of endless data: flips of normal scores, known exactly."""
    noise, covered, trials = 0.5, 0, 120
    truth = math.acos(1 / math.sqrt(1 + noise**2)) / math.pi  # two normal differences of that correlation
    rng = np.random.default_rng(0)
    prompt = np.repeat(np.arange(150), 2)
    for _ in range(trials):
        reference = rng.normal(size=300)
        a = agreement(reference, reference + noise * rng.normal(size=300), Prompts(prompt, draws=100))
        covered += a.flips.low <= truth <= a.flips.high
    assert covered >= norm.ppf(0.001) * math.sqrt(trials * 0.95 * 0.05) + 0.92 * trials  # 0.92: percentiles, 100 draws
    assert covered < trials, "an interval that always covers is too wide to say anything"


def test_paired_difference() -> None:
    """Two scorings that share their noise are told apart where their own intervals overlap."""
    rng = np.random.default_rng(1)
    prompt = np.repeat(np.arange(400), 2)
    reference, noise = rng.normal(size=800), 0.4 * rng.normal(size=800)
    good, bad = reference + noise, reference + 1.5 * noise
    prompts = Prompts(prompt, draws=200)
    less = flips_less(reference, good, bad, prompts)
    apart = [agreement(reference, scores, prompts).flips for scores in (good, bad)]
    assert less.value == pytest.approx(apart[1].value - apart[0].value)
    assert less.low > 0
    assert apart[0].high > apart[1].low
