"""Quantized files are told by what their config says, and refused where tensors contradict it."""

from __future__ import annotations

import json
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import strategies as st
from safetensors.torch import save_file

import lightrm
from lightrm import errors
from lightrm.architecture import Architecture, Rope
from lightrm.checkpoints.awq_files import AwqSource
from lightrm.checkpoints.config import Config
from lightrm.checkpoints.detect import open_checkpoint, said_to_store
from lightrm.checkpoints.quantized import said_to_hold
from lightrm.cli import main
from lightrm.engine.memory import Room, choose_scheme
from tests.test_gptq import packed, quantize
from tests.zoo import HEAD_WEIGHT, LLAMA_CONFIG, Specimen, llama_weights

IDS = [[5, 9, 33, 71, 2], [1, 2], list(range(3, 90))]
CONFIG = {**LLAMA_CONFIG, "architectures": ["LlamaForSequenceClassification"]}
HEAD = {"score.weight": HEAD_WEIGHT}
Tensors = dict[str, torch.Tensor]


@cache
def grids(version: int, symmetric: bool) -> tuple[Tensors, Tensors]:
    """The tiny model packed by the slow packing of the GPTQ tests, and the weights its grids stand for."""
    files, plain = dict(HEAD), dict(HEAD)
    for name, weight in llama_weights().items():
        if "proj" not in name:
            files[name] = plain[name] = weight
            continue
        parts, plain[name] = quantize(weight, 4, 8, symmetric, torch.arange(weight.shape[1]))
        stem = name.removesuffix(".weight")
        files[f"{stem}.qweight"] = packed(parts["q"].T, 4).T
        files[f"{stem}.qzeros"] = packed(parts["zeros"] - (1 if version == 1 else 0), 4)
        files[f"{stem}.scales"] = parts["scales"]
    return files, plain


def written(path: Path, settings: dict[str, Any] | None, version: int = 1, symmetric: bool = False) -> Path:
    more = {} if settings is None else {"quantization_config": settings}
    return Specimen({"model.safetensors": grids(version, symmetric)[0]}, {**CONFIG, **more}).write(path)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, np.ndarray]:
    folder = tmp_path_factory.mktemp("plain")
    scores = {}
    for symmetric in (True, False):
        where = Specimen({"model.safetensors": grids(1, symmetric)[1]}, CONFIG).write(folder / str(symmetric))
        scores[symmetric] = lightrm.load(where, scheme="fp32").score_ids(IDS)
    return scores


AUTO = {"quant_method": "auto-round", "bits": 4, "group_size": 8, "data_type": "int", "act_bits": 16, "iters": 200}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": False}


@pytest.mark.parametrize(
    ("settings", "version"),
    [
        ({**AUTO, "packing_format": "auto_round:gptqmodel"}, 2),
        ({**AUTO, "packing_format": "auto_round"}, 2),
        ({**AUTO, "packing_format": "auto_round:auto_gptq"}, 1),
        ({**AUTO, "quant_method": "intel/auto-round", "packing_format": "auto_round:auto_gptq"}, 1),
        (AUTO, 1),
        ({**GPTQ, "checkpoint_format": "gptq_v2"}, 2),
        ({**GPTQ, "format": "gptq_v2", "checkpoint_format": "gptq_v2"}, 2),
        ({**GPTQ, "format": "gptq"}, 1),
        (GPTQ, 1),
        ({**GPTQ, "dynamic": {"-:.*lm_head": {}}, "bits": 8, "group_size": 64}, 1),
        (None, 1),
    ],
)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("told", [True, False])
def test_zero_points_are_read_as_they_were_stored(
    settings: dict | None, version: int, symmetric: bool, told: bool, expected: dict, tmp_path: Path
) -> None:
    if settings is not None and told:
        settings = settings | {"sym": symmetric}
    rm = lightrm.load(written(tmp_path, settings, version, symmetric), scheme="fp32")
    np.testing.assert_allclose(rm.score_ids(IDS), expected[symmetric], rtol=1e-4, atol=1e-5)


