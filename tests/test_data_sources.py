"""What the commands read, and which part of it: kinds of files, columns by name, limits, options of a resumed job."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from click.testing import CliRunner, Result

import lightrm
from lightrm.cli import main
from lightrm.data import zstd_files
from lightrm.data.data_source import DataSource, source_of
from lightrm.data.preferences import question_of, questions_of
from lightrm.data.record_columns import Columns
from lightrm.errors import InputError
from lightrm.jobs import job
from lightrm.jobs.job_outputs import Output
from tests.test_scoring import write_model

RECORDS = [
    {"prompt": "what?", "chosen": "it is", "rejected": "no"}, {"prompt": "x", "chosen": "天气很好", "rejected": "b"},
    {"prompt": "last", "chosen": "a", "rejected": "c"},
]  # fmt: skip
JSONL = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()
CSV = pd.DataFrame(RECORDS).to_csv(index=False).encode()
TSV = pd.DataFrame(RECORDS).to_csv(index=False, sep="\t").encode()


def frames(content: bytes) -> bytes:
    """As pzstd writes: several frames."""
    pack = zstandard.ZstdCompressor(write_content_size=False).compress
    return pack(content[:50]) + pack(content[50:51]) + pack(content[51:])


def table(records: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(records), sink)
    return sink.getvalue().to_pybytes()


FILES: dict[str, bytes] = {
    "a.jsonl": JSONL, "a.json": json.dumps(RECORDS).encode(), "a.csv": CSV, "a.tsv": TSV, "no_ending": TSV,
    "a.jsonl.gz": gzip.compress(JSONL), "a.tsv.gz": gzip.compress(TSV),
    "a.jsonl.zst": zstandard.ZstdCompressor().compress(JSONL), "b.jsonl.zst": frames(JSONL),
    "a.csv.zst": frames(CSV), "a.json.zst": frames(json.dumps(RECORDS).encode()), "a.parquet": table(RECORDS),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rm(folder: Path) -> lightrm.RewardModel:
    return lightrm.load(folder, scheme="fp32")


def written(path: Path, content: bytes = JSONL) -> Path:
    path.write_bytes(content)
    return path


def run(*arguments: str, stream: bytes | None = None) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments), "--quiet"], input=stream)


def rows(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file(name: str, tmp_path: Path) -> None:
    path = written(tmp_path / name, FILES[name])
    assert [row.record for row in source_of(path).rows()] == RECORDS
    assert [row.record for row in source_of(path, limit=2).rows()] == RECORDS[:2]
    assert [row.name for row in source_of(path).rows()][2].startswith(f"{name}, ")
    assert lightrm.read_questions(path) == [question_of(record) for record in RECORDS]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a.jsonl.gz", "b.jsonl.zst"])
def test_a_stream(name: str, folder: Path, rm: lightrm.RewardModel) -> None:
    """What is compressed is seen in a pipe, too."""
    found = rows(run("score", "-", "-m", folder, "--limit", "2", stream=FILES[name]))
    assert [{field: row[field] for field in RECORDS[0]} for row in found] == RECORDS[:2]
    assert found[0]["scores"] == pytest.approx(rm.score("what?", ["it is", "no"]).tolist(), abs=1e-5)


def test_a_table_with_an_end_cannot_be_piped(folder: Path, tmp_path: Path) -> None:
    refused = run("score", "-", "-m", folder, stream=FILES["a.parquet"])
    assert refused.exit_code == 1
    assert (
        "standard input is Parquet, which is read from its end: pass the file itself, or write with -o"
        in refused.stderr
    )
    done = run("score", "-", "-m", folder, "-o", tmp_path / "out.jsonl", stream=FILES["a.parquet"])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("end", [3, 9, 40, -1])
def test_zstd_that_is_cut_short(end: int, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl.zst", frames(JSONL)[:end])
    with pytest.raises(InputError, match=r"a\.jsonl\.zst is cut short or damaged|not JSON"):
        lightrm.read_questions(path)
    whole = bytearray(frames(JSONL))
    whole[len(whole) // 2] ^= 0x55
    with pytest.raises(InputError, match="is cut short or damaged"):
        [*source_of(written(path, bytes(whole) + b"no frame")).rows()]


def test_zstd_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.jsonl.zst", FILES["a.jsonl.zst"])
    for name in ("zstandard", "compression.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"a\.jsonl\.zst is compressed by zstd: pip install 'lightrm\[zstd\]'"):
        [*source_of(path).rows()]


def test_zstd_by_pythons_own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its decompressor has the same shape: decompress, eof, unused_data."""

    class Own:
        __name__ = "compression.zstd"
        ZstdError = zstandard.ZstdError

        @staticmethod
        def ZstdDecompressor() -> Any:
            return zstandard.ZstdDecompressor().decompressobj()

    monkeypatch.setattr(zstd_files, "import_module", lambda name: Own())
    path = written(tmp_path / "a.jsonl.zst", FILES["b.jsonl.zst"])
    assert [row.record for row in source_of(path).rows()] == RECORDS


