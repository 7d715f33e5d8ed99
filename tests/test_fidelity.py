"""The fidelity report, from the command line to the page: what it says is what the scores say."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner

import lightrm
from lightrm.cli import main
from lightrm.engine.answer_ids import AnswerIds
from lightrm.engine.engine import Engine
from lightrm.errors import InputError, NumericsError, SchemeError
from lightrm.judge.agreement import Prompts, spread_of
from lightrm.judge.bounds import Bound, FidelityNote
from lightrm.judge.fidelity import Asked, FidelityReport, Measured, Sensitivity, build
from lightrm.judge.report_page import write_report
from lightrm.loading import quantized_folder
from lightrm.measure import measurement
from lightrm.measure.measurement import spread
from lightrm.measure.sensitivity import measure_sensitivity
from lightrm.model.decoder import Decoder
from lightrm.model.head import ValueHead
from tests.test_scoring import write_model
from tests.zoo import LLAMA_CONFIG, write_tokenizer

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
    measured = measurement.measured

    def stops(rm: lightrm.RewardModel, scheme: str, *rest: object) -> object:
        if scheme == "w8a8" and "w8a8" not in scored:
            scored.append(scheme)
            raise KeyboardInterrupt
        scored.append(scheme)
        return measured(rm, scheme, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(measurement, "measured", stops)
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
    passed = CliRunner().invoke(main, [*arguments, "--fail-under", "-1"])
    assert passed.exit_code == 0
    assert "20 prompts with" in " ".join(passed.stdout.split())
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
    note = quantized_folder.read_manifest(target).fidelity
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


def test_layers_add_up(folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No layer quantized is exact, all of them are the scheme; and a wrong question is refused."""
    monkeypatch.setattr("lightrm.kernels.cpu.cpu_passes.PAIRS", False)  # compared with float32 attention
    rm = lightrm.load(folder, scheme="w4a8")
    questions = lightrm.read_questions(data)
    found = measure_sensitivity(rm, questions, tokens=500)
    assert len(found.layers) == len(rm.engine.decoder.layers)
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


def small_report() -> FidelityReport:
    prompt = np.repeat(np.arange(4), 2)
    exact = np.arange(8) ** 1.5
    asked = Asked("d", prompt, np.full(8, 3), ["en"] * 8, np.tile([1.0, 0.0], 4))
    found = [Measured("w8a8", exact + 0.1 * np.cos(exact), 9, 2.0, {"embedding": np.inf, "layers.0.qkv": 40.0})]
    report = build("m", asked, Measured("fp32", exact, 9, 2.0), found, None, {"date": "today"})
    return replace(report, sensitivity=(Sensitivity("w8a8", (0.5, 0.25), 0.6, 8, 24),))


HOSTILE = (None, True, -1, 10**400, 1.5, "x", [], [[]], {}, {"x": None}, [None], ["x"])


def mutated(raw: Any) -> Iterator[Any]:
    """One value of a JSON document after the other, replaced by each hostile one, or gone; the first of each list."""
    yield from HOSTILE
    keys = list(raw) if isinstance(raw, dict) else list(range(min(1, len(raw)))) if isinstance(raw, list) else []
    for key in keys:
        for other in mutated(raw[key]):
            copy = dict(raw) if isinstance(raw, dict) else list(raw)
            copy[key] = other
            yield copy
        if isinstance(raw, dict):
            yield {name: value for name, value in raw.items() if name != key}


def test_reports_that_are_none(tmp_path: Path) -> None:
    """Whatever stands in the file, it is a report that can be shown, or an InputError that names it."""
    path = tmp_path / "x.json"
    deep = '{"format": 3, "rows": ' + "[" * 100_000 + "]" * 100_000 + "}"
    for content in ("", "{", "[]", "null", '{"format": 99}', '{"format": 1}', deep, '{"format": 3}', "NaN"):
        path.write_text(content)
        with pytest.raises(InputError, match=r"x\.json"):
            FidelityReport.read(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"x\.json"):
        FidelityReport.read(path)
    report = small_report()
    path.write_text(report.to_json())
    assert FidelityReport.read(path).to_json() == report.to_json()
    refused = shown = 0
    every = 0
    for k, other in enumerate(mutated(json.loads(report.to_json()))):
        every += 1
        path.write_text(json.dumps(other))
        try:
            found = FidelityReport.read(path)
        except InputError as error:
            refused += "x.json" in str(error)
            continue
        shown += 1
        if k % 20 == 0:
            assert found.table().rows
            assert found.to_json()
            assert found._repr_html_()
    assert refused + shown == every > 400, "each refusal names the file"
    assert refused > shown > 50, "null is a NaN in many places, and a wrong text is a text"


