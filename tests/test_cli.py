"""The command line, through click's own runner and once as a real process."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

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

    monkeypatch.setattr("lightrm.engine.engine.Engine.all_scores", interrupted)
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


def score(folder: Path, *arguments: str, **options: object) -> Result:
    return CliRunner().invoke(main, ["score", *arguments, "-m", str(folder), "--quiet"], **options)  # type: ignore


def test_score_reads_what_evaluate_reads(folder: Path, tmp_path: Path) -> None:
    rm = lightrm.load(folder)
    turns = [{"role": "user", "content": "what?"}]
    records = [
        {"prompt": "what?", "chosen": "it is", "rejected": "no"},
        {"prompt": "what?", "response": "it is"},
        {"messages": [*turns, {"role": "assistant", "content": "it is"}]},
        {"context": turns, "response1": "it is", "response2": "no", "overall_preference": 1},
        {"prompt": "\n\nHuman: what?\n\nAssistant:", "responses": ["it is"], "format": "hh"},
    ]
    result = score(folder, "-", input="\n".join(map(json.dumps, records)))
    assert result.exit_code == 0, result.stderr
    found = [json.loads(line)["scores"] for line in result.stdout.splitlines()]
    expected = rm.score("what?", ["it is", "no"]).tolist()
    for scores in found:
        np.testing.assert_allclose(scores, expected[: len(scores)], atol=1e-5)
    assert [len(scores) for scores in found] == [2, 1, 1, 2, 1]
    table = tmp_path / "in.csv"
    table.write_text("prompt,chosen,rejected\nwhat?,it is,no\n")
    for result in (score(folder, str(table)), score(folder, "-", input=table.read_text())):
        assert result.exit_code == 0, result.stderr
        np.testing.assert_allclose(json.loads(result.stdout)["scores"], expected, atol=1e-5)


def test_what_the_system_refuses_is_one_sentence(folder: Path, tmp_path: Path, monkeypatch) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(RECORDS[0]))
    target = tmp_path / "out.jsonl"
    for code in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO):

        def refuse(file: object, code: int = code) -> None:
            raise OSError(code, os.strerror(code), str(target))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", refuse)
            result = score(folder, str(source), "-o", str(target))
        assert result.exit_code == 1
        assert result.stderr.splitlines()[-1] == f"Error: {os.strerror(code)}: {target}"
    assert not target.exists()
    assert score(folder, str(source), "-o", str(target)).exit_code == 0, "and the same command goes on"
    folder_as_output = score(folder, str(source), "-o", str(tmp_path))
    assert folder_as_output.exit_code == 2
    assert "is a directory" in folder_as_output.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_full_disk_and_a_reader_that_has_seen_enough(folder: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(RECORDS[0]))
    unread, closed = os.pipe()
    os.close(unread)
    for output, says in ((os.open("/dev/full", os.O_WRONLY), "Error: No space left on device\n"), (closed, "")):
        monkeypatch.setattr(sys, "stdout", os.fdopen(output, "w"))
        with pytest.raises(SystemExit) as ended:
            main(["score", str(source), "-m", str(folder), "--quiet"])
        assert ended.value.code == 1
        assert capfd.readouterr().err == says
        monkeypatch.undo()


def test_a_bar_with_a_total(folder: Path, tmp_path: Path) -> None:
    """Of a file; its name is no markup, nor is the model's."""
    place = shutil.copytree(folder, tmp_path / "[red]")
    source = place / "in [bold].jsonl"
    source.write_text((json.dumps(RECORDS[0]) + "\n") * 40)
    arguments = ["score", str(source), "-m", str(place)]
    for more in ([], ["-o", str(tmp_path / "out.jsonl")]):
        result = CliRunner().invoke(main, [*arguments, *more])
        assert result.exit_code == 0, result.stderr
        assert "40 of 40 records" in result.stderr
        assert "100%" in result.stderr
    written = (tmp_path / "out.jsonl").read_text().splitlines()
    assert json.loads(written[0])["scored_by"]["model"] == str(place)
    assert "[red]" in CliRunner().invoke(main, ["score", str(source), "-m", str(place / "gone")]).stderr


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
