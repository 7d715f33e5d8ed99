"""Evaluation, calibration and combination: numbers in, numbers out, against their definitions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import lightrm
from lightrm.cli import main
from lightrm.data.preferences import Question
from lightrm.errors import InputError
from lightrm.judge.calibration import Affine, Isotonic, Platt, read_calibration
from lightrm.judge.combination import combine
from lightrm.judge.evaluation import evaluate_scores
from tests.test_scoring import write_model

QUESTIONS = [
    Question("a", ("long enough", "short"), (1.0, 0.0), "en", "helpful", "s"),
    Question("b", ("天气", "天气很好"), (1.0, 0.0), "zh", "helpful", "t"),
    Question("c", ("x", "y", "z"), (2.0, 1.0, 1.0), "en", "safety", "t"),
    Question("d", ("no", "label"), None, "en", "safety", "t"),
]
SCORES = np.asarray([1.0, -1.0, 0.5, 0.75, 3.0, 3.0, 2.0, 9.0, 8.0], np.float32)
MARGINS = [2.0, -0.25, 0.0, 1.0]


def test_the_fields_of_the_cards() -> None:
    found = evaluate_scores(QUESTIONS, SCORES, 2.0, "m", "d", "fp32")
    assert found.fields == {
        "eval_accuracy": 0.5,  # a tie is not right
        "eval_loss": pytest.approx(np.mean([math.log(1 + math.exp(-m)) for m in MARGINS])),
        "eval_runtime": 2.0,
        "eval_samples_per_second": 2.0,
        "eval_steps_per_second": 0.5,
    }
    assert found.longer.value == pytest.approx((1 + 0 + 0.5 + 0.5) / 4)
    assert (found.pairs, found.prompts) == (4, 3)
    parts = {(part.by, part.name): (part.accuracy.value, part.accuracy.n) for part in found.parts}
    assert parts["lang", "zh"] == (0.0, 1)
    assert parts["kind", "safety"] == (0.5, 2)
    assert parts["source", "t"] == (pytest.approx(1 / 3), 3)
    assert "eval_accuracy" in str(found)
    assert found.accuracy.low < 0.5 < found.accuracy.high
    with pytest.raises(InputError, match="prefers no answer"):
        evaluate_scores(QUESTIONS[3:], SCORES[7:], 1.0, "m", "d", "fp32")


def test_the_command_prints_them(tmp_path: Path) -> None:
    folder, data = write_model(tmp_path / "model"), tmp_path / "pairs.jsonl"
    records = [{"prompt": "x", "chosen": "it is", "rejected": "no"}, {"prompt": "y", "chosen": "a b", "rejected": "z"}]
    data.write_text("\n".join(map(json.dumps, [*records, {"prompt": 1}])), encoding="utf-8")
    shown = CliRunner().invoke(main, ["evaluate", str(folder), "--data", str(data), "--json", "--quiet"])
    assert shown.exit_code == 0, shown.output
    assert "pairs.jsonl, line 3: " in shown.stderr
    fields = json.loads(shown.stdout)
    rm = lightrm.load(folder)
    chosen, rejected = (rm.score_batch(["x", "y"], [r[side] for r in records]) for side in ("chosen", "rejected"))
    assert fields["eval_accuracy"] == float((chosen > rejected).mean())
    assert fields["eval_loss"] == pytest.approx(float(np.logaddexp(0, rejected - chosen).mean()), rel=1e-4)
    table = CliRunner().invoke(main, ["evaluate", str(folder), "--data", str(data), "--quiet"])
    assert "the longer answer" in table.stdout


def test_affine_and_platt(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(3, 2, 4000)
    affine = Affine.fit(scores, 0.5 * scores - 1)
    assert (affine.slope, affine.offset) == (pytest.approx(0.5), pytest.approx(-1))
    labels = rng.random(4000) < 1 / (1 + np.exp(-(0.8 * scores - 2)))
    platt = Platt.fit(scores, labels)
    assert (platt.slope, platt.offset) == (pytest.approx(0.8, abs=0.1), pytest.approx(-2, abs=0.3))
    logit = platt.slope * scores + platt.offset
    np.testing.assert_allclose(platt(scores), 1 / (1 + np.exp(-logit)))
    for made in (affine, platt, Isotonic.fit(scores[:9], labels[:9])):
        made.save(tmp_path / "one.json")
        again = read_calibration(tmp_path / "one.json")
        assert again == made
        np.testing.assert_array_equal(again(scores), made(scores))
    with pytest.raises(InputError, match="both of them"):
        Platt.fit([1, 2], [1, 1])
    with pytest.raises(InputError, match="all of these are equal"):
        Affine.fit([1, 1], [1, 2])
    with pytest.raises(InputError, match="one length"):
        Affine.fit([1, 2], [1, 2, 3])
    with pytest.raises(InputError, match="NaN"):
        Isotonic.fit([1, np.nan], [1, 2])
    affine, isotonic = '{"format": 1, "kind": "affine", ', '{"format": 1, "kind": "isotonic", '
    for text, says in (
        ("{", r"bad\.json is not a calibration"),
        ('{"format": 1, "kind": ["affine"]}', r"bad\.json is not a calibration: its kind is"),
        ('{"format": 2, "kind": "affine"}', "of another format"),
        (affine + '"slope": "3", "offset": 1}', r"bad\.json\.slope must be a number"),
        (affine + '"slope": 1, "offset": true}', r"bad\.json\.offset must be a number"),
        (affine + '"slope": [1, 2], "offset": 1}', r"bad\.json\.slope must be a number"),
        (affine + '"slope": null, "offset": 1}', "slope must be finite"),
        (affine + '"offset": 1}', r"bad\.json lacks 'slope'"),
        (isotonic + '"knots": ["a"], "values": [1]}', r"bad\.json\.knots\[0\] must be a number"),
        (isotonic + '"knots": [], "values": []}', "a value for each knot"),
        (isotonic + '"knots": [1, 2], "values": [1]}', "a value for each knot"),
        (isotonic + '"knots": [2, 1], "values": [1, 2]}', "must not decrease"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(InputError, match=says):
            read_calibration(tmp_path / "bad.json")


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=1, max_size=30))
def test_isotonic_is_the_closest_that_never_falls(points: list[tuple[int, int]]) -> None:
    x, y = np.asarray(points, float).T
    fitted = Isotonic.fit(x, y)
    grid = np.linspace(-12, 12, 97)
    assert (np.diff(fitted(grid)) >= 0).all()
    loss = ((fitted(x) - y) ** 2).sum()
    assert fitted(x).sum() == pytest.approx(y.sum())
    for other in (
        np.full_like(x, y.mean()),
        np.where(x > np.median(x), y[x > np.median(x)].mean() if (x > np.median(x)).any() else 0, y.min()),
    ):
        if (np.diff(other[np.argsort(x, kind="stable")]) >= 0).all():
            assert loss <= ((other - y) ** 2).sum() + 1e-9


def test_llama_2s_combination() -> None:
    helpful, safe = np.asarray([1.0, 2.0, 3.0, 4.0]), np.asarray([0.5, -1.74, -1.73, 5.0])
    raw = combine(helpful, safe, risky=[True, False, False, False], whiten=False)
    np.testing.assert_array_equal(raw, [0.5, -1.74, 3.0, 4.0])  # logit(0.15) is -1.7346: a probability, not a score
    white = combine(helpful, safe, risky=[True, False, False, False])
    assert (white.mean(), white.std()) == (pytest.approx(0), pytest.approx(1))
    np.testing.assert_array_equal(np.argsort(white), np.argsort(raw))
    np.testing.assert_array_equal(combine([1, 1], [3, 3]), [0, 0])
    np.testing.assert_array_equal(combine(helpful, safe, unsafe_below=0, whiten=False), helpful)
    for bad in ({"unsafe_below": 1.5}, {"risky": [True]}):
        with pytest.raises(InputError):
            combine(helpful, safe, **bad)
