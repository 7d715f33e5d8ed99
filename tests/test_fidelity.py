"""The fidelity report, from the command line to the page: what it says is what the scores say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import lightrm
from lightrm import measuring, native
from lightrm.agreement import Prompts, spread_of
from lightrm.cli import main
from lightrm.errors import InputError, SchemeError
from lightrm.fidelity import FidelityReport
from lightrm.sensitivity import measure_sensitivity
from tests.test_scoring import write_model

pytestmark = pytest.mark.usefixtures("few_draws")
RNG = np.random.default_rng(5)
WORDS = ["it", "is", "the", "weather", "sunny", "warm", "and", "cold", "a", "day", "天气", "很", "好", "不", "晴"]


def text(longest: int) -> str:
    return " ".join(RNG.choice(WORDS, RNG.integers(1, longest)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    lines = [
        {"prompt": text(9), "chosen": text(20), "rejected": text(20), "lang": "zh" if k % 2 else "en"}
        for k in range(60)
    ]
    lines += [{"prompt": text(5), "responses": [text(12) for _ in range(5)]} for _ in range(10)]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, ["fidelity", *map(str, arguments), "--quiet"])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_report_is_about_the_scores(folder: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    shown = run(folder, "--data", data, "--schemes", "w8a8,w4a8-g32", "-o", out, "--layers")
    assert "w4a8-g32" in shown
    report = FidelityReport.read(out / "fidelity.json")
    questions = lightrm.read_questions(data)
    prompts = [q.prompt for q in questions for _ in q.responses]
    answers = [r for q in questions for r in q.responses]
    for scheme in ("fp32", "bf16", "w8a8", "w4a8-g32"):
        scores = lightrm.load(folder, scheme=scheme).score_batch(prompts, answers)
        np.testing.assert_array_equal(report.scores[scheme].astype(np.float32), scores, scheme)
    assert (report.prompts, report.answers) == (70, 170)
    assert report.floor is not None
    assert report.floor.scheme == "bf16"
    assert report.row("w8a8").agreement.mean_error.value < report.row("w4a8-g32").agreement.mean_error.value
    assert report.row("w8a8").slices.keys() == {"en", "zh", "0-128 tokens"}
    assert [alone.scheme for alone in report.sensitivity] == ["w8a8", "w4a8-g32"]
    assert report.row("w8a8").agreement.accuracy is not None
    assert json.loads((out / "fidelity.json").read_text()) == json.loads(report.to_json()), "read and written alike"
    assert "Infinity" not in report.to_json()
    assert "NaN" not in report.to_json()
    page = (out / "fidelity.html").read_text(encoding="utf-8")
    assert page.count("<img") == 5
    assert not re.search(r'(src|href)="(?!data:)', page), "the page needs nothing but itself"
    assert "<table>" in report._repr_html_()
    assert "w8a8" in repr(report)
    with pytest.raises(InputError, match="no scheme 'nf4'"):
        report.row("nf4")


def test_a_stopped_run_goes_on(folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done is not done again; other texts, or another model, are."""
    scored: list[str] = []
    measured = measuring.measured

    def stops(rm: lightrm.RewardModel, scheme: str, *rest: object) -> object:
        if scheme == "w8a8" and "w8a8" not in scored:
            scored.append(scheme)
            raise KeyboardInterrupt
        scored.append(scheme)
        return measured(rm, scheme, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(measuring, "measured", stops)
    with pytest.raises(KeyboardInterrupt):
        lightrm.measure_fidelity(folder, data, schemes=["w8a8"], keep=tmp_path)
    assert scored == ["fp32", "bf16", "w8a8"]
    first = lightrm.measure_fidelity(folder, data, schemes=["w8a8"], keep=tmp_path)
    assert scored == ["fp32", "bf16", "w8a8", "w8a8"]
    again = lightrm.measure_fidelity(folder, data, schemes=["w8a8"], keep=tmp_path)
    assert scored == ["fp32", "bf16", "w8a8", "w8a8"]
    assert again.to_json() == first.to_json()
    lightrm.measure_fidelity(folder, lightrm.read_questions(data)[:9], schemes=["w8a8"], keep=tmp_path)
    assert scored[4:] == ["fp32", "bf16", "w8a8"]


def test_the_gate(folder: Path, data: Path) -> None:
    arguments = ["fidelity", str(folder), "--data", str(data), "--schemes", "w4a8", "--limit", "20", "--quiet"]
    assert CliRunner().invoke(main, [*arguments, "--fail-under", "-1"]).exit_code == 0
    failed = CliRunner().invoke(main, [*arguments, "--fail-under", "0.999999"])
    assert failed.exit_code == 1
    assert "w4a8: tau-b" in failed.stderr


def test_a_quantized_folder_keeps_the_result(folder: Path, data: Path, tmp_path: Path) -> None:
    target = tmp_path / "w8a8"
    assert CliRunner().invoke(main, ["quantize", str(folder), str(target), "--scheme", "w8a8"]).exit_code == 0
    refused = CliRunner().invoke(main, ["fidelity", str(target), "--data", str(data)])
    assert refused.exit_code == 1
    assert "--reference-model" in refused.output
    run(target, "--data", data, "--reference-model", folder)
    note = native.read_manifest(target).fidelity
    assert note is not None
    assert sum(note.bound.prompts.values()) == 70
    assert note.bound == lightrm.load(target).report.fidelity.bound  # type: ignore[union-attr]
    assert note.summary in repr(lightrm.load(target))
    assert "against fp32 on 70 prompts of pairs.jsonl" in note.summary


def test_calibrated_schemes_are_named_so(folder: Path, data: Path, tmp_path: Path) -> None:
    report = lightrm.measure_fidelity(
        folder, data, schemes=["w8a8", "w4a8", "w4a8+cal"], calibration=[(text(9), text(30)) for _ in range(20)]
    )
    assert [row.scheme for row in report.rows] == ["w8a8", "w4a8", "w4a8+cal"]
    assert not np.array_equal(report.scores["w4a8"], report.scores["w4a8+cal"])
    texts = ([(text(9), text(30)) for _ in range(20)] for _ in range(2))
    first, other = (
        lightrm.measure_fidelity(folder, data, schemes=["w8a8+cal"], calibration=some, keep=tmp_path) for some in texts
    )
    assert not np.array_equal(first.scores["w8a8+cal"], other.scores["w8a8+cal"]), "kept scores are of their own text"
    for schemes, text_given in ((["w4a8+cal"], None), (["w4a8"], [("a", "b")])):
        with pytest.raises(InputError, match="calibration text"):
            lightrm.measure_fidelity(folder, data, schemes=schemes, calibration=text_given)
    half = lightrm.measure_fidelity(folder, data, schemes=["w8a8"], reference="bf16")
    assert half.floor is None


def test_layers_add_up(folder: Path, data: Path) -> None:
    """No layer quantized is exact, all of them are the scheme; and a wrong question is refused."""
    rm = lightrm.load(folder, scheme="w4a8")
    questions = lightrm.read_questions(data)
    found = measure_sensitivity(rm, questions, tokens=500)
    assert len(found.layers) == len(rm.decoder.layers)
    assert all(moved > 0 for moved in found.layers)
    assert found.most[0] == int(np.argmax(found.layers))
    exact = lightrm.load(folder, scheme="fp32")
    taken = [(q.prompt, r, k) for k, q in enumerate(questions) for r in q.responses][: found.answers]
    prompts, answers, prompt = map(list, zip(*taken, strict=True))
    reference = exact.score_batch(prompts, answers).astype(float)
    error = np.sqrt(np.mean((rm.score_batch(prompts, answers) - reference) ** 2))
    assert found.whole == pytest.approx(error / spread_of(reference, Prompts(np.asarray(prompt))), rel=1e-3)
    with pytest.raises(SchemeError, match="not of bf16"):
        measure_sensitivity(lightrm.load(folder, scheme="bf16"), questions)


def test_reports_that_are_none(tmp_path: Path) -> None:
    for content in ("{", "[]", '{"format": 99}', '{"format": 1}'):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(InputError, match=r"x\.json"):
            FidelityReport.read(tmp_path / "x.json")
