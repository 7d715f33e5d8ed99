"""The README quotes its result files, and every benchmark's matching check holds before its figures are believed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import (
    bundled_model,
    exact,
    fidelity,
    fp8,
    gptq_files,
    linear,
    loading,
    mixed,
    schemes,
    scoring,
    sharing,
    streaming,
)
from benchmarks.bundled_model import CARD, REFERENCE_CARD
from benchmarks.record import RESULTS, ROOT, read_result, with_table

TABLES = {
    "bundled_model": bundled_model.table,
    "exact": exact.table,
    "fidelity": fidelity.table,
    "fp8": fp8.sentence,
    "gptq_files": gptq_files.sentence,
    "linear_cpu": linear.table,
    "loading": loading.table,
    "mixed": mixed.table,
    "schemes": schemes.table,
    "scoring_cpu": scoring.table,
    "sharing_amx": sharing.sentence,
    "sharing_cpu": sharing.table,
    "streaming": streaming.table,
}


@pytest.mark.parametrize("name", TABLES)
def test_readme_quotes_the_result_file(name: str) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_table(text, name, TABLES[name](read_result(name))) == text


@pytest.mark.parametrize(("name", "card"), [("bundled_model", CARD), ("reference_model", REFERENCE_CARD)])
def test_a_model_card_quotes_its_own(name: str, card: Path) -> None:
    text = card.read_text(encoding="utf-8")
    assert with_table(text, name, bundled_model.table(read_result(name))) == text


def test_no_table_without_a_result() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- generated: (\w+) -->", text)) == set(TABLES)


def test_results_say_where_they_come_from() -> None:
    for path in RESULTS.glob("*.json"):
        result = read_result(path.stem)
        assert {"commit", "date", "versions", "machine"} <= result.keys(), path.name


def test_peers_compute_the_same_model() -> None:
    """In the committed comparison, unquantized peers agree with float32: all really scored the same weights."""
    rows = read_result("scoring_cpu")["workloads"]["real mix"]
    assert rows["lightrm fp32"]["error"] == 0
    assert rows["transformers fp32"]["error"] < 1e-3
    assert rows["transformers bf16"]["error"] < 0.03
    assert all(row["error"] is None or row["error"] < 0.3 for row in rows.values())