def test_an_asymmetric_grid_whose_zeros_lie_in_the_middle(tmp_path: Path) -> None:
    """Stored 7 everywhere is 8 minus one if the grid is symmetric, and 7 if the config says that it is not, and v2."""
    files = {n: torch.full_like(t, 0x77777777) if n.endswith("qzeros") else t for n, t in grids(2, False)[0].items()}
    scores = {}
    for name, settings in {
        "seven": {**GPTQ, "sym": False, "checkpoint_format": "gptq_v2"},
        "eight": {**GPTQ, "sym": False, "checkpoint_format": "gptq"},
        "symmetric": {**GPTQ, "sym": True, "checkpoint_format": "gptq_v2"},
    }.items():
        folder = Specimen({"model.safetensors": files}, {**CONFIG, "quantization_config": settings})
        scores[name] = lightrm.load(folder.write(tmp_path / name), scheme="fp32").score_ids(IDS)
    np.testing.assert_array_equal(scores["eight"], scores["symmetric"])
    assert np.abs(scores["seven"] - scores["eight"]).max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"quant_method": "awq", "version": "gemv", "bits": 4}, "gemv"),
        ({**AUTO, "packing_format": "auto_round:auto_awq"}, "auto_round:auto_awq"),
        ({**AUTO, "packing_format": "auto_round:llm_compressor"}, "auto_round:llm_compressor"),
        ({**AUTO, "data_type": "mx_fp"}, "data_type 'mx_fp'"),
        ({**AUTO, "act_bits": 8}, "act_bits 8"),
        ({**AUTO, "backend": "auto_round:exllamav2"}, "does not say how its zero points are stored"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "marlin"),
        ({**GPTQ, "is_marlin_format": True}, "is_marlin_format True"),
        ({**GPTQ, "pack_dtype": "int16"}, "pack_dtype 'int16'"),
        ({**GPTQ, "checkpoint_format": "gptq", "format": "gptq_v2"}, "gptq, gptq_v2"),
        *(({"quant_method": name}, f"quantized by '{name}'") for name in (
            "fbgemm_fp8", "hqq", "aqlm", "quanto", "mxfp4", "vptq", "eetq", "higgs", "spqr", "bitnet", "quark", "gguf",
            "modelopt",
        )),
        ({"weird": 1}, "quantized by 'unnamed'"),
    ],
)  # fmt: skip
def test_other_formats_are_refused_by_name(settings: dict, says: str, tmp_path: Path) -> None:
    with pytest.raises(errors.UnsupportedModelError, match=says):
        lightrm.load(written(tmp_path / "packed", settings))
    if "backend" in settings:
        return
    plain = Specimen({"model.safetensors": llama_weights() | HEAD}, {**CONFIG, "quantization_config": settings})
    with pytest.raises(errors.UnsupportedModelError, match=says):
        lightrm.load(plain.write(tmp_path / "plain"))
    with pytest.raises(errors.UnsupportedModelError, match=says):
        said_to_hold(Config({"quantization_config": settings}, Path("config.json")), tmp_path)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({**GPTQ, "bits": 8}, "has 4 bits, .* says 8"),
        ({**GPTQ, "group_size": 16}, "groups of its .* inputs, .* says groups of 16"),
        ({**GPTQ, "group_size": -1}, "groups of its"),
        ({**GPTQ, "sym": True}, "zero points .* says that its grid is symmetric"),
        ({**GPTQ, "desc_act": True}, "lacks g_idx, .* says desc_act"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "by 'bitsandbytes', but they are packed as GPTQ"),
    ],
)
def test_config_and_tensors_must_agree(settings: dict, says: str, tmp_path: Path) -> None:
    with pytest.raises(errors.TensorMismatchError, match=says):
        lightrm.load(written(tmp_path, settings), scheme="fp32")


@pytest.mark.parametrize(
    "settings", [GPTQ, AUTO, {"quant_method": "bitsandbytes", "load_in_8bit": True}, {"load_in_4bit": True}]
)
def test_full_weights_that_are_called_quantized(settings: dict, tmp_path: Path) -> None:
    config = {**CONFIG, "quantization_config": settings}
    folder = Specimen({"model.safetensors": llama_weights() | HEAD}, config).write(tmp_path)
    with pytest.raises(errors.TensorMismatchError, match=r"but they are not packed: .* take the field out of a copy"):
        lightrm.load(folder)