@pytest.mark.skipif(sys.version_info < (3, 14), reason="Python 3.14 has a module for zstd")
def test_zstd_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    path = written(tmp_path / "a.jsonl.zst", FILES["b.jsonl.zst"])
    assert [row.record for row in source_of(path).rows()] == RECORDS


ASKED = [
    {"id": k, "question": f"q{k}", "prompt": "other", "a": f"it is {k}", "b": "no", "winner": "b"} for k in range(4)
]


def asked(*responses: str, prompt: str | None = "question") -> Columns:
    return Columns(prompt, responses)


def test_columns() -> None:
    record = ASKED[1] | {"messages": [{"role": "user", "content": "m"}], "many": ["x", "y"], "scores": [0, 1]}
    assert asked("a").answers(record).responses == ("it is 1",)
    assert asked("a").answers(record).prompt == "q1"
    assert asked("many").answers(record).responses == ("x", "y")
    assert asked("many").answers(record).worth == (0.0, 1.0)
    two = {name: value for name, value in record.items() if name != "scores"}
    assert (asked("a", "b").answers(two).responses, asked("a", "b").answers(two).worth) == (
        ("it is 1", "no"),
        (0.0, 1.0),
    )
    assert asked("b", "a", prompt=None).answers(two).prompt == "other"
    turn = {"role": "assistant", "content": "t"}
    for value in (turn, [turn]):
        assert asked("t").answers({"question": "q", "t": value}).responses == ("t",)
    assert Columns("messages").answers({"messages": record["messages"], "response": "y"}).prompt == record["messages"]
    pair = {"prompt": "p", "question": "q", "chosen": "c", "rejected": "r"}
    assert Columns("question").answers(pair).prompt == "q"
    for columns, says in (
        (asked("gone"), "there is no column 'gone', found 'id', 'question', 'prompt', 'a', 'b', 'winner'$"),
        (asked("a", prompt="ask"), "there is no column 'ask'"),
        (asked("id"), '"responses" must be a list|responses must be a list of strings, found int 1'),
    ):
        with pytest.raises(InputError, match=says):
            columns.answers(ASKED[1])
    with pytest.raises(InputError, match="column 'b' holds None here"):
        asked("a", "b").answers(ASKED[1] | {"b": None})
    with pytest.raises(InputError, match=r"and 5 more$"):
        asked("gone").answers({str(k): k for k in range(25)})


