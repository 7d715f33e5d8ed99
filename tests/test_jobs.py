"""Long jobs: killed at any byte, a job goes on; nothing lost, nothing twice, in order, and never with another model."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import lightrm
from lightrm.cli import main
from lightrm.engine.engine import Engine
from lightrm.jobs import job
from lightrm.jobs.identity import identity
from lightrm.jobs.job_outputs import Output
from lightrm.jobs.journal import Journal, journal_of
from lightrm.loading.text_side import TextSide
from tests.test_scoring import write_model

ROWS = [
    '{"id": 1, "prompt": "what?", "responses": ["it is", "天气很好"]}',
    "",
    "not json",
    '{"id": 2, "prompt": [{"role": "user", "content": "x"}], "responses": []}',
    '{"id": 3, "prompt": "what?", "responses": ["it is sunny"]}',
    '{"id": 4, "prompt": "last", "responses": ["a", "b", "c"]}',
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rm(folder: Path) -> lightrm.RewardModel:
    return lightrm.load(folder, scheme="w8a8")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(ROWS), encoding="utf-8")
    return path


class Killed(BaseException):
    """As a signal would end a run here, files as they are."""


def killed(*_: object) -> None:
    raise Killed


def score(rm: lightrm.RewardModel, source: Path, target: Path) -> job.Counts:
    return job.score_file(rm, "tiny", source, target, lambda _: None)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def whole_journal(rm: lightrm.RewardModel, source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The journal of a job that has scored all and written nothing yet."""
    with monkeypatch.context() as patch:
        patch.setattr(Output, "write", killed)
        with pytest.raises(Killed):
            score(rm, source, target)
    assert not target.exists()
    return (target.parent / f"{target.name}.unfinished").read_bytes()


@pytest.fixture
def quick(rm: lightrm.RewardModel, monkeypatch: pytest.MonkeyPatch) -> lightrm.RewardModel:
    """Scores that cost nothing, for what is about files alone."""

    def run(self: Engine, sequences: list[list[int]], advance: object = None, head: object = None) -> np.ndarray:
        return np.asarray([sum(ids) % 997 / 8 for ids in sequences], np.float32)

    monkeypatch.setattr(Engine, "all_scores", run)
    monkeypatch.setattr(os, "fsync", lambda file: None)
    by = identity(rm, "tiny")
    monkeypatch.setattr(job, "identity", lambda rm, model: by)
    return rm


def test_killed_at_any_byte(quick, source: Path, tmp_path: Path, monkeypatch) -> None:
    rm = quick
    score(rm, source, tmp_path / "whole.jsonl")
    expected = (tmp_path / "whole.jsonl").read_bytes()
    assert [row["id"] for row in read(tmp_path / "whole.jsonl")] == [1, 2, 3, 4]
    target = tmp_path / "out.jsonl"
    journal = whole_journal(rm, source, target, monkeypatch)
    tails = (b"", b"\0\0\0\n", b"[1, [0.5")
    for end in range(len(journal) + 1):
        torn = tails[end % len(tails)] if b"\n" in journal[:end] else b""
        (tmp_path / "out.jsonl.unfinished").write_bytes(journal[:end] + torn)
        counts = score(rm, source, target)
        assert target.read_bytes() == expected, (end, torn)
        assert (counts.good, counts.bad) == (4, 1)
        assert counts.resumed <= journal[:end].count(b"\n")
        target.unlink()
    assert not list(tmp_path.glob("out*"))


def test_rows_that_are_done_are_not_scored_again(rm, source: Path, tmp_path: Path, monkeypatch) -> None:
    target = tmp_path / "out.jsonl"
    journal = whole_journal(rm, source, target, monkeypatch)
    scored: list[int] = []
    run = Engine.all_scores
    monkeypatch.setattr(
        Engine, "all_scores", lambda self, ids, *rest: (scored.append(len(ids)), run(self, ids, *rest))[1]
    )
    (tmp_path / "out.jsonl.unfinished").write_bytes(b"".join(journal.splitlines(keepends=True)[:3]))
    counts = score(rm, source, target)
    assert (counts.resumed, sum(scored)) == (2, 4)


