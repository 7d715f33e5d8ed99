"""lightrm rank and explain, for texts and for files; and what the shell completes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner, Result

import lightrm
from lightrm.cli import main
from tests.test_scoring import write_model

ANSWERS = ["it is", "天气很好", "a b c"]
RECORDS = [
    {"prompt": "what?", "responses": ANSWERS},
    {"prompt": "what?"},
    {"prompt": [{"role": "user", "content": "x"}], "chosen": "a", "rejected": "b"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS), encoding="utf-8")
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_texts_are_ranked(folder: Path) -> None:
    result = run("rank", folder, "what?", *ANSWERS, "--quiet")
    assert result.exit_code == 0, result.output
    places = [result.stdout.index(r.response) for r in lightrm.load(folder).rank("what?", ANSWERS)]
    assert places == sorted(places)
    assert sum(answer in run("rank", folder, "what?", *ANSWERS, "--top-k", 1).stdout for answer in ANSWERS) == 1


def test_a_file_is_ranked_and_no_output_replaced(folder: Path, data: Path, tmp_path: Path) -> None:
    target = tmp_path / "ranked.jsonl"
    result = run("rank", folder, "--data", data, "--top-k", 2, "-o", target)
    assert result.exit_code == 1
    assert "line 2: " in result.stderr
    assert "1 records were left out" in result.stderr
    first, second = rows(target)
    expected = lightrm.load(folder).rank("what?", ANSWERS, top_k=2)
    assert (first["record"], first["prompt"], second["record"]) == (1, "what?", 3)
    assert [(r["index"], r["response"]) for r in first["ranking"]] == [(r.index, r.response) for r in expected]
    np.testing.assert_allclose([r["score"] for r in first["ranking"]], [r.score for r in expected], atol=1e-5)
    assert second["prompt"] == RECORDS[2]["prompt"]
    before = target.read_bytes()
    assert "exists already" in run("rank", folder, "--data", data, "-o", target).output
    assert target.read_bytes() == before


def test_explanations_as_text_and_as_rows(folder: Path, data: Path, tmp_path: Path) -> None:
    rm = lightrm.load(folder)
    expected = rm.explain("what?", "it is")
    result = run("explain", folder, "what?", "it is")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(expected).strip()
    target = tmp_path / "rows.jsonl"
    assert run("explain", folder, "--data", data, "-o", target).exit_code == 1, "one record has no answers"
    found = rows(target)
    assert [(row["record"], row["index"], row["response"]) for row in found] == [
        (1, 0, "it is"), (1, 1, "天气很好"), (1, 2, "a b c"), (3, 0, "a"), (3, 1, "b"),
    ]  # fmt: skip
    assert found[0]["token_ids"] == expected.token_ids
    assert found[0]["text"] == expected.text
    assert found[0]["score"] == pytest.approx(expected.score, abs=1e-5)
    assert json.loads(run("explain", folder, "what?", "it is", "-o", "-").stdout) == found[0]


@pytest.mark.parametrize("verb", ["rank", "explain"])
def test_what_is_missing_is_one_sentence(verb: str, folder: Path, data: Path) -> None:
    for arguments in ((folder,), (folder, "what?"), (folder, "what?", "it is", "--data", data)):
        result = run(verb, *arguments)
        assert result.exit_code == 2, result.output
        assert "PROMPT" in result.stderr
        assert "Traceback" not in result.output
    result = run(verb, folder, "what?", "it is", "--weights", "good")
    assert "expected NAME=NUMBER,NAME=NUMBER, found 'good'" in result.stderr
    result = run(verb, folder, "what?", "it is", "--weights", "good=1,bad=-0.5")
    assert "InputError: label and weights are for models with several attributes" in result.output


def test_a_failing_run_leaves_no_file(folder: Path, data: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("lightrm.scorer.RewardModel.rank", lambda *_, **__: 1 / 0)
    assert run("rank", folder, "--data", data, "-o", tmp_path / "out.jsonl").exit_code == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl"]


def test_the_shell_completes() -> None:
    """As click's script for bash asks for it; the script is what the documents tell a person to run."""
    program = [sys.executable, "-c", "from lightrm.cli import main; main(prog_name='lightrm')"]
    words = {"COMP_WORDS": "lightrm rank --top", "COMP_CWORD": "2", "_LIGHTRM_COMPLETE": "bash_complete"}
    found = subprocess.run(program, env=os.environ | words, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == ["plain,--top-k"]
    shell = BashComplete(main, {}, "lightrm", "_LIGHTRM_COMPLETE")
    assert {item.value for item in shell.get_completions([], "")} == set(main.commands)
    assert [item.value for item in shell.get_completions(["explain"], "--wei")] == ["--weights"]


def test_columns_and_a_number_of_records(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("q,one,other\nwhat?,it is,a b c\nx,a,b\n", encoding="utf-8")
    chosen = ("--prompt-column", "q", "--response-column", "other", "--response-column", "one")
    result = run("rank", folder, "--data", path, *chosen, "--limit", 1, "-o", "-")
    assert result.exit_code == 0, result.output
    (row,) = map(json.loads, result.stdout.splitlines())
    expected = lightrm.load(folder).rank("what?", ["a b c", "it is"])
    assert (row["record"], row["prompt"]) == (1, "what?")
    assert [(r["index"], r["response"]) for r in row["ranking"]] == [(r.index, r.response) for r in expected]
    result = run("explain", folder, "--limit", 1)
    assert result.exit_code == 2
    assert "found neither" in result.stderr


def test_answers_that_end_conversations_of_their_own(folder: Path, tmp_path: Path) -> None:
    """They cannot be ranked against each other; each is explained behind its own conversation."""
    asked, more = {"role": "user", "content": "what?"}, {"role": "user", "content": "x"}
    talks = [[asked, {"role": "assistant", "content": said}, more] for said in ("it is", "a b c")]
    sides = [[*turns, {"role": "assistant", "content": said}] for turns, said in zip(talks, "ab", strict=True)]
    path = tmp_path / "arena.jsonl"
    path.write_text(
        json.dumps({"conversation_a": sides[0], "conversation_b": sides[1], "winner": "model_a"}), encoding="utf-8"
    )
    result = run("rank", folder, "--data", path)
    assert result.exit_code == 1
    assert "line 1: each answer of this record follows a conversation of its own" in result.stderr
    result = run("explain", folder, "--data", path, "-o", "-")
    assert result.exit_code == 0, result.output
    rm = lightrm.load(folder)
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["index"] for row in found] == [0, 1]
    assert [row["text"] for row in found] == [
        rm.explain(turns, said).text for turns, said in zip(talks, "ab", strict=True)
    ]


def test_the_title_is_the_text_of_a_prompt_in_parts(folder: Path, tmp_path: Path) -> None:
    turn = {"role": "user", "content": [{"type": "text", "text": "what "}, {"type": "text", "text": "[/b]?"}]}
    path = tmp_path / "parts.jsonl"
    path.write_text(json.dumps({"prompt": [turn], "responses": ["it is"]}), encoding="utf-8")
    result = run("rank", folder, "--data", path)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0].strip() == "what [/b]?"


def test_an_output_that_exists_is_said_before_a_model_is_loaded(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("lightrm.opening.open_model", lambda *_, **__: 1 / 0)
    (tmp_path / "out.jsonl").write_text("kept", encoding="utf-8")
    for verb in ("rank", "explain"):
        result = run(verb, "demo", "what?", "it is", "-o", tmp_path / "out.jsonl")
        assert "exists already" in result.output
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8") == "kept"
