"""A guaranteed ranking: the full-precision order, whatever the errors within the bound, without all of its work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lightrm
from lightrm import native
from lightrm.bounds import Bound, FidelityNote, order_error
from lightrm.ranking import groups, plain_ranking, ranking, settled, too_close
from tests.test_scoring import write_model

ANSWERS = ["it is", "天气很好", "a b c", "x", "the weather", "no", "yes yes yes", "?"]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(-40, 40), min_size=1, max_size=9), min_size=1, max_size=5),
    st.integers(0, 12),
    st.randoms(use_true_random=False),
)
def test_within_the_bound_the_order_is_the_full_one(exact: list[list[int]], most: int, rng) -> None:
    """Also where scores tie, and where errors are larger than the bound but too small to change an order."""
    full = [np.asarray(scores, np.float32) for scores in exact]
    errors = [np.asarray([rng.randint(-most, most) for _ in scores], np.float32) for scores in exact]
    quick = [f + e for f, e in zip(full, errors, strict=True)]
    bound = max(order_error_of(f, q) for f, q in zip(full, quick, strict=True))
    asked: list[tuple[int, int]] = []

    def rescore(wanted: list[tuple[int, int]]) -> list[float]:
        asked.extend(wanted)
        return [float(full[k][i]) for k, i in wanted]

    known, sufficed = settled(quick, bound, rescore)
    assert sufficed == [bound] * len(full)
    assert len(asked) == len(set(asked)), "nothing is scored twice"
    for k, (q, known_k, f) in enumerate(zip(quick, known, full, strict=True)):
        texts = [str(i) for i in range(len(q))]
        found = ranking(q, known_k, sufficed[k], texts)
        assert [r.position for r in found] == [r.position for r in plain_ranking(f, texts)]
        assert all(r.score == f[r.position] for r in found if r.exact)
        assert found.rescored == int((~np.isnan(known_k)).sum())


def order_error_of(full: np.ndarray, quick: np.ndarray) -> float:
    """By its definition, over a prompt's pairs."""
    first, second = np.triu_indices(len(full), 1)
    return order_error(full[first] - full[second], quick[first] - quick[second])


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
    known, sufficed = settled(quick, 0.2, lambda wanted: [float(full[k][i]) for k, i in wanted])
    assert sufficed == [pytest.approx(1.0), 0.2]
    assert [r.position for r in ranking(quick[0], known[0], sufficed[0], list("abcd"))] == [3, 0, 2, 1]
    assert np.isnan(known[1]).tolist() == [True, False, False]


def test_an_error_counts_where_it_could_change_the_order() -> None:
    exact, quick = np.asarray([1.0, 5.0, 0.2, -3.0]), np.asarray([0.9, 2.0, -0.1, -3.0])
    assert order_error(exact, quick) == pytest.approx(3.0), "5 taken for 2: with the other sign it would be -1"
    assert order_error(exact[[0, 2, 3]], quick[[0, 2, 3]]) == pytest.approx(0.3)
    assert order_error(exact[[0, 3]], quick[[0, 3]]) == 0
    assert order_error(np.zeros(1), np.asarray([0.25])) == 0.25, "a tie that was torn"
    assert order_error(np.zeros(0), np.zeros(0)) == 0


def test_exact_ranking_of_a_model(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    exact, quick = lightrm.load(folder, scheme="fp32"), lightrm.load(folder, scheme="w4a8")
    prompts, lists = ["what?", "and now?", "why"], [ANSWERS, ANSWERS[:3], ANSWERS[2:]]
    wanted = exact.rank_batch(prompts, lists)
    error = max(
        order_error_of(exact.score(p, some).astype(float), quick.score(p, some).astype(float))
        for p, some in zip(prompts, lists, strict=True)
    )
    found = quick.rank_batch(prompts, lists, exact=True, bound=error)
    order = [[r.position for r in one] for one in wanted]
    assert [[r.position for r in one] for one in found] == order
    assert found.effort is not None
    assert found.effort.confidence is None
    assert found.effort.rescored == sum(one.rescored for one in found)
    assert 0 < found.effort.rescored_tokens <= found.effort.tokens
    assert (found.effort.bound, found.effort.raised) == (error, 0)
    beyond = []
    for smaller in (0.9 * error, 0.6 * error, 0.3 * error):
        found = quick.rank_batch(prompts, lists, exact=True, bound=smaller)
        shown = [[r.position for r in one if r.exact] for one in found]
        scores = [(exact.score(p, some), quick.score(p, some)) for p, some in zip(prompts, lists, strict=True)]
        errors = [order_error_of(f[seen].astype(float), q[seen]) for (f, q), seen in zip(scores, shown, strict=True)]
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


def test_a_quantized_folder_carries_its_bound(tmp_path: Path) -> None:
    """In its manifest; the summary is shown, the source is asked for, and scores and jobs do not change by it."""
    folder = write_model(tmp_path / "model")
    rm = lightrm.load(folder, scheme="w8a8")
    native.write(tmp_path / "w8a8", rm.checkpoint, rm.decoder, rm.head, rm.report, "ziya")
    before = lightrm.load(tmp_path / "w8a8")
    assert before.report.fidelity is None
    native.note_fidelity(tmp_path / "w8a8", FidelityNote("tau-b 0.99 against fp32", "fp32", Bound(0.25, 99)))
    loaded = lightrm.load(tmp_path / "w8a8", reference=folder)
    assert "tau-b 0.99 against fp32" in repr(loaded)
    found = loaded.rank_batch(["what?"], [ANSWERS], exact=True)
    assert found.effort is not None
    assert found.effort.confidence == 0.99
    assert "99.00 % of prompts" in str(found.effort)
    exact = lightrm.load(folder, scheme="fp32").rank("what?", ANSWERS)
    assert [r.position for r in found[0]] == [r.position for r in exact]
    np.testing.assert_array_equal(loaded.score("what?", ANSWERS), before.score("what?", ANSWERS))
    with pytest.raises(lightrm.InputError, match="pass reference="):
        lightrm.load(tmp_path / "w8a8").rank("what?", ANSWERS, exact=True)
    assert not list((tmp_path / "w8a8").glob("*unfinished*"))
