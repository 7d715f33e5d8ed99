"""What a job writes holds every field of its source, or says what it cannot hold before the first row is scored."""

from __future__ import annotations

import csv
import gzip
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lightrm
from lightrm.engine.engine import Engine
from lightrm.jobs import job
from lightrm.jobs.identity import identity
from tests.test_scoring import write_model

LATE = [
    {"prompt": "x", "responses": ["a"], "id": 1, "tags": []},
    {"prompt": "y", "responses": ["b", "c"], "id": 2.5, "note": "späť", "tags": ["t"], "meta": {"a": 1}},
    {"prompt": "z", "responses": [], "meta": {"b": [True, None]}, "big": 2**63},
]


@pytest.fixture(scope="module")
def rm(tmp_path_factory: pytest.TempPathFactory):
    """Scores that cost nothing: this is about what is written beside them."""
    rm = lightrm.load(write_model(tmp_path_factory.mktemp("model")))
    by = identity(rm, "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "all_scores", lambda self, ids, *_: np.asarray([len(one) / 8 for one in ids], np.float32))
        patch.setattr(job, "identity", lambda rm, model: by)
        patch.setattr("os.fsync", lambda file: None)
        yield rm


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def scored(rm, source: Path, target: Path, told: list[str] | None = None) -> Path:
    job.score_file(rm, "tiny", source, target, (told if told is not None else []).append)
    return target


def refused(rm, source: Path, target: Path, says: str) -> None:
    def run(self, *_: object) -> None:
        raise AssertionError("said before the first record is scored")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "all_scores", run)
        with pytest.raises(lightrm.InputError, match=says):
            scored(rm, source, target)
    assert not list(target.parent.glob("out*"))


def test_fields_that_come_late_stay(rm, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", LATE)
    rows = pq.read_table(scored(rm, source, tmp_path / "out.parquet")).to_pylist()
    assert [row["id"] for row in rows] == [1, 2.5, None]
    assert [row["note"] for row in rows] == [None, "späť", None]
    assert rows[1]["meta"] == {"a": 1, "b": None}
    assert rows[2]["meta"] == {"a": None, "b": [True, None]}
    assert (rows[1]["tags"], rows[2]["big"]) == (["t"], 2**63)
    with scored(rm, source, tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        cells = list(csv.DictReader(file))
    assert [row["note"] for row in cells] == ["", "späť", ""]
    assert json.loads(cells[2]["meta"]) == LATE[2]["meta"]
    assert [json.loads(row["scores"]) for row in cells] == [row["scores"] for row in rows]
    kept = [json.loads(line) for line in scored(rm, source, tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k not in ("scores", "scored_by")} for row in kept] == LATE


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(st.sampled_from("de"), JSON, max_size=2), min_size=1, max_size=4))
def test_parquet_holds_all_or_says_so(rm, tmp_path_factory: pytest.TempPathFactory, extra: list[dict]) -> None:
    folder = tmp_path_factory.mktemp("one")
    records = [{"prompt": "x", "responses": ["a"], **more} for more in extra]
    source = write(folder / "in.jsonl", records)
    try:
        target = scored(rm, source, folder / "out.parquet")
    except lightrm.InputError as error:
        assert "no common columns" in str(error) or "holds text" in str(error)  # noqa: PT017
        assert not list(folder.glob("out*"))
        return
    found = pq.read_table(target).to_pylist()
    assert [bare({k: v for k, v in row.items() if k in "de"}) for row in found] == [bare(more) for more in extra]


def bare(value: Any) -> Any:
    """Without what is None: a table has all of its columns in each row. Whole numbers may have become floats."""
    if isinstance(value, dict):
        return {name: found for name, inner in value.items() if (found := bare(inner)) not in (None, {})}
    if isinstance(value, list):
        return [bare(inner) for inner in value]
    return value


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ([{"id": 1}, {"id": "one"}], '"id": a number in line 1, text in line 2'),
        ([{"id": 1}, {"id": [1]}], '"id": a number in line 1, a list in line 2'),
        ([{"id": [1, "a"]}], r'"id\[\]": a number in line 1, text in line 1'),
        ([{"id": {"a": 1}}, {"id": {"a": True}}], r'"id\.a": a number in line 1, true or false in line 2'),
        ([{"id": {}}], '"id": an object without fields, in line 1'),
        ([{"id": 2**64}], '"id": a number of more than 64 bits'),
        ([{"id": 2**60}, {"id": 0.5}], "whole numbers that no float holds"),
    ],
)
def test_what_parquet_cannot_hold_is_named(rm, tmp_path: Path, extra: list[dict], says: str) -> None:
    records = [{"prompt": "x", "responses": ["a"], **more} for more in extra]
    source = write(
        tmp_path / "in.jsonl", [*records, {"prompt": 5, "responses": "a record that is not scored", "id": []}]
    )
    refused(rm, source, tmp_path / "out.parquet", f"no common columns .*{says}.*: write .jsonl")