def test_columns_of_commands(folder: Path, rm: lightrm.RewardModel, tmp_path: Path) -> None:
    """Chosen by option, in every kind of file and in a pipe; all fields are kept."""
    frame = pd.DataFrame(ASKED)
    kinds: dict[str, Callable[[Path], None]] = {
        "in.jsonl": lambda path: frame.to_json(path, orient="records", lines=True), "in.parquet": frame.to_parquet,
        "in.csv": lambda path: frame.to_csv(path, index=False),
    }  # fmt: skip
    chosen = ("--prompt-column", "question", "--response-column", "a", "--response-column", "b")
    wanted = [rm.score(one["question"], [one["a"], one["b"]]).tolist() for one in ASKED]
    for name, write in kinds.items():
        write(tmp_path / name)
        found = rows(run("score", tmp_path / name, "-m", folder, *chosen))
        assert [row["scores"] for row in found] == [pytest.approx(one, abs=1e-5) for one in wanted]
        assert [(str(row["id"]), row["prompt"]) for row in found] == [(str(k), "other") for k in range(4)]
        judged = run("evaluate", folder, "--data", tmp_path / name, *chosen, "--json")
        assert json.loads(judged.stdout)["eval_accuracy"] == sum(a < b for a, b in wanted) / 4
    content = (tmp_path / "in.csv").read_bytes().replace(b"prompt", b"other")
    piped = rows(run("score", "-", "-m", folder, *chosen[:4], stream=content))
    assert [row["scores"] for row in piped] == [pytest.approx(one[:1], abs=1e-5) for one in wanted]
    for name in ("in.csv", "in.parquet"):
        told = run("score", tmp_path / name, "-m", folder, "--prompt-column", "ask")
        assert told.exit_code == 1
        assert f"{name}: there is no column 'ask', found 'id', 'question'" in told.stderr, "once, not for each row"
    told = run("score", "-", "-m", folder, "--prompt-column", "ask", stream=(tmp_path / "in.csv").read_bytes())
    assert "Error: InputError: standard input: there is no column 'ask', found 'id', 'question'" in told.stderr
    told = run("score", tmp_path / "in.jsonl", "-m", folder, "--prompt-column", "ask")
    assert told.stderr.count("there is no column 'ask'") == 4, "each line of JSON may have other fields"
    assert "in.jsonl, line 4: there is no column 'ask', found 'id', 'question', 'prompt'" in told.stderr


OTHERS = {
    "prompt column 'None', now 'note'": ["--prompt-column", "note"],
    "response columns 'None', now 'rejected'": ["--response-column", "rejected"],
    "limit 'None', now '2'": ["--limit", "2"],
    "parse_specials 'False', now 'True'": ["--parse-specials"],
    "at most 90 tokens": ["--max-length", "90"],
    "strict 'False', now 'True'": ["--strict"],
}


