"""Small inputs after public reports, with the values that transformers, peft or bitsandbytes give."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import lightrm

NAMES = (
    # What a checkpoint is, and where it is read.
    "two-labels", "math-prm", "pad-is-eot", "lora-pissa", "autoround-gptqmodel", "awq-gemm", "lora-bias-all",
    "token-classification", "nf4-storage-bf16", "value-head-prefix",
    # How a text becomes ids.
    "generation-tag", "think-split", "openrlhf-eos", "legacy-false", "added-tokens-rstrip", "bos-null",
    "template-pad-token", "template-bos-undefined", "added-tokens-in-config", "date-in-template", "trl-eos",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_public_report(name: str, shared: Path) -> None:
    folder = shared / "cases"
    if not (folder / "cases.jsonl").is_file():
        pytest.skip(f"no cases at {folder}")
    lines = (folder / "cases.jsonl").read_text(encoding="utf-8").splitlines()
    case = next(case for case in map(json.loads, lines) if case["name"] == name)
    options = {"scheme": "fp32", "device": "cpu"} | case["load"]
    if case["base"]:
        options["base"] = folder / case["base"]
    if case["refused"]:
        with pytest.raises(lightrm.LightRMError, match=r"config\.json|reduce=|label="):
            lightrm.load(folder / name, **options).score(case["prompt"], case["responses"])
        return
    try:
        found = lightrm.load(folder / name, **options).score(case["prompt"], case["responses"])
    except lightrm.CheckpointError:
        if case["refused"] is False:
            raise
        return
    assert np.isfinite(found).all()
    if case["scores"] is not None:
        np.testing.assert_allclose(found, case["scores"], atol=2e-3)