def test_bounds_that_nobody_measured() -> None:
    good = json.loads(json.dumps(asdict(Bound({2: 9}, ((0.5, 2), (0.25, 2)), 0.75))))
    assert Bound.read(good).gaps == ((0.5, 2), (0.25, 2))
    for bad in (
        {"error": -1.0}, {"error": float("nan")}, {"gaps": [[-0.5, 2]]}, {"gaps": [[0.25, 2], [0.5, 2]]},
        {"gaps": [[1]]}, {"gaps": [[1e999, 2]]}, {"prompts": {"2": -1}}, {"prompts": {"x": 1}}, {"prompts": 3},
        {"more": 1}, {"error": "1"},
    ):  # fmt: skip
        with pytest.raises(InputError):
            Bound.read(good | bad)
    with pytest.raises(InputError, match="lacks 'reference'"):
        FidelityNote.read({"summary": "x", "bound": good})


def test_kernels_are_warm_before_the_clock_starts(folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What each scheme is timed for is the same ids through all layers, after two layers were run for nothing."""
    seen: list[object] = []
    scores, clock = Engine.scores, time.perf_counter

    def watched(engine: Engine, ids: list[list[int]], *rest: Any) -> Any:
        layers = engine.decoder.layers
        seen.append(("warm up" if layers[0] is layers[1] else "all", len(ids)))
        return scores(engine, ids, *rest)

    def ticked() -> float:
        seen.append("clock")
        return clock()

    monkeypatch.setattr(Engine, "scores", watched)
    questions = lightrm.read_questions(data)[:30]
    for scheme in ("fp32", "w8a8"):
        rm = lightrm.load(folder, scheme=scheme)
        rm.token_budget = 100  # so that there are several packs
        ids = rm.encode([q.prompt for q in questions], [q.responses[0] for q in questions])
        seen.clear()
        monkeypatch.setattr(measurement.time, "perf_counter", ticked)
        measurement.measured(rm, scheme, AnswerIds(ids), None, False)
        first = seen.index("clock")
        assert {name for name, _ in seen[:first]} == {"warm up"}
        assert seen[first:] == ["clock", ("all", 30), "clock"]
        monkeypatch.setattr(measurement.time, "perf_counter", clock)
    seen.clear()
    monkeypatch.setattr(measurement.time, "perf_counter", ticked)
    lightrm.evaluate(rm, questions)
    assert seen.index("clock") < next(k for k, what in enumerate(seen) if what != "clock")
    assert seen[-3:] == ["clock", ("all", 60), "clock"]


def test_warming_up_says_nothing_of_the_model(folder: Path) -> None:
    """No texts are no error; nor is an overflow of a layer that is run twice, which no score comes from."""
    rm = lightrm.load(folder, scheme="fp32")
    rm.engine.warm_up([])
    scores = rm.score("what?", ["it is"])
    bias_O = torch.full((1,), torch.inf)
    rm.engine.head = ValueHead(rm.engine.head.weights, (bias_O,), rm.engine.head.post)
    rm.engine.warm_up([[1, 2, 3]])
    with pytest.raises(NumericsError):
        rm.score("what?", ["it is"])
    assert np.isfinite(scores).all()


def test_the_limit_is_the_number_taken(data: Path) -> None:
    questions = lightrm.read_questions(data)
    for count in (1, 2, 20, 40, 69, 70, 71, None):
        taken = [questions.index(q) for q in spread(questions, count)]
        assert len(taken) == min(count or 70, 70)
        steps = np.diff(taken)
        assert len(steps) == 0 or (steps.min() >= 1 and steps.max() - steps.min() <= 1)


def test_calibration_tokens_are_the_models(folder: Path) -> None:
    """As many whole texts as have no more tokens, counted by the model's tokenizer, Chinese or not."""
    rm = lightrm.load(folder)
    texts = [("天气很好" * 3, "天气很好。" * k) for k in range(1, 9)]
    lengths = np.cumsum([len(rm.encode([p], [r])[0]) for p, r in texts])
    for most in (lengths[0], lengths[3], lengths[3] + 1, lengths[-1], 10**6):
        taken = rm.text.first_texts(iter(texts), int(most))
        assert sum(map(len, taken)) == max(n for n in lengths if n <= most)
        assert taken == rm.encode([p for p, _ in texts], [r for _, r in texts])[: len(taken)]
    assert len(rm.text.first_texts(iter(texts), None)) == len(texts)
    with pytest.raises(InputError, match="no calibration text of 3 tokens"):
        rm.text.first_texts(texts, 3)
    calibrated = lightrm.load(folder, scheme="w4a8", calibration=iter(texts), calibration_tokens=int(lengths[3]))
    assert f"calibrated on 4 texts of {lengths[3]} tokens" in str(calibrated.report)
    with pytest.raises(InputError, match="calibration holds no texts"):
        lightrm.load(folder, scheme="w4a8", calibration=[])


def test_damaged_scores_are_measured_again(folder: Path, data: Path, tmp_path: Path) -> None:
    def measure() -> tuple[str, list[str]]:
        said: list[str] = []
        questions = lightrm.read_questions(data)[:9]
        report = lightrm.measure_fidelity(folder, questions, schemes=["w8a8"], keep=tmp_path, tell=said.append)
        return json.dumps([report.scores["w8a8"].tolist()]), said

    whole, _ = measure()
    kept = tmp_path / "scores-w8a8.json"
    text = kept.read_text()
    last = re.findall(r"-?\d+\.\d+", text)[-1]
    for damaged in (
        text[:-9],
        "[" * 100_000,
        "null",
        "{}",
        text.replace("scores", "scoers"),
        text.replace(last, "7.5"),
    ):
        kept.write_text(damaged)
        again, said = measure()
        assert again == whole
        if damaged != "{}":
            assert any(line.startswith(str(kept)) and line.endswith("w8a8 is measured again") for line in said), said
        assert kept.read_text() != damaged


def test_a_quantized_folder_is_known_however_it_is_named(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`~`, a hub id; and a revision of it is not one of what it was made from."""
    rm = lightrm.load(folder, scheme="w8a8")
    rm.save(tmp_path / "q")
    asked: list[tuple[str, str | None]] = []

    def fetch(name: str, revision: str | None) -> Path:
        asked.append((name, revision))
        return tmp_path / "q" if name == "owner/quantized" else folder

    monkeypatch.setattr("lightrm.checkpoints.hub.fetch", fetch)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("~/q", "owner/quantized", tmp_path / "q"):
        with pytest.raises(InputError, match="is quantized: name the model it was made from"):
            lightrm.measure_fidelity(name, data)
        refused = CliRunner().invoke(main, ["fidelity", str(name), "--data", str(data), "--quiet"])
        assert refused.exit_code == 1
        assert "--reference-model" in refused.stderr
    before = quantized_folder.read_manifest(tmp_path / "q").fidelity
    shown = CliRunner().invoke(
        main, ["fidelity", "owner/quantized", "--data", str(data), "--reference-model", str(folder), "--limit", "9"]
    )
    assert shown.exit_code == 0, shown.output
    assert "is left as it is" in shown.stderr
    assert quantized_folder.read_manifest(tmp_path / "q").fidelity == before
    asked.clear()
    lightrm.load("owner/quantized", revision="v1", reference="owner/source")._exact()
    assert asked == [("owner/quantized", "v1"), ("owner/source", None)]
    asked.clear()
    lightrm.load("owner/source", revision="v2", scheme="w8a8")._exact()
    assert asked == [("owner/source", "v2"), ("owner/source", "v2")]


def test_a_wrong_scheme_is_refused_before_anything_is_scored(folder: Path, data: Path) -> None:
    said: list[str] = []
    for schemes, reference in ((["w8a8", "w9"], "fp32"), (["w8a8"], "fp33")):
        with pytest.raises(SchemeError):
            lightrm.measure_fidelity(folder, data, schemes=schemes, reference=reference, tell=said.append)
    assert said == []


def test_the_page_is_readable_in_the_dark_and_breaks_no_interval(folder: Path, data: Path, tmp_path: Path) -> None:
    """Every colour of the page is a variable that the dark scheme sets anew; a figure and its interval stay whole."""
    questions = lightrm.read_questions(data)[:30]
    report = lightrm.measure_fidelity(folder, questions, schemes=["w8a8"])
    text = write_report(report, tmp_path).read_text(encoding="utf-8")
    style = text.partition("<style>")[2].partition("</style>")[0]
    light, _, rest = style.partition("@media (prefers-color-scheme: dark)")
    dark, _, rules = rest.partition("} }")
    names = set(re.findall(r"--(\w+):", light))
    assert names == set(re.findall(r"--(\w+):", dark)) == set(re.findall(r"var\(--(\w+)\)", rules))
    assert re.findall(r"(?<!background: )#[0-9a-f]{3,6}", rules) == [], "but white paper behind pictures"
    assert "color-scheme: light dark" in style
    cells = re.findall(r"<td>(.*?)</td>", text)
    intervals = [cell for cell in cells if "(" in re.sub(r"<[^>]*>", "", cell).replace("(floor)", "")]
    assert len(intervals) > 5
    for cell in cells:
        parts = re.findall(r'<span style="white-space:nowrap">([^<]*)</span>', cell)
        assert " ".join(parts) == re.sub(r"<[^>]*>", "", cell), "nothing is outside of a part that stays whole"
    for cell in intervals:
        assert re.fullmatch(r"\([^()]+\)", re.findall(r">([^<]+)</span>", cell)[1]), "an interval is one part"


def test_steps_are_measured_as_one_score(tmp_path: Path) -> None:
    """Evaluation and fidelity of a process model are of the reduced scores, also layer by layer, and of the command."""
    from tests.test_process_models import PROMPT, published

    model = published("qwen", tmp_path)
    answers = ["We need 6 * 7.\n\n6 * 7 = 42.", "Nothing\n\n41", "42", "six\n\nseven\n\n13"]
    records = [
        {"prompt": f"{PROMPT} {k}", "chosen": answers[k % 4], "rejected": answers[(k + 1) % 4]} for k in range(8)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    questions = lightrm.read_questions(path)
    for reduce in ("min", "product"):
        rm = lightrm.load(model.folder, scheme="w8a8", reduce=reduce)
        scores = np.stack([rm.score(q.prompt, q.responses) for q in questions])
        assert lightrm.evaluate(rm, questions).accuracy.value == (scores[:, 0] > scores[:, 1]).mean()
        report = lightrm.measure_fidelity(model.folder, path, schemes=["w8a8"], reduce=reduce, layers=reduce == "min")
        np.testing.assert_array_equal(report.scores["w8a8"], scores.ravel())
        whole = rm.encode([q.prompt for q in questions for _ in range(2)], [r for q in questions for r in q.responses])
        assert report.tokens == sum(map(len, whole)), "the tokens of an answer count once, not once a step"
    (alone,) = lightrm.measure_fidelity(
        model.folder, path, schemes=["w8a8"], reduce="min", layers=True, keep=tmp_path / "kept"
    ).sensitivity
    assert alone.answers == 16
    other = lightrm.measure_fidelity(model.folder, path, schemes=["w8a8"], reduce="product", keep=tmp_path / "kept")
    np.testing.assert_array_equal(other.scores["w8a8"], scores.ravel(), "scores kept under min are not taken")
    with pytest.raises(InputError, match="reduce= one of"):
        lightrm.measure_fidelity(model.folder, path, schemes=["w8a8"])
    found = CliRunner().invoke(
        main, ["evaluate", str(model.folder), "--data", str(path), "--scheme", "w8a8", "--reduce", "product", "--json"]
    )
    assert json.loads(found.stdout.splitlines()[-1])["eval_accuracy"] == (scores[:, 0] > scores[:, 1]).mean()
    command = ["fidelity", str(model.folder), "--data", str(path), "--schemes", "w8a8", "--reduce", "min", "--quiet"]
    assert CliRunner().invoke(main, command).exit_code == 0


def test_attributes_are_measured_as_one_score(tmp_path: Path) -> None:
    sizes = {k: v for k, v in LLAMA_CONFIG.items() if k not in ("architectures", "model_type", "vocab_size")}
    torch.manual_seed(3)
    config = transformers.LlamaConfig(**sizes, vocab_size=340, id2label=dict(enumerate("ab")), pad_token_id=0)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    records = [{"prompt": f"what {k}?", "chosen": text(9), "rejected": text(9)} for k in range(8)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    report = lightrm.measure_fidelity(
        tmp_path / "model", path, schemes=["w8a8"], template="ziya", weights={"a": 1.0, "b": -0.5}
    )
    rm = lightrm.load(tmp_path / "model", scheme="w8a8", template="ziya", weights=[1.0, -0.5])
    scores = [s for r in records for s in rm.score(r["prompt"], [r["chosen"], r["rejected"]]).tolist()]
    np.testing.assert_array_equal(report.scores["w8a8"], scores)
    command = ["evaluate", str(tmp_path / "model"), "--data", str(path), "--template", "ziya", "--json", "--quiet"]
    found = CliRunner().invoke(main, [*command, "--scheme", "w8a8", "--weights", "a=1,b=-0.5"])
    right = np.asarray(scores).reshape(-1, 2)
    assert json.loads(found.stdout.splitlines()[-1])["eval_accuracy"] == (right[:, 0] > right[:, 1]).mean()


def test_a_layer_of_each_kind_is_warmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3 has layers with a window and positions of their own: the first global one is the sixth."""
    config = transformers.Gemma3TextConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=7, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, vocab_size=64, sliding_window=4, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    transformers.Gemma3TextForSequenceClassification(config).save_pretrained(tmp_path)
    rm = lightrm.load(tmp_path, scheme="fp32")
    seen: list[Any] = []

    def watched(self: Decoder, layer: Any, i: int, flow: Any) -> None:
        seen.append((self.rules[i].window, self.architecture.positions_in(i)))
        return attended(self, layer, i, flow)

    attended = Decoder.attention
    monkeypatch.setattr(Decoder, "attention", watched)
    rm.engine.warm_up([[1, 2, 3, 4, 5, 6]])
    warmed = list(seen)
    seen.clear()
    rm.score_ids([[1, 2, 3, 4, 5, 6]])
    assert len(set(warmed)) == len(warmed) == 2
    assert set(seen) == set(warmed)
