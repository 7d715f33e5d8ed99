"""AWQ files: one that AutoAWQ's own layers packed, and others by hand from the format's public description."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lightrm
from lightrm import errors
from tests.conftest import DATA
from tests.test_gptq import IDS, quantize
from tests.zoo import FFN, HEAD_WEIGHT, LLAMA_CONFIG, WIDTH, Specimen, Weights, llama_weights

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SETTINGS = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
HEAD = {"value_head.weight": HEAD_WEIGHT}
UP = "model.layers.0.mlp.up_proj"


def packed(values: torch.Tensor) -> torch.Tensor:
    """The slow, obvious packing: nibble k of a word holds output ORDER[k]. values (N, O) -> int32 (N, O / 8)."""
    words = []
    for row in values.tolist():
        for at in range(0, len(row), 8):
            word = sum(row[at + output] << (4 * k) for k, output in enumerate(ORDER))
            words.append(word - 2**32 if word >= 2**31 else word)
    return torch.tensor(words, dtype=torch.int32).view(len(values), -1)


def files(kept: tuple[str, ...] = ()) -> tuple[Weights, Weights]:
    """Return an AWQ checkpoint and the same as plain weights. kept: layers that are not packed."""
    made, plain = {}, {}
    for name, weight in llama_weights().items():
        if "proj" not in name or any(part in name for part in kept):
            made[name] = plain[name] = weight
            continue
        parts, plain[name] = quantize(weight, 4, 16, False, torch.arange(weight.shape[1]))
        stem = name.removesuffix(".weight")
        made |= {f"{stem}.qweight": packed(parts["q"]), f"{stem}.qzeros": packed(parts["zeros"])}
        made[f"{stem}.scales"] = parts["scales"]
    return made | HEAD, plain | HEAD


def write(folder: Path, tensors: Weights, **settings: Any) -> Path:
    config = {**LLAMA_CONFIG, "quantization_config": SETTINGS | settings}
    return Specimen({"model.safetensors": tensors}, config).write(folder)


def test_files_of_autoawq() -> None:
    lines = (DATA / "awq-4bit-g16" / "cases.jsonl").read_text().splitlines()
    cases = [json.loads(line) for line in lines]
    found = lightrm.load(DATA / "awq-4bit-g16", scheme="fp32").score_ids([case["input_ids"] for case in cases])
    np.testing.assert_allclose(found, [case["score"] for case in cases], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kept", [(), ("down_proj", "layers.1.self_attn.k_proj")])
def test_scores_are_those_of_the_widened_weights(kept: tuple[str, ...], tmp_path: Path) -> None:
    made, plain = files(kept)
    folder = write(tmp_path / "awq", made, modules_to_not_convert=list(kept))
    widened = Specimen({"model.safetensors": plain}, LLAMA_CONFIG).write(tmp_path / "plain")
    for scheme in ("fp32", "bf16", "w8a8", "w4a8"):
        found, expected = (lightrm.load(path, scheme=scheme).score_ids(IDS) for path in (folder, widened))
        np.testing.assert_array_equal(found, expected)
    rm = lightrm.load(folder)
    assert rm.report.scheme.name == "w4a16"
    np.testing.assert_array_equal(rm.score_ids(IDS), lightrm.load(widened, scheme="bf16").score_ids(IDS))


def test_settings_in_a_file_of_their_own(tmp_path: Path) -> None:
    extra = {"quant_config.json": {"zero_point": True, "q_group_size": 16, "w_bit": 4, "version": "GEMM"}}
    folder = Specimen({"model.safetensors": files()[0]}, LLAMA_CONFIG, extra=extra).write(tmp_path)
    assert lightrm.load(folder).report.scheme.name == "w4a16"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": "gemv"}, "AWQ with version 'gemv'; lightrm reads version gemm"),
        ({"version": None, "format": "llm-awq"}, "AWQ with version 'llm-awq'"),
        ({"bits": 8}, "AWQ with 8 bits"),
        ({"zero_point": False}, "AWQ with no zero points"),
    ],
)
def test_other_versions_are_refused_by_name(change: dict, says: str, tmp_path: Path) -> None:
    with pytest.raises(errors.UnsupportedModelError, match=says):
        lightrm.load(write(tmp_path, files()[0], **change))


@pytest.mark.parametrize(
    ("part", "value", "says"),
    [
        ("scales", None, "up_proj' lacks scales"),
        ("qzeros", torch.zeros(2, 5, dtype=torch.int32), "do not fit 4 bits of version gemm"),
        ("qweight", torch.zeros(WIDTH, FFN // 8), "is stored in torch.float32"),
        ("scales", torch.full((2, FFN), torch.nan).half(), "up_proj.*NaN or Inf"),
    ],
)
def test_damaged_layers_are_named(part: str, value: torch.Tensor | None, says: str, tmp_path: Path) -> None:
    made = files()[0] | {f"{UP}.{part}": value}
    for scheme in ("auto", "fp32"):
        with pytest.raises(lightrm.LightRMError, match=says):
            lightrm.load(write(tmp_path, {k: v for k, v in made.items() if v is not None}), scheme=scheme)


def test_config_and_tensors_of_two_models(tmp_path: Path) -> None:
    with pytest.raises(errors.TensorMismatchError, match=r"has groups of 16 inputs.* says 32: are they of one"):
        lightrm.load(write(tmp_path, files()[0], group_size=32))
    with pytest.raises(errors.TensorMismatchError, match="quantized by 'awq', but they are not packed"):
        lightrm.load(write(tmp_path, files()[1]))
    gptq = {"quant_method": "gptq", "version": None, "zero_point": None}
    with pytest.raises(errors.UnsupportedModelError, match="packed along its outputs, as AWQ packs"):
        lightrm.load(write(tmp_path, files()[0], **gptq))
