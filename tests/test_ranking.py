"""The full-precision order, whatever the errors within the bound, without all of its work; and how sure it is."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lightrm
from lightrm.judge.bounds import CONFIDENCE, Bound, FidelityNote, Limit, order_error, wrong_gap
from lightrm.judge.exact_ranking import groups, plain_ranking, ranking, settled, too_close
from lightrm.loading import quantized_folder
from tests.test_scoring import write_model

ANSWERS = ["it is", "天气很好", "a b c", "x", "the weather", "no", "yes yes yes", "?"]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(-40, 40), min_size=1, max_size=9), min_size=1, max_size=5),
    st.integers(0, 12),
    st.randoms(use_true_random=False),
)
def test_the_order_is_the_full_one_where_no_wrong_gap_is_above_the_limit(
    exact: list[list[int]], most: int, rng
) -> None:
    """Also where scores tie; and a smaller bound would not do, unless the errors that show it raise it."""
    full = [np.asarray(scores, np.float32) for scores in exact]
    errors = [np.asarray([rng.randint(-most, most) for _ in scores], np.float32) for scores in exact]
    quick = [f + e for f, e in zip(full, errors, strict=True)]
    limit = max(wrong_gap(f, q) for f, q in zip(full, quick, strict=True))
    assert limit == max(slow_wrong_gap(f, q) for f, q in zip(full, quick, strict=True))
    asked: list[tuple[int, int]] = []

    def rescore(wanted: list[tuple[int, int]]) -> list[float]:
        asked.extend(wanted)
        return [float(full[k][i]) for k, i in wanted]

    known, sufficed = settled(quick, [limit] * len(quick), rescore)
    assert len(asked) == len(set(asked)), "nothing is scored twice"
    for k, (q, known_k, f) in enumerate(zip(quick, known, full, strict=True)):
        texts = [str(i) for i in range(len(q))]
        found = ranking(q, known_k, sufficed[k], texts)
        assert [r.index for r in found] == [r.index for r in plain_ranking(f, texts)]
        assert all(r.score == f[r.index] for r in found if r.exact)
        assert found.rescored == int((~np.isnan(known_k)).sum())


def slow_wrong_gap(full: np.ndarray, quick: np.ndarray) -> float:
    """By its definition, one pair after the other."""
    f, q = full.tolist(), quick.tolist()
    pairs = [(f[i] - f[j], q[i] - q[j]) for i in range(len(f)) for j in range(i)]
    return max((abs(gap) for exact, gap in pairs if np.sign(exact) != np.sign(gap)), default=0.0)


def test_a_smaller_limit_is_not_enough() -> None:
    full, quick = np.asarray([0.0, 1.0, 9.0], np.float32), np.asarray([0.5, 0.25, 9.0], np.float32)
    for limit, right in ((0.25, True), (0.2, False)):
        known, (sufficed,) = settled([quick], [limit], lambda wanted: [float(full[i]) for _, i in wanted])
        found = [r.index for r in ranking(quick, known[0], sufficed, "abc")]
        assert (found == [2, 1, 0]) == right


def test_far_apart_answers_are_left_alone() -> None:
    quick = np.asarray([3.0, 0.0, 3.05, -2.0], np.float32)
    assert too_close(quick, 0.1) == [0, 2]
    assert groups(quick, 0.1) == [[2, 0], [1], [3]]
    assert too_close(quick, 0.0) == []
    assert too_close(np.asarray([1.0, 1.0], np.float32), 0.0) == [0, 1], "a tie is undecided at any bound"


def test_a_bound_that_proves_too_small_is_raised() -> None:
    """For the prompt that shows it, and for no other."""
    quick = [np.asarray([0.0, 0.1, 0.6, 5.0], np.float32), np.asarray([1.0, 1.5, 1.6], np.float32)]
    full = [np.asarray([0.9, 0.0, 0.5, 5.0], np.float32), np.asarray([1.0, 1.5, 1.61], np.float32)]
    known, sufficed = settled(quick, [0.2, 0.2], lambda wanted: [float(full[k][i]) for k, i in wanted])
    assert sufficed == [pytest.approx(1.0), 0.2]
    assert [r.index for r in ranking(quick[0], known[0], sufficed[0], list("abcd"))] == [3, 0, 2, 1]
    assert np.isnan(known[1]).tolist() == [True, False, False]


def test_gaps_and_errors() -> None:
    def both(exact: float, quick: float) -> tuple[float, float]:
        pair = np.asarray([exact, 0.0], np.float32), np.asarray([quick, 0.0], np.float32)
        return wrong_gap(*pair), order_error(*pair)

    assert both(-1.0, 0.5) == (0.5, 1.5)
    assert both(5.0, 2.0) == (0.0, 3.0), "5 taken for 2: with the other sign it would be -1"
    assert both(1.0, 0.75) == (0.0, 0.0)
    assert both(0.0, 0.25) == (0.25, 0.25), "a tie that was torn"
    assert both(0.25, 0.0) == (0.0, 0.25), "a tie is looked at again under any limit"
    assert wrong_gap(np.zeros(1), np.ones(1)) == wrong_gap(np.zeros(0), np.zeros(0)) == 0.0


def test_the_surer_the_larger_the_limit() -> None:
    bound = Bound({2: 999}, tuple((gap, 2) for gap in (0.8, 0.5, 0.4, 0.3, 0.2, 0.1)), 0.9)
    assert bound.limit(2, 0.999) == Limit(0.8, 0.999), "the largest of 1000 in one case of 1000"
    assert bound.limit(2, 0.998) == Limit(0.5, 0.998)
    assert bound.limit(2, 0.995) == bound.limit() == Limit(0.2, 0.995)
    assert bound.limit(2, 0.9945) == Limit(0.2, 0.995), "never less sure than asked for"
    assert bound.limit(2, 0.5) == Limit(0.0, 0.5)
    assert bound.limit(2, 0.9995) == Limit(0.9, 0.999), "surer than that, but who knows how much"
    assert Bound({2: 99}, ((0.6, 2),), 0.7).limit() == Limit(0.7, 0.99)
    assert Bound.of([]).limit() == Limit(np.inf), "nothing is known: everything is scored again"
    assert Bound.read(json.loads(json.dumps(asdict(bound)))) == bound
    assert Bound.read({"prompts": {}, "gaps": [], "error": None}) == Bound.of([]), "JSON has no infinity"
    assert str(bound) == "2 answers: 0.2000, which is enough for 99.50 % of prompts or more"
    pair = np.asarray([1.0, 1.1]), np.asarray([1.2, 1.0])
    found = Bound.of([pair, (pair[0], pair[0]), (pair[0][:1], pair[1][:1])])
    ((gap, answers),) = found.gaps
    assert (found.prompts, answers) == ({2: 2}, 2)
    assert (gap, found.error) == (pytest.approx(0.2), pytest.approx(0.3))


def test_prompts_with_fewer_answers_say_nothing_of_one_with_more() -> None:
    bound = Bound({2: 899, 4: 99, 8: 1}, ((0.8, 4), (0.5, 2), (0.3, 8), (0.1, 2)), 0.9)
    assert bound.limit(2, 0.997) == Limit(0.3, 0.997), "those with more do say something of fewer"
    assert bound.limit(3, 0.98) == bound.limit(4, 0.98) == Limit(0.3, 1 - 2 / 101)
    assert bound.limit(5, 0.98) == bound.limit(8, 0.98) == Limit(0.9, 0.5)
    assert bound.limit(9, 0.98) == Limit(0.9, 0.0)


def test_the_order_is_right_as_often_as_the_limit_says() -> None:
    """Drawn many times: 199 prompts that are measured and one more, with a limit that may fail in 2 of 100 cases."""
    rng = np.random.default_rng(5)
    wrong = 0
    for _ in range(2000):
        exact = rng.normal(size=(200, 2))
        quick = exact + 0.3 * rng.standard_t(3, size=(200, 2))
        limit = Bound.of(zip(exact[1:], quick[1:], strict=True)).limit(2, 0.98)
        assert limit.confidence == pytest.approx(0.98)
        wrong += wrong_gap(exact[0], quick[0]) > limit.gap
    assert 20 <= wrong <= 60, "2 % of 2000, and its chance"


def test_exact_ranking_of_a_model(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    exact, quick = lightrm.load(folder, scheme="fp32"), lightrm.load(folder, scheme="w4a8")
    prompts, lists = ["what?", "and now?", "why"], [ANSWERS, ANSWERS[:3], ANSWERS[2:]]
    wanted = exact.rank_batch(prompts, lists)
    error = max(wrong_gap(exact.score(p, some), quick.score(p, some)) for p, some in zip(prompts, lists, strict=True))
    found = quick.rank_batch(prompts, lists, exact=True, bound=error)
    order = [[r.index for r in one] for one in wanted]
    assert [[r.index for r in one] for one in found] == order
    assert found.effort is not None
    assert found.effort.limits == dict.fromkeys((3, 6, 8), Limit(error))
    assert found.effort.limit == Limit(error)
    assert found.effort.rescored == sum(one.rescored for one in found)
    assert 0 < found.effort.rescored_tokens <= found.effort.tokens
    beyond = []
    for smaller in (0.9 * error, 0.6 * error, 0.3 * error):
        found = quick.rank_batch(prompts, lists, exact=True, bound=smaller)
        shown = [[r.index for r in one if r.exact] for one in found]
        scores = [(exact.score(p, some), quick.score(p, some)) for p, some in zip(prompts, lists, strict=True)]
        errors = [order_error(f[seen], q[seen]) for (f, q), seen in zip(scores, shown, strict=True)]
        assert found.effort is not None
        assert found.effort.raised == sum(e > smaller for e in errors)
        beyond.append(found.effort.raised)
    assert max(beyond) > 0, "a bound that is too small was found out"
    assert quick.rank("what?", ANSWERS, exact=True, bound=1e9)[0].exact
    assert not quick.rank("what?", ANSWERS)[0].exact
    assert quick.rank_batch([], []) == []
    with pytest.raises(lightrm.InputError, match="lightrm fidelity"):
        quick.rank("what?", ANSWERS, exact=True)
    with pytest.raises(lightrm.InputError, match="list of responses for each"):
        quick.rank_batch("what?", [ANSWERS])


@pytest.mark.parametrize("bound", [-0.1, float("nan"), "0.5", True, np.float32("nan")])
def test_a_bound_that_is_none_is_refused(bound: object, tmp_path: Path) -> None:
    rm = lightrm.load(write_model(tmp_path / "model"), scheme="w8a8")
    with pytest.raises(lightrm.InputError, match="bound must be a difference of raw scores, 0 or more"):
        rm.rank("what?", ANSWERS, exact=True, bound=bound)  # type: ignore[arg-type]


@pytest.mark.parametrize("confidence", [0, 1, -0.5, 99.5, float("nan"), "0.9", True])
def test_a_confidence_that_is_none_is_refused(confidence: object, tmp_path: Path) -> None:
    rm = lightrm.load(write_model(tmp_path / "model"), scheme="w8a8")
    with pytest.raises(lightrm.InputError, match="confidence must be above 0 and below 1"):
        rm.rank("what?", ANSWERS, exact=True, bound=0.1, confidence=confidence)  # type: ignore[arg-type]
    with pytest.raises(lightrm.InputError, match="exact=True asks for"):
        rm.rank("what?", ANSWERS, bound=0.1)


def test_what_nobody_can_have_measured() -> None:
    for gap, error in ((-0.5, 1.0), (float("nan"), 1.0), (0.5, -1.0), (0.5, float("nan"))):
        with pytest.raises(ValueError, match="0 or more"):
            Bound({2: 9}, ((gap, 2),), error)


def test_a_quantized_folder_carries_its_bound(tmp_path: Path) -> None:
    """In its manifest; the summary is shown, the source is asked for, and scores and jobs do not change by it."""
    folder = write_model(tmp_path / "model")
    rm = lightrm.load(folder, scheme="w8a8")
    rm.save(tmp_path / "w8a8")
    before = lightrm.load(tmp_path / "w8a8")
    assert before.report.fidelity is None
    note = FidelityNote("tau-b 0.99 against fp32", "fp32", Bound({8: 399}, ((0.5, 8), (0.25, 8), (0.125, 8)), 0.75))
    quantized_folder.note_fidelity(tmp_path / "w8a8", note)
    loaded = lightrm.load(tmp_path / "w8a8", reference=folder)
    assert "tau-b 0.99 against fp32" in repr(loaded)
    found = loaded.rank_batch(["what?"], [ANSWERS], exact=True)
    assert found.effort is not None
    assert found.effort.limit == Limit(0.25, CONFIDENCE)
    assert "apart than 0.2500, which is enough for 99.50 % of prompts" in str(found.effort)
    surer = loaded.rank_batch(["what?"], [ANSWERS], exact=True, confidence=0.997).effort
    assert surer is not None
    assert surer.limit == Limit(0.5, 0.9975)
    assert loaded.rank_batch(["what?"], [ANSWERS], exact=True, confidence=0.999).effort.limit.gap == 0.75  # type: ignore[union-attr]
    with pytest.raises(lightrm.InputError, match="below 1"):
        loaded.rank("what?", ANSWERS, exact=True, confidence=99.5)
    exact = lightrm.load(folder, scheme="fp32").rank("what?", ANSWERS)
    assert [r.index for r in found[0]] == [r.index for r in exact]
    np.testing.assert_array_equal(loaded.score("what?", ANSWERS), before.score("what?", ANSWERS))
    with pytest.raises(lightrm.InputError, match="pass reference="):
        lightrm.load(tmp_path / "w8a8").rank("what?", ANSWERS, exact=True)
    assert not list((tmp_path / "w8a8").glob("*unfinished*"))