def awq(weights: Tensors) -> Tensors:
    """AutoAWQ's GEMM packing: all parts along the outputs, in the order 0 2 4 6 1 3 5 7."""
    files: Tensors = {}
    for name, tensor in weights.items():
        if not name.endswith(".qweight"):
            continue
        stem = name.removesuffix(".qweight")
        groups, outputs = weights[f"{stem}.scales"].shape
        inputs = tensor.shape[0] * 8
        files[f"{stem}.qweight"] = torch.zeros(inputs, outputs // 8, dtype=torch.int32)
        files[f"{stem}.qzeros"] = torch.zeros(groups, outputs // 8, dtype=torch.int32)
        files[f"{stem}.scales"] = weights[f"{stem}.scales"]
    others = {n: t for n, t in weights.items() if not n.endswith((".qweight", ".qzeros", ".scales"))}
    return files | others


@pytest.mark.parametrize("said", ["config", "quant_config.json", "nothing", "gptq"])
def test_awq_is_never_taken_for_gptq(said: str, tmp_path: Path) -> None:
    config = {"config": {"quant_method": "awq", "bits": 4, "version": "gemm"}, "gptq": GPTQ}.get(said)
    folder = Specimen(
        {"model.safetensors": awq(grids(1, False)[0])},
        CONFIG if config is None else {**CONFIG, "quantization_config": config},
        extra={"quant_config.json": {"zero_point": True, "w_bit": 4}} if said == "quant_config.json" else None,
    ).write(tmp_path)
    if said in ("config", "quant_config.json"):
        (source,) = lightrm.load(folder, scheme="fp32").checkpoint.sources
        assert isinstance(source, AwqSource)
        return
    with pytest.raises(errors.UnsupportedModelError, match=r"[Aa][Ww][Qq]"):
        lightrm.load(folder)


ODD = st.sampled_from([None, True, -1, 0, 8, 0.5, 10**400, "", "x", [], [1], {}, {"a": 1}, float("nan")])
SETTINGS = (
    "bits", "group_size", "sym", "desc_act", "checkpoint_format", "format", "quant_method", "packing_format",
    "data_type", "act_bits", "dynamic", "extra_config", "backend", "load_in_4bit", "bnb_4bit_quant_type",
)  # fmt: skip


@hypothesis.given(name=st.sampled_from(SETTINGS), value=ODD, base=st.sampled_from([AUTO, GPTQ]))
@hypothesis.settings(max_examples=100, deadline=None)
def test_any_value_of_any_setting_loads_or_is_refused(
    name: str, value: object, base: dict, packed_folder: Path
) -> None:
    config = {**CONFIG, "quantization_config": {**base, name: value}}
    (packed_folder / "config.json").write_text(json.dumps(config))
    with suppress(lightrm.LightRMError):  # refused: a traceback of anything else fails this test
        weight_OI = open_checkpoint(packed_folder).read("layers.0.down.weight")
        assert weight_OI.isfinite().all()


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("any"), GPTQ)


def test_fields_of_other_tools(tmp_path: Path) -> None:
    for field, says in (
        ("quantization", "quantized by 'mlx'"),
        ("compression_config", "config, has bits 4"),
    ):
        config = {**CONFIG, field: {"bits": 4, "group_size": 64}}
        folder = Specimen({"model.safetensors": llama_weights() | HEAD}, config).write(tmp_path / field)
        with pytest.raises(errors.UnsupportedModelError, match=says):
            lightrm.load(folder)


def test_bitsandbytes_settings_that_are_not_of_these_weights(tmp_path: Path) -> None:
    files = llama_weights() | HEAD
    stem = "model.layers.0.mlp.up_proj."
    files[stem + "weight"] = files[stem + "weight"].to(torch.int8)
    files[stem + "SCB"] = torch.ones(48)
    for settings in ({"quant_method": "bitsandbytes", "load_in_4bit": True}, GPTQ):
        folder = tmp_path / str(settings["quant_method"])
        with pytest.raises(errors.TensorMismatchError, match="bnb-int8"):
            lightrm.load(
                Specimen({"model.safetensors": files}, {**CONFIG, "quantization_config": settings}).write(folder)
            )


SEVEN_B = Architecture("llama", 32, 4096, 11008, 32, 32, 128, 32000, 1e-6, Rope(), 2048)


@pytest.mark.parametrize(
    ("stored", "scheme", "reason"),
    [
        (torch.bfloat16, "bf16", "the dtype they are stored in"),
        (torch.float16, "fp16", "the dtype they are stored in"),
        (torch.float32, "fp16", "the finer half precision"),
        (None, "fp16", "the finer half precision"),
    ],
)
def test_auto_keeps_the_stored_half_precision_on_a_card(stored: torch.dtype | None, scheme: str, reason: str) -> None:
    """No card is asked: what fits is a number here."""
    cuda = torch.device("cuda")
    for room, says in ((64 * 2**30, reason), (2**30, f"layers are streamed; {reason}")):
        chosen = choose_scheme("auto", cuda, SEVEN_B, Room(room, "a card"), 2048, None, stored)
        assert chosen.name == scheme
        assert says in chosen.reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_the_stored_dtype_is_the_files(dtype: torch.dtype, kind: str, tmp_path: Path) -> None:
    """Whatever config.json says; a plan, which has no weights, goes by that."""
    tensors = {name: tensor.to(dtype) for name, tensor in (llama_weights() | HEAD).items()}
    name = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    config = {**CONFIG, "torch_dtype": "float16"}
    checkpoint = open_checkpoint(Specimen({name: tensors}, config).write(tmp_path))
    assert checkpoint.stored == dtype
    assert said_to_store(checkpoint.config) == torch.float16
    assert said_to_store(Config({"dtype": "bfloat16"}, Path("config.json"))) == torch.bfloat16
    assert said_to_store(Config({"dtype": "load"}, Path("config.json"))) is None


def test_plan_says_what_load_does(tmp_path: Path) -> None:
    """For a folder of lightrm's own, for a file of another tool, and for one that load refuses."""
    plain = Specimen({"model.safetensors": llama_weights() | HEAD}, CONFIG).write(tmp_path / "plain")
    made = CliRunner().invoke(main, ["quantize", str(plain), str(tmp_path / "native"), "--scheme", "w4a8"])
    assert made.exit_code == 0, made.output
    for folder in (tmp_path / "native", plain, written(tmp_path / "gptq", GPTQ)):
        planned = CliRunner().invoke(main, ["plan", str(folder)]).output
        loaded = lightrm.load(folder)
        assert f"auto takes {loaded.report.scheme.name}: " in planned
    table = CliRunner().invoke(main, ["plan", str(tmp_path / "native")], env={"COLUMNS": "200"}).output
    assert "auto takes w4a8: the folder holds w4a8" in table
    assert {line.split()[0] for line in table.splitlines() if "resident, packs" in line} == {"w4a8", "w4a16"}
    refused = CliRunner().invoke(main, ["plan", str(written(tmp_path / "hqq", {"quant_method": "hqq"}))])
    assert refused.exit_code != 0
    assert "hqq" in refused.output
    tokens = json.loads((plain / "config.json").read_text()) | {"architectures": ["LlamaForTokenClassification"]}
    (plain / "config.json").write_text(json.dumps(tokens))
    (plain / "config.json").write_text(json.dumps({**CONFIG, "partial_rotary_factor": 0.5}))
    assert "partial_rotary_factor" in CliRunner().invoke(main, ["plan", str(plain)]).output
    (plain / "config.json").write_text(json.dumps({**CONFIG, "num_labels": 5, "id2label": {"0": "a"}}))
    assert "num_labels is 5, id2label has 1" in " ".join(CliRunner().invoke(main, ["plan", str(plain)]).output.split())
    (plain / "config.json").write_text(json.dumps(tokens))
    assert "labels every token" in CliRunner().invoke(main, ["plan", str(plain)]).output


def test_a_head_of_any_name_that_the_config_gives(tmp_path: Path) -> None:
    plain = lightrm.load(Specimen({"model.safetensors": llama_weights() | HEAD}, CONFIG).write(tmp_path / "plain"))
    body = llama_weights() | {"reward_head.weight": HEAD_WEIGHT}
    named = {**CONFIG, "value_head_prefix": "reward_head"}
    rm = lightrm.load(Specimen({"model.safetensors": body}, named).write(tmp_path / "named"))
    np.testing.assert_array_equal(rm.score_ids(IDS), plain.score_ids(IDS))
    for prefix in ("score", "lost", ""):
        config = {**CONFIG, "value_head_prefix": prefix}
        with pytest.raises(errors.MissingHeadError, match=f"names the value head '{prefix}', but there is no"):
            lightrm.load(Specimen({"model.safetensors": body}, config).write(tmp_path / f"other {prefix}"))
    save_file(body, tmp_path / "named" / "model.safetensors")