def test_what_a_table_of_texts_cannot_hold_is_named(rm, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": "x", "responses": ["a"], "note": ["\ud800"]}])
    for name in ("out.parquet", "out.csv"):
        refused(rm, source, tmp_path / name, r'not the bytes of "note\[\]" in line 1: write .jsonl')
    columns = {"prompt": ["x"], "responses": [["a"]], "image": [b"\x89PNG"], "at": [datetime(2026, 1, 2)]}
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    for name in ("out.jsonl", "out.csv.gz"):
        refused(rm, tmp_path / "in.parquet", tmp_path / name, r'not "image" \(binary\): write .parquet')
    target = scored(rm, tmp_path / "in.parquet", tmp_path / "out.parquet")
    assert pq.read_table(target).to_pylist()[0]["image"] == b"\x89PNG"


@pytest.mark.parametrize("name", ["out", "out.txt", "out.json", "out.jsonl.zst", "out.parquet.gz", ".jsonl"])
def test_an_ending_that_is_not_known(rm, tmp_path: Path, name: str) -> None:
    source = write(tmp_path / "in.jsonl", LATE)
    refused(rm, source, tmp_path / name, r"an output ends in .jsonl, .jsonl.gz, .csv, .csv.gz or .parquet")


def test_gzip_is_gzip(rm, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", LATE)
    plain, zipped = scored(rm, source, tmp_path / "out.jsonl"), scored(rm, source, tmp_path / "out.jsonl.gz")
    assert gzip.decompress(zipped.read_bytes()) == plain.read_bytes()
    assert zipped.read_bytes() == scored(rm, source, tmp_path / "again.jsonl.gz").read_bytes()
    table = scored(rm, zipped, tmp_path / "out.csv.gz")
    assert gzip.decompress(table.read_bytes()).startswith(b"prompt,responses,")


def test_fields_of_the_added_names_are_set_aside(rm, tmp_path: Path) -> None:
    """Labels stay, under a name that is said at the start; so do another model's scores."""
    records = [{"prompt": "x", "responses": ["a", "b"], "scores": [2, 1]}]
    source = write(tmp_path / "in.jsonl", records)
    for ending in (".jsonl", ".parquet", ".csv"):
        told: list[str] = []
        once = scored(rm, source, tmp_path / f"once{ending}", told)
        assert told == ['the source has a field "scores" of its own: it is written as "source_scores"']
        twice = scored(rm, once, tmp_path / f"twice{ending}.jsonl", told)
        (row,) = map(json.loads, twice.read_text().splitlines())
        assert row["source_scores"] == ("[2, 1]" if ending == ".csv" else [2, 1])
        assert row["scores"] == row["source_source_scores"]
        assert [name for name in row if "scored_by" in name] == ["source_scored_by", "scored_by"]


def test_every_kind_of_file_gives_the_same(rm, tmp_path: Path) -> None:
    """JSONL, an array, CSV, TSV and Parquet of the same records, to each kind of output and back."""
    turns = [{"role": "user", "content": 'what? [1], \n"so"'}]
    records = [{"prompt": turns, "responses": ["a", "b,c"], "n": str(k)} for k in range(260)]
    sources = [write(tmp_path / "in.jsonl", records), tmp_path / "in.json", tmp_path / "in.parquet"]
    sources[1].write_text(json.dumps(records, indent=1))
    pq.write_table(pa.Table.from_pylist(records), sources[2], row_group_size=100)
    for ending, delimiter in ((".csv", ","), (".tsv", "\t"), (".txt", ",")):
        sources.append(tmp_path / f"in{ending}")
        with sources[-1].open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(records[0]), delimiter=delimiter)
            table.writeheader()
            table.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in r.items()} for r in records)
    expected = None
    for k, source in enumerate(sources):
        for ending in (".csv", ".parquet")[k % 2 :]:
            target = scored(rm, source, tmp_path / f"{source.suffix[1:]}-out{ending}")
            again = scored(rm, target, tmp_path / f"{target.name}.again.jsonl")
            rows = [json.loads(line) for line in again.read_text(encoding="utf-8").splitlines()]
            found = [(row["prompt"], row["responses"], row["n"], row["scores"]) for row in rows]
            expected = expected or found
            assert found == expected, (source.name, ending)
    assert [row[2] for row in expected] == [str(k) for k in range(260)]


def test_files_that_are_refused_or_partly_read(rm, tmp_path: Path) -> None:
    def rows(name: str, content: bytes) -> list[str]:
        path, told = tmp_path / name, []
        path.write_bytes(content)
        (tmp_path / "out.jsonl").unlink(missing_ok=True)
        scored(rm, path, tmp_path / "out.jsonl", told)
        return told

    for name, content, says in (
        ("a.jsonl", "\ufeffprompt".encode("utf-16"), "text in UTF-16"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd...", "ends within a frame of zstd"),
        ("a.jsonl.xz", b"\xfd7zXZ\0...", "compressed by xz"),
        ("a.csv", b"prompt,response,prompt\n1,2,3\n", "names 'prompt' twice"),
        ("a.json", b'[{"prompt": "x", "response": "y"}, {"prom', "item 2 is no JSON"),
        ("a.parquet", b"PAR1 and no more", "cut short or damaged"),
    ):
        with pytest.raises(lightrm.InputError, match=says):
            rows(name, content)
    assert rows("b.csv", b"prompt,response\nx,y\nx,y,z\n\xff,y\n") == [
        "b.csv, row 2: 3 cells under a header of 2",
        "b.csv, row 3: prompt holds a lone surrogate '\\udcff' at character 0: it is not valid text; decode the source "
        "with errors='replace' or repair it",
    ]
    assert rows("b.json", b' [{"prompt": "x", "response": "y"}, 7, {"prompt": "x", "response": "y"}]') == [
        "b.json, item 2: expected an object, found int 7"
    ]
    twice = pa.table([pa.array(["x"]), pa.array(["x"])], names=["prompt", "prompt"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(lightrm.InputError, match="two columns of one name"):
        scored(rm, tmp_path / "twice.parquet", tmp_path / "out.parquet")
    exact = {"prompt": ["x"], "response": ["y"], "at": pa.array([1], pa.timestamp("ns"))}
    pq.write_table(pa.table(exact), tmp_path / "exact.parquet")
    target = scored(rm, tmp_path / "exact.parquet", tmp_path / "exact.jsonl")
    assert json.loads(target.read_text())["at"] == "1970-01-01 00:00:00.000000001"