def test_a_job_goes_on_with_the_same_options_only(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = written(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    arguments = ("score", source, "-m", folder, "-o", target)
    with monkeypatch.context() as patch:
        patch.setattr(Output, "write", lambda *_: 1 / 0)
        assert run(*arguments).exit_code == 1
    begun = (tmp_path / "out.jsonl.unfinished").read_bytes()
    for says, more in OTHERS.items():
        told = run(*arguments, *more)
        assert told.exit_code == 1
        assert "was begun with" in told.stderr
        assert says in told.stderr
        assert (tmp_path / "out.jsonl.unfinished").read_bytes() == begun
    assert "3 records were scored by an earlier run" in run(*arguments, "--token-budget", "99").stderr, "moves no score"
    told = run(*arguments, "--limit", "2")
    assert "exists already" in told.stderr, "a whole output is not another job's"


def test_limits_of_files_in_several_parts(rm: lightrm.RewardModel, tmp_path: Path) -> None:
    """A batch of Parquet is cut where the limit is; parts must have the same columns."""
    more = [record | {"n": k} for k, record in enumerate(RECORDS)]
    paths = tuple(written(tmp_path / f"{k}.parquet", table(more)) for k in range(2))
    for limit in (None, 1, 3, 4, 9):
        source, target = DataSource(paths, "two", limit=limit), tmp_path / f"out{limit}.parquet"
        counts = job.score_file(rm, "m", source, target, print)
        found = pq.read_table(target).to_pylist()
        assert [row["n"] for row in found] == [0, 1, 2, 0, 1, 2][:limit]
        assert counts.good == len(found)
        lines = tmp_path / f"out{limit}.jsonl"
        job.score_file(rm, "m", source, lines, print)
        assert [json.loads(line)["scores"] for line in lines.read_text().splitlines()] == [
            pytest.approx(row["scores"]) for row in found
        ]
    other = written(tmp_path / "other.parquet", table(RECORDS))
    with pytest.raises(InputError, match=r"other.parquet has other columns than 0.parquet: \['chosen', 'prompt', 'rej"):
        job.score_file(rm, "m", DataSource((paths[0], other), "two"), tmp_path / "x.parquet", print)
    lines = written(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="two holds Parquet and other files"):
        job.score_file(rm, "m", DataSource((paths[0], lines), "two"), tmp_path / "x.parquet", print)
    bad = written(tmp_path / "b.jsonl", JSONL + b"{\n")
    told: list[str] = []
    job.score_file(rm, "m", DataSource((lines, bad), "two"), tmp_path / "x.jsonl", told.append)
    assert [line[:17] for line in told] == ["b.jsonl, line 4: "]


def test_score_needs_a_model(tmp_path: Path) -> None:
    told = run("score", written(tmp_path / "in.jsonl"))
    assert told.exit_code == 2
    assert "pass -m MODEL, a folder or a hub id of a reward model; `lightrm demo` shows" in told.stderr
    assert run("score", tmp_path / "in.jsonl", "-m", "demo", "--limit", "1").exit_code == 0, "by name it may be used"


def test_options_of_loading_reach_the_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lightrm.opening

    seen = []

    def opened(model: str, options: Any, **_: Any) -> Any:
        seen.append(options)
        raise lightrm.InputError("seen")

    monkeypatch.setattr(lightrm.opening, "open_model", opened)
    source = written(tmp_path / "in.jsonl")
    more = [
        "--max-length",
        "77",
        "--revision",
        "r",
        "--token-budget",
        "99",
        "--parse-specials",
        "--base",
        "b",
        "--strict",
    ]
    for command in (["score", source, "-m", folder], ["evaluate", folder, "--data", source]):
        assert "InputError: seen" in run(*command, *more).stderr
        o = seen.pop()
        assert (o.max_length, o.revision, o.token_budget, o.parse_specials, o.base, o.strict) == (
            77, "r", 99, True, "b", True,
        )  # fmt: skip


def test_special_tokens_act_when_told(folder: Path, tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", json.dumps({"prompt": "x", "response": "a</s>b"}).encode())
    for more, options in (((), {}), (("--parse-specials",), {"parse_specials": True})):
        (found,) = rows(run("score", source, "-m", folder, *more))
        expected = lightrm.load(folder, **options).score("x", ["a</s>b"]).tolist()
        assert found["scores"] == pytest.approx(expected, abs=1e-5)


def test_evaluate_writes_its_rows(folder: Path, rm: lightrm.RewardModel, tmp_path: Path) -> None:
    """Those that were judged, as `score` writes them; a limit spreads, a bad row is told."""
    content = JSONL + b'{"prompt": 3}\n' + JSONL
    source = written(tmp_path / "in.jsonl", content)
    for ending in (".jsonl", ".parquet", ".csv.gz"):
        target = tmp_path / f"out{ending}"
        done = run("evaluate", folder, "--data", source, "-o", target)
        assert done.exit_code == 0, done.output
        assert "in.jsonl, line 4: " in done.stderr
        found = [row.record for row in source_of(target).rows()]
        assert [row["prompt"] for row in found] == [one["prompt"] for one in RECORDS * 2]
        scores = found[0]["scores"] if isinstance(found[0]["scores"], list) else json.loads(found[0]["scores"])
        assert scores == pytest.approx(rm.score("what?", ["it is", "no"]).tolist(), abs=1e-5)
        assert "exists already" in run("evaluate", folder, "--data", source, "-o", target).stderr
    run("evaluate", folder, "--data", source, "-o", tmp_path / "some.jsonl", "--limit", "2")
    some = [row.record["prompt"] for row in source_of(tmp_path / "some.jsonl").rows()]
    assert some == ["what?", "what?"], "the first of each half"
    for target, code in ((tmp_path / "gone" / "out.jsonl", 2), (tmp_path / "out.txt", 1)):
        assert run("evaluate", folder, "--data", source, "-o", target).exit_code == code


def test_ties_are_left_out_and_said(folder: Path, tmp_path: Path) -> None:
    pair = {"prompt": "x", "response_a": "it is", "response_b": "no"}
    verdicts = ("model_a", "model_b", "tie", "tie (bothbad)", "both_bad", "Both bad")
    records = [
        *(pair | {"winner": winner} for winner in verdicts),
        {"prompt": "x", "response": "alone"}, {"prompt": "x", "responses": ["a", "b"], "scores": [1, 1]},
    ]  # fmt: skip
    source = written(tmp_path / "in.jsonl", "\n".join(map(json.dumps, records)).encode())
    shown = " ".join(run("evaluate", folder, "--data", source).stdout.split())
    assert "on 2 pairs of 2 prompts" in shown
    assert "ties in the labels 5 records, left out" in shown
    assert "without a preference 1 records, left out" in shown
    found = json.loads(run("evaluate", folder, "--data", source, "--json").stdout)
    assert (found["ties"], found["unlabelled"], found["eval_accuracy"]) == (5, 1, 0.5)
    whole = run("evaluate", folder, "--data", written(tmp_path / "a.jsonl"))
    assert "left out" not in whole.stdout
    ties = written(tmp_path / "ties.jsonl", json.dumps(pair | {"winner": "tie"}).encode())
    assert "ties.jsonl prefers no answer to another in 1 records" in run("evaluate", folder, "--data", ties).stderr


def test_tables_are_questions() -> None:
    """pandas, pyarrow and datasets hand over the records that their rows are; a missing cell is no field."""
    expected = [question_of(record) for record in RECORDS]
    frame = pd.DataFrame([record | {"note": None} for record in RECORDS])
    for given in (frame, pa.Table.from_pandas(frame), datasets.Dataset.from_pandas(frame)):
        assert questions_of(given) == expected
    ragged = pd.DataFrame([*RECORDS, {"prompt": "y", "response": "z"}])
    assert questions_of(ragged)[3] == question_of({"prompt": "y", "response": "z"})


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def test_conversations_that_went_two_ways(folder: Path, rm: lightrm.RewardModel, tmp_path: Path) -> None:
    """Arena: one user, two models, each with its own earlier answers; each last answer is scored after its own."""
    a, b = (
        [
            turn("user", "one", num_tokens=1), turn("assistant", f"first of {name}", num_tokens=3),
            turn("user", "two", num_tokens=1), turn("assistant", f"last of {name}", num_tokens=3),
        ]
        for name in "ab"
    )  # fmt: skip
    record = {"conversation_a": a, "conversation_b": b, "winner": "model_b", "turn": 2}
    found = question_of(record)
    assert (found.responses, found.worth) == (("last of a", "last of b"), (0.0, 1.0))
    assert [[one["content"] for one in prompt] for prompt in found.each_prompt] == [
        ["one", "first of a", "two"], ["one", "first of b", "two"],
    ]  # fmt: skip
    wanted = [float(rm.score(side[:-1], [side[-1]])[0]) for side in (a, b)]
    source = written(tmp_path / "in.jsonl", json.dumps(record).encode())
    (scored,) = rows(run("score", source, "-m", folder))
    assert scored["scores"] == pytest.approx(wanted, abs=1e-5)
    told = json.loads(run("evaluate", folder, "--data", source, "--json").stdout)
    assert told["eval_accuracy"] == float(wanted[1] > wanted[0])
    lists = {
        "prompt": ["one", "two"],
        "response_a": ["first of a", "last of a"],
        "response_b": ["first of b", "last of b"],
    }
    packed = {name: json.dumps(value) for name, value in lists.items()}
    for form in (lists, packed):  # as Arena's 55k comparisons have them, in a list or in a text
        again = question_of(form | {"winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0})
        assert (again.responses, again.worth) == (found.responses, found.worth)
        assert [[one["content"] for one in prompt] for prompt in again.prompts] == [
            [one["content"] for one in prompt] for prompt in found.prompts
        ]
    parts = [
        turn("user", [{"type": "text", "text": "one", "image": None}]),
        turn("assistant", [{"type": "text", "text": "x"}]),
    ]
    assert question_of({"conversation_a": parts, "conversation_b": parts, "winner": "both_bad"}).worth == (0.0, 0.0)
    with pytest.raises(InputError, match="differ before their last turn"):
        question_of({"conversation_a": a, "conversation_b": [turn("user", "other"), *b[1:]], "winner": "tie"})
    plain = {"prompt": '["x"]', "response_a": "y", "response_b": '["z"]', "winner": "tie"}
    assert question_of(plain).responses == ("y", '["z"]'), "half of a form is none"