def test_a_journal_of_something_else_is_refused(folder: Path, rm, source: Path, tmp_path: Path, monkeypatch) -> None:
    target = tmp_path / "out.jsonl"
    journal = whole_journal(rm, source, target, monkeypatch)
    path = tmp_path / "out.jsonl.unfinished"
    others = {
        "scheme 'w8a8', now 'fp32'": lightrm.load(folder, scheme="fp32"),
        "at most 100 tokens": lightrm.load(folder, scheme="w8a8", max_length=100),
        "template 'ziya": lightrm.load(folder, scheme="w8a8", template="plain"),
        "weights '.*', now": lightrm.load(write_model(tmp_path / "other", vocabulary=401), scheme="w8a8"),
    }
    for says, other in others.items():
        with pytest.raises(lightrm.InputError, match=says):
            score(other, source, target)
        assert path.read_bytes() == journal, "nothing is lost"
    with pytest.raises(lightrm.InputError, match="model 'tiny', now 'huge'"):
        job.score_file(rm, "huge", source, target, lambda _: None)
    text = source.read_text(encoding="utf-8")
    source.write_text(text.replace("it is sunny", "it is rainy"), encoding="utf-8")
    with pytest.raises(lightrm.InputError, match=r"line 5 of .* is not what it was"):
        score(rm, source, target)
    source.write_text("\n".join(ROWS[:2]), encoding="utf-8")
    with pytest.raises(lightrm.InputError, match="is shorter than when"):
        score(rm, source, target)
    assert path.read_bytes() == journal
    source.write_text(text + "\n" + ROWS[0] + "\n", encoding="utf-8")  # rows that came after are scored
    assert score(rm, source, target).resumed == 5
    assert [row["id"] for row in read(target)] == [1, 2, 3, 4, 1]


