"""Files that transformers saved after torchao quantized them (tests/data), and damaged copies of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lightrm
from lightrm import errors
from lightrm.checkpoints.detect import open_checkpoint
from lightrm.checkpoints.quantized import said_to_hold
from lightrm.schemes.int8 import Rowwise
from tests.conftest import DATA

UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(("name", "holds"), [("torchao-int8-dynamic", "w8a8"), ("torchao-int8-weight-only", None)])
def test_files_of_torchao(name: str, holds: str | None) -> None:
    cases = [json.loads(line) for line in (DATA / name / "cases.jsonl").read_text().splitlines()]
    ids, scores = [c["input_ids"] for c in cases], np.array([c["score"] for c in cases])
    np.testing.assert_allclose(lightrm.load(DATA / name, scheme="fp32").score_ids(ids), scores, rtol=1e-4, atol=1e-5)
    checkpoint, rm = open_checkpoint(DATA / name), lightrm.load(DATA / name)
    assert checkpoint.holds == said_to_hold(checkpoint.config, DATA / name) == holds
    assert rm.report.scheme.name == (holds or "fp32")
    assert np.abs(rm.score_ids(ids) - scores).max() < 0.1 * scores.std()
    if holds is not None:
        weight = rm.engine.decoder.layers[0].gate_up.weight
        assert isinstance(weight, Rowwise)
        stored = load_file(DATA / name / "model.safetensors")[f"{UP}._weight_qdata"]
        assert torch.equal(weight.values_OI[len(weight.values_OI) // 2 :], stored), "not rounded again"


def changed(folder: Path, tensors: dict[str, Any], note: dict[str, Any] | None = None) -> Path:
    """Write a copy of a file with other tensors or another note of one layer."""
    source = DATA / "torchao-int8-dynamic"
    with safe_open(source / "model.safetensors", "pt") as file:
        notes = file.metadata()
    if note is not None:
        told = json.loads(notes[f"{UP}.weight"])
        notes[f"{UP}.weight"] = json.dumps(told | {"_data": told["_data"] | note} if "_type" not in note else note)
    held = load_file(source / "model.safetensors") | {f"{UP}.{name}": value for name, value in tensors.items()}
    save_file({k: v for k, v in held.items() if v is not None}, folder / "model.safetensors", notes)
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder


@pytest.mark.parametrize(
    ("tensors", "note", "error", "says"),
    [
        ({"_weight_scale": None}, None, errors.TensorMismatchError, "up_proj.weight' lacks scale"),
        ({"_weight_scale": torch.ones(3, 1)}, None, errors.TensorMismatchError, "do not fit int8 in blocks of"),
        ({"_weight_qdata": torch.ones(48, 32)}, None, errors.TensorMismatchError, "float32 .*do not fit int8"),
        ({}, {"_type": "Int4Tensor"}, errors.UnsupportedModelError, "up_proj.weight' says 'Int4Tensor'"),
        ({}, {"_type": "Tensor"}, errors.TensorMismatchError, "up_proj._weight_.*belongs to no weight"),
        ({}, {"block_size": 3}, errors.CorruptFileError, "up_proj.weight' names the block 3"),
        ({}, {"dtype": {"_data": "int4"}}, errors.CorruptFileError, "the dtype .*int4"),
        ({"_weight_scale": torch.full((48, 1), torch.inf)}, None, lightrm.NumericsError, "up_proj"),
    ],
)
def test_damaged_files_are_named(
    tensors: dict, note: dict | None, error: type[Exception], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        lightrm.load(changed(tmp_path, tensors, note))


def test_zero_points_are_subtracted(tmp_path: Path) -> None:
    """Asymmetric weights are widened, and w8a8 rounds them again."""
    zero = torch.full((48, 1), 3, dtype=torch.int8)
    source = open_checkpoint(changed(tmp_path, {"_weight_zero_point": zero})).sources[0]
    stored = load_file(tmp_path / "model.safetensors")
    exact = (stored[f"{UP}._weight_qdata"].float() - 3) * stored[f"{UP}._weight_scale"]
    assert torch.equal(source.read(f"{UP}.weight"), exact.bfloat16())
    assert source.holds is None
