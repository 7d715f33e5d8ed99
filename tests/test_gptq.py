"""GPTQ files: those that auto-gptq packed, and every variant of the format written by hand from the same values."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import lightrm
from lightrm import errors
from lightrm.checkpoints.gptq_files import GptqSource, Terms, unpack, unpack_dense
from lightrm.checkpoints.source import TensorSource
from lightrm.cli import main
from tests.conftest import DATA
from tests.zoo import HEAD_WEIGHT, LLAMA_CONFIG, WIDTH, Specimen, llama_weights, normal, write_weights

IDS = [[5, 9, 33, 71, 2], [1, 2], list(range(3, 90))]
GENERATOR = torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", ["gptq-4bit-g32-asym", "gptq-4bit-g32-desc-act"])
def test_files_of_auto_gptq(name: str) -> None:
    cases = [json.loads(line) for line in (DATA / name / "cases.jsonl").read_text().splitlines()]
    rm = lightrm.load(DATA / name, scheme="fp32")
    np.testing.assert_allclose(rm.score_ids([c["input_ids"] for c in cases]), [c["score"] for c in cases], rtol=1e-4)


@pytest.mark.parametrize("name", ["gptq-4bit-g32-asym", "gptq-4bit-g32-desc-act"])
def test_the_files_own_values_stay_packed(name: str) -> None:
    """w4a16 holds them as they are and computes what bf16 computes from the widened weights, bit for bit."""
    ids = [json.loads(line)["input_ids"] for line in (DATA / name / "cases.jsonl").read_text().splitlines()]
    kept, widened = lightrm.load(DATA / name), lightrm.load(DATA / name, scheme="bf16")
    assert kept.report.scheme.name == "w4a16"
    assert "the file's own values" in repr(kept)
    assert kept.report.bytes < widened.report.bytes
    np.testing.assert_array_equal(kept.score_ids(ids), widened.score_ids(ids))
    exact = lightrm.load(DATA / name, scheme="fp32").score_ids(ids)
    eight = lightrm.load(DATA / name, scheme="w8a8").score_ids(ids)
    assert np.abs(eight - exact).max() < 0.3 * exact.std(), "and they can be requantized, rotated, to 8 bits"
    with pytest.raises(errors.SchemeError, match="quantized already: use that folder"):
        kept.save(Path("nowhere"))


def test_inspect_and_plan_say_what_a_folder_holds() -> None:
    folder = str(DATA / "gptq-4bit-g32-asym")
    told = " ".join(CliRunner().invoke(main, ["inspect", folder]).output.split())
    assert "its own values run under w4a16" in told
    planned = CliRunner().invoke(main, ["plan", folder, "--vram", "1GiB"]).output
    assert "auto takes w4a16: the file's own values" in planned


def packed(values: torch.Tensor, bits: int) -> torch.Tensor:
    """The slow, obvious packing: one Python integer a row. values (N, C) -> int32 (N, C * bits / 32)."""
    words = []
    for row in values.tolist():
        whole = sum(value << (bits * k) for k, value in enumerate(row))
        for at in range(0, len(row) * bits, 32):
            word = whole >> at & (2**32 - 1)
            words.append(word - 2**32 if word >= 2**31 else word)
    return torch.tensor(words, dtype=torch.int32).view(len(values), -1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_unpack_is_the_inverse_of_packing(bits: int) -> None:
    values = torch.randint(0, 2**bits, (5, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    words = packed(values, bits)
    assert torch.equal(unpack_dense(words, bits) if bits == 3 else unpack(words, bits), values)


def quantize(
    weight_OI: torch.Tensor, bits: int, group: int, sym: bool, order: torch.Tensor
) -> tuple[dict, torch.Tensor]:
    """Round a weight to a grid; returns (q, zero, scale by group, group of each input) and the weight on the grid."""
    outputs, inputs = weight_OI.shape
    g_idx = torch.empty(inputs, dtype=torch.int32)
    g_idx[order] = torch.arange(inputs, dtype=torch.int32) // group
    count = int(g_idx.max()) + 1
    scales, zeros = torch.empty(count, outputs), torch.empty(count, outputs, dtype=torch.int32)
    q = torch.empty(inputs, outputs, dtype=torch.int32)
    for g in range(count):
        part = weight_OI[:, g_idx == g]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if sym:
            scales[g] = torch.maximum(-low, high) / (2 ** (bits - 1) - 1)
            zeros[g] = 2 ** (bits - 1)
        else:
            scales[g] = (high - low) / (2**bits - 1)
            zeros[g] = (-low / scales[g]).round().int().clamp(1, 2**bits - 1)
        q[g_idx == g] = ((part / scales[g][:, None]).round() + zeros[g][:, None]).clamp(0, 2**bits - 1).int().T
    scales = scales.half()
    grid = (scales[g_idx.long()] * (q - zeros[g_idx.long()]).half()).T.float()
    return {"q": q, "zeros": zeros, "scales": scales, "g_idx": g_idx}, grid


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("style", ["act-order", "g_idx absent", "lying metadata", "one group"])
def test_every_variant_scores_like_its_widened_weights(
    bits: int, sym: bool, version: int, style: str, tmp_path: Path
) -> None:
    if style == "lying metadata" and not sym:
        pytest.skip("asymmetric zero points do not show their version: metadata is all there is")
    body = llama_weights()
    files, plain = {}, {}
    for name, weight in body.items():
        if "proj" not in name:
            files[name] = plain[name] = weight
            continue
        group = weight.shape[1] if style == "one group" else 8
        generator = torch.Generator().manual_seed(1)
        order = (
            torch.randperm(weight.shape[1], generator=generator)
            if style == "act-order"
            else torch.arange(weight.shape[1])
        )
        parts, plain[name] = quantize(weight, bits, group, sym, order)
        stem = name.removesuffix(".weight")
        files[f"{stem}.qweight"] = packed(parts["q"].T, bits).T
        files[f"{stem}.qzeros"] = packed(parts["zeros"] - (1 if version == 1 else 0), bits)
        files[f"{stem}.scales"] = parts["scales"]
        files[f"{stem}.bias"] = torch.zeros(weight.shape[0])  # auto-gptq writes them for every layer
        if style != "g_idx absent":
            files[f"{stem}.g_idx"] = parts["g_idx"]
    head = {"value_head.weight": HEAD_WEIGHT}
    says = {1: "gptq", 2: "gptq_v2"}[3 - version if style == "lying metadata" else version]
    settings = {"bits": bits, "group_size": -1 if style == "one group" else 8, "checkpoint_format": says}
    in_config = {**LLAMA_CONFIG, "quantization_config": {"quant_method": "gptq", **settings}}
    beside = Specimen({"model.safetensors": files | head}, LLAMA_CONFIG, extra={"quantize_config.json": settings})
    expected = lightrm.load(Specimen({"model.safetensors": plain | head}, LLAMA_CONFIG).write(tmp_path / "plain"))
    for specimen, folder in ((Specimen({"model.safetensors": files | head}, in_config), "a"), (beside, "b")):
        rm = lightrm.load(specimen.write(tmp_path / folder), scheme="fp32")
        np.testing.assert_allclose(rm.score_ids(IDS), expected.score_ids(IDS), rtol=1e-5, atol=1e-6)
    kept, half = lightrm.load(tmp_path / "a", scheme="w4a16"), lightrm.load(tmp_path / "plain", scheme="bf16")
    np.testing.assert_array_equal(kept.score_ids(IDS), half.score_ids(IDS))


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("version", [1, 2])
def test_three_bits_lie_across_words(sym: bool, version: int, tmp_path: Path) -> None:
    """Widened like the others, and kept in four bits."""
    parts, grid = quantize(normal(64, 96, seed=1), 3, 32, sym, torch.randperm(96, generator=GENERATOR))
    files = {
        "x.qweight": packed(parts["q"].T, 3).T, "x.qzeros": packed(parts["zeros"] - int(version == 1), 3),
        "x.scales": parts["scales"], "x.g_idx": parts["g_idx"],
    }  # fmt: skip
    write_weights(tmp_path / "model.safetensors", files)
    terms = Terms("config.json", version, bits=3, group=32, symmetric=sym, ordered=True)
    source = GptqSource(TensorSource([tmp_path / "model.safetensors"]), terms)
    assert source.shape("x.weight") == (64, 96)
    assert torch.equal(source.read("x.weight").float(), grid)
    assert source.packed("x.weight").bits == 4


def test_damaged_and_foreign_quantization(tmp_path: Path) -> None:
    parts, _ = quantize(llama_weights()["model.layers.0.mlp.up_proj.weight"], 4, 8, True, torch.arange(WIDTH))
    body = {k: v for k, v in llama_weights().items() if k != "model.layers.0.mlp.up_proj.weight"}
    stem = "model.layers.0.mlp.up_proj"
    good = body | {
        "value_head.weight": HEAD_WEIGHT,
        f"{stem}.qweight": packed(parts["q"].T, 4).T,
        f"{stem}.qzeros": packed(parts["zeros"] - 1, 4),
        f"{stem}.scales": parts["scales"],
        f"{stem}.g_idx": parts["g_idx"],
    }

    def load(name: str, **changes: torch.Tensor | None) -> None:
        weights = {k: v for k, v in {**good, **{f"{stem}.{k}": v for k, v in changes.items()}}.items() if v is not None}
        lightrm.load(Specimen({"model.safetensors": weights}, LLAMA_CONFIG).write(tmp_path / name))

    load("good")
    with pytest.raises(errors.TensorMismatchError, match=r"up_proj' lacks scales"):
        load("no scales", scales=None)
    with pytest.raises(errors.TensorMismatchError, match=r"g_idx .* does not fit 32 inputs in 4 groups"):
        load("bad groups", g_idx=parts["g_idx"] + 1)
    with pytest.raises(errors.UnsupportedModelError, match=r"has 5\.33333-bit weights; lightrm reads 2, 3, 4, 8"):
        load("5 bits", qzeros=torch.zeros(4, 8, dtype=torch.int32))
    hqq = {**LLAMA_CONFIG, "quantization_config": {"quant_method": "hqq"}}
    with pytest.raises(errors.UnsupportedModelError, match="'hqq', stored in a way that is not supported"):
        lightrm.load(Specimen({"model.safetensors": llama_weights()}, hqq).write(tmp_path / "hqq"))
