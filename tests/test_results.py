"""README and docs/ quote result files, and each benchmark's matching check holds before its figures are believed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import (
    attention,
    bundled_model,
    calibration,
    exact,
    fidelity,
    first_score,
    fp8,
    gemma,
    gguf_files,
    gptq_files,
    gptqmodel_files,
    linear,
    loading,
    mixed,
    releases,
    schemes,
    scoring,
    sharing,
    streaming,
    text_differential,
    text_speed,
)
from benchmarks.bundled_model import CARD, REFERENCE_CARD
from benchmarks.clients import browser, load, polars_columns, ray_data, sentence_transformers, trainers, trainers_http
from benchmarks.record import RESULTS, documents, quote, quoting, read_result, with_table

TABLES = {
    "browser": browser.sentence,
    "attention": attention.table,
    "bundled_model": bundled_model.table,
    "calibration": calibration.table,
    "exact": exact.table,
    "fidelity": fidelity.table,
    "fidelity_short": fidelity.short_table,
    "first_score": first_score.table,
    "fp8": fp8.sentence,
    "gguf_files": gguf_files.sentence,
    "gemma_fidelity": gemma.fidelity_table,
    "gemma_rotations": gemma.rotations_table,
    "gptq_files": gptq_files.sentence,
    "gptqmodel_files": gptqmodel_files.sentence,
    "linear_cpu": linear.table,
    "load": load.table,
    "loading": loading.table,
    "mixed": mixed.table,
    "ray_data": ray_data.sentence,
    "polars_columns": polars_columns.sentence,
    "releases": releases.sentence,
    "schemes": schemes.table,
    "scoring_cpu": scoring.table,
    "scoring_short": scoring.short_table,
    "scoring_without_vnni": scoring.table,
    "scoring_zen5": scoring.table,
    "sentence_transformers": sentence_transformers.sentence,
    "sharing_cpu": sharing.table,
    "streaming": streaming.table,
    "text_differential": text_differential.sentence,
    "text_speed": text_speed.line,
    "trainers": trainers.sentence,
    "trainers_http": trainers_http.sentence,
}
RESULT_OF = {
    "fidelity_short": "fidelity",
    "gemma_fidelity": "gemma",
    "gemma_rotations": "gemma",
    "scoring_short": "scoring_cpu",
}  # where block and result have different names
BLOCK = re.compile(r"<!-- generated: (\w+) -->\n(.*?)<!-- end: (\w+) -->", re.DOTALL)


@pytest.mark.parametrize("name", TABLES)
def test_documents_quote_the_result_file(name: str) -> None:
    """Each table stands in one document at least, and is the result file's in all of them."""
    for path in quoting(name, documents()):
        text = path.read_text(encoding="utf-8")
        assert with_table(text, name, TABLES[name](read_result(RESULT_OF.get(name, name)))) == text, path


@pytest.mark.parametrize(("name", "card"), [("bundled_model", CARD), ("reference_model", REFERENCE_CARD)])
def test_a_model_card_quotes_its_own(name: str, card: Path) -> None:
    text = card.read_text(encoding="utf-8")
    assert with_table(text, name, bundled_model.table(read_result(name))) == text


def test_no_table_without_a_result() -> None:
    """Every block is closed, and empty where no result was measured yet."""
    for path in documents():
        text = path.read_text(encoding="utf-8")
        blocks = BLOCK.findall(text)
        assert len(blocks) == text.count("<!-- generated: ") == text.count("<!-- end: "), path
        for name, table, end in blocks:
            assert name == end, path
            assert name in TABLES or not table, f"{path}: {name} has figures that no test compares"


def test_a_table_is_written_into_every_document_that_has_its_block(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.md", "b.md", "c.md")]
    for path in paths:
        path.write_text("before\n<!-- generated: short -->\nold\n<!-- end: short -->\nafter\n", encoding="utf-8")
    paths[2].write_text("nothing", encoding="utf-8")
    quote("fidelity", lambda result: f"{result['date']}\n", block="short", paths=paths)
    date = read_result("fidelity")["date"]
    written = f"before\n<!-- generated: short -->\n{date}\n<!-- end: short -->\nafter\n"
    assert [path.read_text(encoding="utf-8") for path in paths] == [written, written, "nothing"]
    with pytest.raises(ValueError, match=r"no document has a block 'fidelity', of a\.md, b\.md, c\.md"):
        quote("fidelity", lambda _: "", paths=paths)


def test_results_say_where_they_come_from() -> None:
    for path in RESULTS.glob("*.json"):
        result = read_result(path.stem)
        assert {"commit", "date", "versions", "machine"} <= result.keys(), path.name


@pytest.mark.parametrize("name", ["scoring_cpu", "scoring_without_vnni", "scoring_zen5"])
def test_peers_compute_the_same_model(name: str) -> None:
    """In the committed comparisons, unquantized peers agree with float32: all really scored the same weights."""
    rows = {peer: row for peer, row in read_result(name)["workloads"]["4 x 256"].items() if row["error"] is not None}
    assert rows["lightrm fp32"]["error"] == 0
    assert rows["transformers bf16"]["error"] < 0.03
    assert all(rows[peer]["error"] < 1e-3 for peer in rows if peer == "transformers fp32")
    eight = [peer for peer in rows if any(mark in peer for mark in ("w8a8", "int8", "Q8_0", "quantize_dynamic"))]
    assert max(rows[peer]["error"] for peer in eight) < 0.1
    assert max(row["error"] for row in rows.values()) < 1, "4 bits, of four random scores"


def test_trainers_and_ray_gave_the_same_scores() -> None:
    assert all(row["equal"] for row in read_result("trainers")["rows"])
    result = read_result("ray_data")
    assert all(job["equal"] and job["columns kept"] and job["actors"] == 2 for job in result["jobs"])
    assert result["continued"]["failed"]
    assert result["continued"]["each once"]
    assert result["continued"]["equal"]


def test_columns_of_polars_gave_what_lists_give() -> None:
    held = read_result("polars_columns")["held"]
    assert all(held.values())
    assert len(held) == 13
