"""The command line, through click's own runner and once as a real process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import lightrm
from lightrm.cli import main
from tests.test_scoring import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


RECORDS = [
    {"id": 7, "prompt": "what?", "responses": ["it is", "天气很好"]},
    {"prompt": [{"role": "user", "content": "x"}], "responses": []},
    {"prompt": "last", "responses": ["a", "b", "c"]},
]


def test_score_reads_and_writes_jsonl(folder: Path, tmp_path: Path) -> None:
    source, sink = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in RECORDS) + "\n\n", encoding="utf-8")
    result = CliRunner().invoke(main, ["score", str(source), "-m", str(folder), "-o", str(sink), "--quiet"])
    assert result.exit_code == 0, result.output
    written = [json.loads(line) for line in sink.read_text(encoding="utf-8").splitlines()]
    assert [{k: v for k, v in w.items() if k not in ("scores", "scored_by")} for w in written] == RECORDS
    assert {w["scored_by"]["scheme"] for w in written} == {"fp32"}
    rm = lightrm.load(folder)
    np.testing.assert_allclose(written[0]["scores"], rm.score("what?", ["it is", "天气很好"]), atol=1e-5)
    assert [len(w["scores"]) for w in written] == [2, 0, 3]
    assert not list(tmp_path.glob("*.unfinished"))


def test_bad_lines_are_numbered_and_the_rest_is_scored(folder: Path) -> None:
    lines = [
        "not json",
        '{"responses": ["a"]}',
        '{"prompt": "x", "responses": "a"}',
        '{"prompt": "x"}',
        '{"prompt": null, "responses": ["a"]}',
        '{"prompt": "x", "responses": ["\\ud800"]}',
        "[1]",
        json.dumps(RECORDS[0]),
    ]
    result = CliRunner().invoke(main, ["score", "-", "-m", str(folder), "--quiet"], input="\n".join(lines))
    assert result.exit_code == 1
    for number in range(1, 8):
        assert f"line {number}: " in result.stderr
    assert "7 of 8 lines were not scored" in result.stderr
    assert [json.loads(line)["id"] for line in result.stdout.splitlines()] == [7]


def test_bytes_that_are_no_text(folder: Path) -> None:
    stream = b'{"prompt": "\xff", "responses": ["a"]}\n' + json.dumps(RECORDS[0]).encode()
    result = CliRunner().invoke(main, ["score", "-", "-m", str(folder), "--quiet"], input=stream)
    assert "line 1: prompt holds a lone surrogate" in result.stderr
    assert len(result.stdout.splitlines()) == 1


def test_other_fields_come_back_whatever_they_hold(folder: Path) -> None:
    stream = b'{"prompt": "x", "responses": ["a"], "note": "\xff", "other": "\\ud800"}\n'
    result = CliRunner().invoke(main, ["score", "-", "-m", str(folder), "--quiet"], input=stream)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["note"] == "\udcff"


def test_cut_answers_are_counted_or_refused(folder: Path) -> None:
    lines = json.dumps({"prompt": "x", "responses": ["it is sunny. " * 200, "b"]}) + "\n" + json.dumps(RECORDS[0])
    result = CliRunner().invoke(main, ["score", "-", "-m", str(folder), "--quiet"], input=lines)
    assert result.exit_code == 0
    assert "1 answers were longer than 256 tokens" in result.stderr
    result = CliRunner().invoke(main, ["score", "-", "-m", str(folder), "--quiet", "--strict"], input=lines)
    assert result.exit_code == 1
    assert "line 1: the text has" in result.stderr
    assert len(result.stdout.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["gone.jsonl"], ["-", "-o", "gone/out.jsonl"], ["-", "--scheme", "w9"]])
def test_wrong_arguments_are_one_sentence(arguments: list[str], folder: Path) -> None:
    result = CliRunner().invoke(main, ["score", *arguments, "-m", str(folder)], input="")
    assert result.exit_code in (1, 2)
    assert "Error: " in result.stderr
    assert "Traceback" not in result.output


def test_a_failing_run_leaves_no_finished_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightrm.scorer.RewardModel.run", interrupted)
    source, sink = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(RECORDS[0]))
    result = CliRunner().invoke(main, ["score", str(source), "-m", str(folder), "-o", str(sink), "--quiet"])
    assert result.exit_code != 0
    assert "stopped; the same command goes on from" in result.stderr
    assert not sink.exists()


def test_errors_are_one_sentence(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["score", "-", "-m", str(tmp_path)])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ConfigError: ")
    assert "Traceback" not in result.output


def test_inspect_reads_no_weights(folder: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(folder)])
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    for part in ("ziya", "llama 2x32", "value_head.weight (1, 32)", "template ziya", "SentencePieceVocabulary", "w8a8"):
        assert part in text
    result = CliRunner().invoke(main, ["inspect", "demo"])
    assert "LlamaRewardModel" not in result.output
    assert "ziya" in result.output


def test_as_a_real_process(folder: Path) -> None:
    """A pipe in, a pipe out, a progress bar in tokens/s on standard error."""
    program = "from lightrm.cli import main; main()"
    command = [sys.executable, "-c", program, "score", "-", "-m", str(folder)]
    result = subprocess.run(command, input=json.dumps(RECORDS[0]), capture_output=True, text=True, check=True)
    assert len(json.loads(result.stdout)["scores"]) == 2
    assert "tokens/s" in result.stderr
    listing = subprocess.run([sys.executable, "-c", program, "--help"], capture_output=True, text=True, check=True)
    assert {"score", "demo", "inspect"} <= set(listing.stdout.split())
