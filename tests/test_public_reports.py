"""Small checkpoints made after public reports of wrong scores, with the values of their own libraries."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest

import lightrm

FOLDER = Path(os.environ.get("LIGHTRM_SHARED", Path(__file__).parents[2] / "shared")) / "cases"
LIST = FOLDER / "cases.jsonl"
CASES = [json.loads(line) for line in LIST.read_text(encoding="utf-8").splitlines()] if LIST.is_file() else []


@pytest.mark.skipif(not CASES, reason=f"the cases are not at {FOLDER} (set LIGHTRM_SHARED)")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_a_reported_case_is_right_or_refused(case: dict) -> None:
    options = {"scheme": "fp32", "device": "cpu"} | case["load"]
    if case["base"]:
        options["base"] = str(FOLDER / case["base"])

    def score() -> np.ndarray:
        return lightrm.load(FOLDER / case["name"], **options).score(case["prompt"], case["responses"])

    if case["refused"]:
        with pytest.raises(lightrm.LightRMError):
            score()
        return
    with nullcontext() if case["refused"] is False else suppress(lightrm.LightRMError):  # None: either is right
        found = score()
        if case["scores"] is not None:
            assert np.abs(found - case["scores"]).max() < 2e-3