def test_a_finished_output_is_not_replaced(rm: lightrm.RewardModel, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    target.write_text("precious")
    with pytest.raises(lightrm.InputError, match="exists already"):
        score(rm, source, target)
    assert target.read_text() == "precious"


def test_two_runs_at_once(rm: lightrm.RewardModel, source: Path, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    target = tmp_path / "out.jsonl"
    with (
        journal_of(target),
        pytest.raises(lightrm.InputError, match="is being written by another run"),
    ):
        score(rm, source, target)


def test_a_pipe_meets_the_lock_before_it_writes(folder: Path, rm, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    target, kept = tmp_path / "out.jsonl", tmp_path / "out.jsonl.input"
    kept.write_text("the first run's")
    with journal_of(target):
        result = run(folder, "-", "-o", str(target), input="the second run's")
    assert "is being written by another run" in result.stderr
    assert kept.read_text() == "the first run's"


def test_a_pipe_goes_on_with_the_same_text_only(quick, folder: Path, tmp_path: Path, monkeypatch) -> None:
    target, kept = tmp_path / "out.jsonl", tmp_path / "out.jsonl.input"
    with monkeypatch.context() as patch:
        patch.setattr(Output, "write", killed)
        with pytest.raises(Killed):
            run(folder, "-", "-o", str(target), input="\n".join(ROWS))
    begun = kept.read_bytes()
    result = run(folder, "-", "-o", str(target), input="\n".join(ROWS[1:]))
    assert "is not what" in result.stderr
    assert kept.read_bytes() == begun
    more = run(folder, "-", "-o", str(target), input="\n".join([*ROWS, ROWS[0]]))
    assert "5 records were scored by an earlier run" in more.stderr
    assert [row["id"] for row in read(target)] == [1, 2, 3, 4, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize("change", ["edited", "swapped", "longer", "shorter"])
def test_a_source_that_changes_while_it_is_scored(
    quick, source: Path, tmp_path: Path, monkeypatch, change: str
) -> None:
    """No row is written with another's scores, nothing is written at all, and nothing is lost."""
    target, text = tmp_path / "out.jsonl", source.read_text(encoding="utf-8")
    changed = {
        "edited": text.replace("it is sunny", "it is rainy"), "swapped": "\n".join(ROWS[::-1]),
        "longer": text + "\n" + ROWS[0], "shorter": "\n".join(ROWS[:-1]),
    }[change]  # fmt: skip
    real = Output.write

    def late(*given: object) -> None:
        source.write_text(changed, encoding="utf-8")
        real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(Output, "write", late)
    with pytest.raises(lightrm.InputError, match="was changed while it was scored"):
        score(quick, source, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl.unfinished"]
    monkeypatch.setattr(Output, "write", real)
    source.write_text(text, encoding="utf-8")
    assert score(quick, source, target).resumed == 5


def test_killed_after_the_output_was_named(quick, folder: Path, source: Path, tmp_path: Path, monkeypatch) -> None:
    """The next run cleans up and says what was done; it takes no other job for this one."""
    target, path = tmp_path / "out.jsonl", tmp_path / "out.jsonl.unfinished"

    def finished() -> bytes:
        with monkeypatch.context() as patch:
            patch.setattr(job, "to_disk", lambda path: killed() if target.exists() else None)
            with pytest.raises(Killed):
                score(quick, source, target)
        assert path.exists()
        return target.read_bytes()

    whole = finished()
    counts = score(quick, source, target)
    assert (counts.good, counts.bad, counts.resumed) == (4, 1, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    target.unlink()
    finished()
    other = tmp_path / "other.jsonl"
    other.write_text(ROWS[0])
    with pytest.raises(lightrm.InputError, match="exists already"):
        score(quick, other, target)
    assert not path.exists(), "it was done with"
    assert target.read_bytes() == whole
    target.unlink()
    finished()
    target.write_bytes(b"another program's")
    with pytest.raises(lightrm.InputError, match="exists already"):
        score(quick, source, target)
    assert path.exists(), "its rows are nowhere else"


def test_a_damaged_journal(quick, source: Path, tmp_path: Path, monkeypatch) -> None:
    """Whichever bit is flipped, whichever lines are lost, doubled or swapped: the output is the same, or nothing is."""
    score(quick, source, tmp_path / "whole.jsonl")
    expected = (tmp_path / "whole.jsonl").read_bytes()
    target, path = tmp_path / "out.jsonl", tmp_path / "out.jsonl.unfinished"
    journal = whole_journal(quick, source, target, monkeypatch)
    lines = journal.splitlines(keepends=True)
    cases = [journal[:k] + bytes([journal[k] ^ 1 << k % 8]) + journal[k + 1 :] for k in range(0, len(journal), 3)]
    cases += [b"".join(lines[:2] + lines[3:]), b"".join([*lines[:3], *lines[2:]])]
    cases += [b"".join([*lines[:2], lines[3], lines[2], *lines[4:]])]
    for case in cases:
        path.write_bytes(case)
        told: list[str] = []
        if not case.startswith(lines[0]):
            with pytest.raises(lightrm.InputError, match="is no journal that this version of lightrm can go on with"):
                score(quick, source, target)
            assert path.read_bytes() == case
            continue
        counts = job.score_file(quick, "tiny", source, target, told.append)
        assert target.read_bytes() == expected
        assert counts.resumed <= 4
        assert counts.resumed >= 3 or any("is damaged" in line for line in told), "not torn at its end, but damaged"
        target.unlink()


@pytest.mark.parametrize(
    "foreign", [b"[1]\n", b"{}\n[]\n", b"[" * 100_000, b"\xff\xfe\n", b"hello\n", b'{"model": "old"}\n[1, [0.5], ""]\n']
)
def test_a_foreign_journal_stays_as_it_is(quick, source: Path, tmp_path: Path, foreign: bytes) -> None:
    path = tmp_path / "out.jsonl.unfinished"
    path.write_bytes(foreign)
    with pytest.raises(lightrm.InputError, match="is no journal that this version of lightrm can go on with"):
        score(quick, source, tmp_path / "out.jsonl")
    assert path.read_bytes() == foreign


def test_one_bad_record_never_ends_a_job(rm, tmp_path: Path, monkeypatch) -> None:
    """Too large, not finite, nested, a template or a tokenizer that breaks: each is named, now and at every resume."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [json.dumps({"id": k, "prompt": f"what? {k}", "responses": ["it is", "no"]}) for k in range(40)]
    deep = '{"prompt": "x", "responses": ["a"], "note": ' + "[" * 100_000 + "]" * 100_000 + "}"
    source.write_text("\n".join([*lines, deep]))
    large, infinite, odd, broken = (rm.encode([f"what? {k}"], ["no"])[0] for k in (3, 17, 20, 31))
    run, encode = Engine.all_scores, TextSide.encode

    def failing(self, sequences, *rest):
        if large in sequences:
            raise lightrm.MemoryLimitError("no memory for a sequence")
        if infinite in sequences:
            raise lightrm.NumericsError("the score is nan")
        return run(self, sequences, *rest)

    def breaking(self, turns, responses):
        found = encode(self, turns, responses)
        ids = [encoded.token_ids for encoded in found]
        if odd in ids:
            raise TypeError("unsupported operand")
        if broken in ids:
            raise RecursionError("too deep")
        return found

    monkeypatch.setattr(Engine, "all_scores", failing)
    monkeypatch.setattr(TextSide, "encode", breaking)
    told: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(Output, "write", killed)
        with pytest.raises(Killed):
            job.score_file(rm, "tiny", source, target, told.append)
    expected = {
        "in.jsonl, line 4": "no memory", "in.jsonl, line 18": "score is nan",
        "in.jsonl, line 21": "TypeError: unsupported operand", "in.jsonl, line 32": "RecursionError",
        "in.jsonl, line 41": "nested more than 100 deep",
    }  # fmt: skip
    assert {line.split(":")[0] for line in told} == expected.keys()
    assert all(expected[line.split(":")[0]] in line for line in told)
    again: list[str] = []
    counts = job.score_file(rm, "tiny", source, target, again.append)
    assert again == [
        f"{line} (an earlier run)"
        for line in sorted(told, key=lambda line: int(line.split(":")[0][len("in.jsonl, line ") :]))
    ]
    assert (counts.good, counts.bad, counts.resumed) == (36, 5, 41)
    assert [row["id"] for row in read(target)] == [k for k in range(40) if k not in (3, 17, 20, 31)]


def test_what_is_of_no_record_ends_the_job(rm, source: Path, tmp_path: Path, monkeypatch) -> None:
    """A machine or a program that is broken must not mark every record as one that cannot be scored."""

    def broken(*_: object) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(Engine, "all_scores", broken)
    with pytest.raises(RuntimeError, match="device lost"):
        score(rm, source, tmp_path / "out.jsonl")


def test_output_says_what_made_it(rm: lightrm.RewardModel, source: Path, tmp_path: Path) -> None:
    score(rm, source, tmp_path / "out.jsonl")
    made = {json.dumps(row["scored_by"]) for row in read(tmp_path / "out.jsonl")}
    (by,) = map(json.loads, made)
    assert (by["model"], by["scheme"]) == ("tiny", "w8a8")
    assert by["template"].startswith("ziya, at most 256")
    assert len(by["fingerprint"]) == 16


def test_a_window_of_rows_is_in_memory_at_a_time(quick, tmp_path: Path, monkeypatch) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": "x", "responses": [str(k)]}) + "\n" for k in range(300)))
    ahead = 0
    real = Journal.rest

    def watched(self: Journal, *rest):
        nonlocal ahead
        for row in real(self, *rest):
            journal = tmp_path / "out.jsonl.unfinished"
            ahead = max(ahead, row.number - len(journal.read_bytes().splitlines()))
            yield row

    monkeypatch.setattr(Journal, "rest", watched)
    monkeypatch.setattr(job, "MOST_ROWS", 7)
    assert score(quick, source, target).good == 300
    assert ahead <= 7
    assert len(read(target)) == 300


def test_gzip(rm: lightrm.RewardModel, source: Path, tmp_path: Path) -> None:
    score(rm, source, tmp_path / "plain.jsonl")
    zipped = tmp_path / "in.jsonl.gz"
    zipped.write_bytes(gzip.compress(source.read_bytes()))
    score(rm, zipped, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "plain.jsonl").read_bytes()
    zipped.write_bytes(zipped.read_bytes()[:-20])
    with pytest.raises(lightrm.InputError, match="cut short or damaged"):
        score(rm, zipped, tmp_path / "other.jsonl")


def test_parquet(rm: lightrm.RewardModel, source: Path, tmp_path: Path) -> None:
    """In and out, columns with their types; JSONL to Parquet and back."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    when = [datetime(2026, 1, k + 1) for k in range(3)]
    columns = {
        "prompt": ["what?", None, "last"],
        "responses": pa.array([["it is", "天气很好"], ["a"], ["a", "b", "c"]], pa.list_(pa.string())),
        "when": pa.array(when, pa.timestamp("us")),
        "scores": ["old", "old", "old"],
    }
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    counts = score(rm, tmp_path / "in.parquet", tmp_path / "out.parquet")
    assert (counts.good, counts.bad) == (2, 1)
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.schema.field("when").type == pa.timestamp("us")
    assert found.schema.field("scores").type == pa.list_(pa.float32())
    rows = found.to_pylist()
    assert [row["when"] for row in rows] == [when[0], when[2]]
    assert rows[0]["scores"] == pytest.approx(rm.score("what?", ["it is", "天气很好"]).tolist())
    assert rows[0]["scored_by"]["scheme"] == "w8a8"
    score(rm, tmp_path / "in.parquet", tmp_path / "out.jsonl")
    assert [row["scores"] for row in read(tmp_path / "out.jsonl")] == [row["scores"] for row in rows]
    source.write_text("\n".join([ROWS[0], ROWS[2], ROWS[4], ROWS[5]]), encoding="utf-8")
    score(rm, source, tmp_path / "json.parquet")
    assert [len(row["scores"]) for row in pq.read_table(tmp_path / "json.parquet").to_pylist()] == [2, 1, 3]


def test_records_without_common_columns_stay_jsonl(rm: lightrm.RewardModel, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    source = tmp_path / "in.jsonl"
    lines = [{"prompt": "x", "responses": ["a"], "id": 1}, {"prompt": "x", "responses": ["a"], "id": "one"}]
    source.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(lightrm.InputError, match=r"no common columns .*: write \.jsonl"):
        score(rm, source, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_without_pyarrow(rm: lightrm.RewardModel, source: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(lightrm.InputError, match=r"pip install 'lightrm\[parquet\]'"):
        score(rm, source, tmp_path / "out.parquet")
    assert not list(tmp_path.glob("out*")), "said before the work, not after"


def run(folder: Path, *arguments: str, **options: object) -> Result:
    return CliRunner().invoke(main, ["score", *arguments, "-m", str(folder), "--quiet"], **options)  # type: ignore


def test_the_command_goes_on(folder: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out.jsonl"
    rm = lightrm.load(folder)
    with monkeypatch.context() as patch:
        patch.setattr(Output, "write", killed)
        with pytest.raises(Killed):
            run(folder, str(source), "-o", str(target))
    result = run(folder, str(source), "-o", str(target))
    assert "5 records were scored by an earlier run" in result.stderr
    assert "1 of 5 lines were not scored" in result.stderr
    assert result.exit_code == 1
    assert read(target)[0]["scores"] == pytest.approx(rm.score("what?", ["it is", "天气很好"]).tolist(), abs=1e-5)
    again = run(folder, str(source), "-o", str(target))
    assert again.exit_code == 1
    assert "exists already" in again.stderr


def test_a_pipe_into_a_file(folder: Path, tmp_path: Path) -> None:
    result = run(folder, "-", "-o", str(tmp_path / "out.jsonl"), input="\n".join(ROWS))
    assert "line 3: not JSON" in result.stderr
    assert [row["id"] for row in read(tmp_path / "out.jsonl")] == [1, 2, 3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl"]


@pytest.mark.skipif(os.name != "posix", reason="needs a signal that cannot be caught")
def test_a_real_process_is_killed(folder: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"id": k, "prompt": f"what? {k % 50}", "responses": ["it is " * (k % 30)]} for k in range(3000)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    program = "from lightrm.cli import main; main()"
    command = [sys.executable, "-c", program, "score", str(source), "-m", str(folder), "-o", str(target), "--quiet"]
    journal = tmp_path / "out.jsonl.unfinished"
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while process.poll() is None and not (journal.exists() and journal.stat().st_size > 5000):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not target.exists(), "killed on the way"
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "records were scored by an earlier run" in result.stderr
    assert [row["id"] for row in read(target)] == list(range(3000))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
