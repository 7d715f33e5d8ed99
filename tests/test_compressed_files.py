"""compressed-tensors and fp8 files: written by compressed-tensors' own compressors, read by lightrm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lightrm
from lightrm import errors
from lightrm.checkpoints.detect import open_checkpoint
from lightrm.checkpoints.quantized import said_to_hold
from lightrm.schemes.int8 import dequantize_rows, quantize_rows
from tests.zoo import Weights

pytest.importorskip("compressed_tensors")

IDS = [[5, 9, 33, 71, 2], [1, 2], list(range(3, 90))]
INT8 = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
CASES: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "w8a8": ("int-quantized", {"strategy": "channel"}, "w8a8"),
    "w8a8 in bfloat16": ("int-quantized", {"strategy": "channel", "scale_dtype": "bfloat16"}, "w8a8"),
    "w8a8 asymmetric": ("int-quantized", {"strategy": "channel", "symmetric": False}, None),
    "int8 in groups": ("int-quantized", {"strategy": "group", "group_size": 32}, None),
    "int8 by tensor": ("naive-quantized", {"strategy": "tensor"}, None),
    "w4a16": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}, "w4a16"),
    "w4a16 asymmetric": (
        "pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": False}, "w4a16",
    ),
    "w4a16 by channel": ("pack-quantized", {"num_bits": 4, "strategy": "channel"}, "w4a16"),
    "w8a16": ("pack-quantized", {"strategy": "group", "group_size": 32, "symmetric": False}, "w4a16"),
    "fp8 by tensor": ("float-quantized", {"type": "float", "strategy": "tensor"}, None),
    "fp8 by channel": ("float-quantized", {"type": "float", "strategy": "channel"}, None),
    "fp8 in blocks": ("float-quantized", {"type": "float", "strategy": "block", "block_structure": [48, 64]}, None),
}  # fmt: skip


def plain_model() -> Any:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_labels=1, pad_token_id=None, max_position_embeddings=256, initializer_range=0.1,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    for name, weight in model.named_parameters():
        if "embed" in name:  # exact in half precision: else int8 rounding differs from the first layer on
            weight.data = weight.data.half().float()
        if "norm" in name:
            weight.data += 0.2 * torch.randn(weight.shape)
    return model


def scores(model: Any) -> np.ndarray:
    with torch.no_grad():
        return np.array([float(model(torch.tensor([ids])).logits) for ids in IDS])


def with_int8_rows(model: Any) -> Any:
    """The same model, with the inputs of its layers rounded to int8 row by row."""
    for layer in model.model.layers.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(lambda _, x: dequantize_rows(*quantize_rows(x[0][0]))[None])
    return model


def scale_of(weight: torch.Tensor, args: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    from compressed_tensors.quantization.utils import calculate_qparams

    outputs, inputs = weight.shape
    if args.strategy == "tensor":
        grid = weight.view(1, -1)
    elif args.strategy == "channel":
        grid = weight
    elif args.strategy == "group":
        grid = weight.view(outputs, -1, args.group_size)
    else:
        rows, columns = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -inputs % columns, 0, -outputs % rows))
        grid = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2).flatten(2)
    scale, zero = calculate_qparams(grid.amin(-1), grid.amax(-1), args)
    if args.strategy == "channel":
        scale, zero = scale.view(-1, 1), zero.view(-1, 1)
    return scale, None if args.symmetric else zero


def write(folder: Path, tensors: Weights, config: dict[str, Any], settings: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any, Weights]]:
    """Folders, the model with the weights that the library decompresses, and these weights as it gives them."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    made = {}
    for case, (form, fields, _) in CASES.items():
        model, expected = plain_model(), {}
        scale_dtype = getattr(torch, fields.get("scale_dtype", "float32"))
        args = QuantizationArgs(**{"num_bits": 8, "type": "int"} | fields)
        inputs = QuantizationArgs(**INT8) if form == "int-quantized" else None
        scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=inputs, format=form)
        compressor = BaseCompressor.get_value_from_registry(form)
        tensors = dict(model.state_dict())
        for name, layer in model.model.layers.named_modules():
            if not isinstance(layer, torch.nn.Linear):
                continue
            stem = f"model.layers.{name}"
            scale, zero = scale_of(layer.weight.data, args)
            state = {"weight": tensors.pop(f"{stem}.weight"), "weight_scale": scale.to(scale_dtype)}
            if zero is not None:
                state["weight_zero_point"] = zero
            packed = compressor.compress(state, scheme)
            tensors |= {f"{stem}.{part}": tensor for part, tensor in packed.items() if tensor is not None}
            expected[f"{stem}.weight"] = compressor.decompress(packed, scheme)["weight"]
            layer.weight.data = expected[f"{stem}.weight"].float()
        config = QuantizationConfig(
            config_groups={"group_0": scheme}, format=form, ignore=["score"], quantization_status="compressed"
        )
        settings = json.loads(config.model_dump_json())
        folder = write(tmp_path_factory.mktemp("compressed") / "a", tensors, model.config.to_dict(), settings)
        made[case] = folder, model, expected
    return made


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_library(case: str, compressed: dict) -> None:
    from transformers import AutoModelForSequenceClassification, CompressedTensorsConfig

    folder, model, expected = compressed[case]
    checkpoint = open_checkpoint(folder)
    source = checkpoint.sources[0]
    for name, weight in expected.items():
        found = source.read(name)
        assert found.dtype == weight.dtype
        assert torch.equal(found, weight), name
    found = lightrm.load(folder, scheme="fp32").score_ids(IDS)
    np.testing.assert_allclose(found, scores(model), rtol=1e-4, atol=1e-4)
    theirs = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    np.testing.assert_allclose(found, scores(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_values_stay_where_a_scheme_runs_them(case: str, compressed: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightrm.kernels.cpu.cpu_passes.PAIRS", False)  # compared with float32 attention
    folder, model, expected = compressed[case]
    holds = CASES[case][2]
    checkpoint = open_checkpoint(folder)
    assert checkpoint.holds == said_to_hold(checkpoint.config, folder) == holds
    rm = lightrm.load(folder)
    assert rm.report.scheme.name == (holds or "fp32")
    config = {name: value for name, value in checkpoint.config.raw.items() if name != "quantization_config"}
    plain = folder.parent / "plain"
    write(plain, model.state_dict() | expected, config, {})
    (plain / "config.json").write_text(json.dumps(config))
    for scheme in {"bf16", "w8a8", "w4a8"} - {holds}:
        found, widened = (lightrm.load(path, scheme=scheme).score_ids(IDS) for path in (folder, plain))
        np.testing.assert_array_equal(found, widened)
    if holds == "w8a8":
        weight = rm.engine.decoder.layers[1].down.weight
        stored = load_file(folder / "model.safetensors")
        assert torch.equal(weight.values_OI, stored["model.layers.1.mlp.down_proj.weight"])
        assert torch.equal(weight.scale_O[:, None], stored["model.layers.1.mlp.down_proj.weight_scale"].float())
        for name in expected:  # products of integers are not rounded to the dtype of the scales
            model.get_parameter(name).data = checkpoint.sources[0].packed(name).float()
        np.testing.assert_allclose(rm.score_ids(IDS), scores(with_int8_rows(model)), atol=2e-3)
        with pytest.raises(errors.SchemeError, match="quantized already"):
            rm.save(folder / "nowhere")
    if holds == "w4a16":
        widened = lightrm.load(folder, scheme="bf16").score_ids(IDS)
        np.testing.assert_array_equal(rm.score_ids(IDS), widened)


UP = "model.layers.0.mlp.up_proj."


@pytest.mark.parametrize(
    ("case", "part", "value", "says"),
    [
        ("w8a8", "weight_scale", None, r"up_proj' lacks .*weight_scale"),
        ("w8a8", "weight_scale", torch.ones(3, 1), r"up_proj' of \(192, 128\) has int values.* scales \(3, 1\)"),
        ("w8a8", "weight_scale", torch.full((192, 1), torch.inf), "up_proj"),
        ("w8a8", "weight", torch.ones(192, 128).to(torch.float8_e4m3fn), "has float values"),
        ("w8a8 asymmetric", "weight_zero_point", None, "no zero points"),
        ("w4a16", "weight_shape", None, r"lacks .*weight_shape"),
        ("w4a16", "weight_shape", torch.tensor([192, 64]), "up_proj"),
        ("w4a16", "weight_g_idx", torch.zeros(128, dtype=torch.int32), "does not give each of 4 groups 32 inputs"),
        ("w4a16 asymmetric", "weight_zero_point", torch.zeros(192, 2, dtype=torch.int32), "expected int32"),
        ("fp8 by channel", "weight_scale", None, r"up_proj' lacks .*weight_scale"),
    ],
)
def test_damaged_layers_are_named(
    case: str, part: str, value: torch.Tensor | None, says: str, compressed: dict, tmp_path: Path
) -> None:
    folder = compressed[case][0]
    tensors = load_file(folder / "model.safetensors") | {UP + part: value}
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    write(tmp_path, {k: v for k, v in tensors.items() if v is not None}, config, settings)
    for scheme in ("auto", "fp32"):
        with pytest.raises(lightrm.LightRMError, match=says):
            lightrm.load(tmp_path, scheme=scheme)


def test_the_name_of_the_settings_in_older_releases(compressed: dict, tmp_path: Path) -> None:
    folder = compressed["w4a16"][0]
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["compression_config"] = config.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(config))
    np.testing.assert_array_equal(lightrm.load(tmp_path).score_ids(IDS), lightrm.load(folder).score_ids(IDS))
    rm = lightrm.load(tmp_path, scheme="w8a8")
    rm.save(tmp_path / "own")
    np.testing.assert_array_equal(lightrm.load(tmp_path / "own").score_ids(IDS), rm.score_ids(IDS))


def test_zero_points_of_older_releases(compressed: dict, tmp_path: Path) -> None:
    """They are stored as they are, not packed."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    folder, _, expected = compressed["w4a16 asymmetric"]
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    name = UP + "weight_zero_point"
    zero = unpack_from_int32(tensors[name], 4, torch.Size([192, 2]), packed_dim=0)
    write(tmp_path, tensors | {name: zero}, config, settings)
    assert torch.equal(open_checkpoint(tmp_path).sources[0].read(UP + "weight"), expected[UP + "weight"])


def test_activation_order(compressed: dict, tmp_path: Path) -> None:
    """Shuffled inputs with their groups in weight_g_idx compute what the same inputs in order compute."""
    folder = compressed["w4a16"][0]
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    in_order = torch.arange(128, dtype=torch.int32) // 32
    write(tmp_path / "in order", tensors | {UP + "weight_g_idx": in_order}, config, settings)
    write(tmp_path / "not set", tensors | {UP + "weight_g_idx": torch.full_like(in_order, -1)}, config, settings)
    mixed = in_order[torch.randperm(128, generator=torch.Generator().manual_seed(0))]
    write(tmp_path / "mixed", tensors | {UP + "weight_g_idx": mixed}, config, settings)
    name = UP + "weight"
    weight, moved = (open_checkpoint(path).sources[0] for path in (folder, tmp_path / "mixed"))
    scale = tensors[UP + "weight_scale"]
    unscaled = weight.read(name) / scale[:, in_order.long()]
    torch.testing.assert_close(moved.read(name), unscaled.round() * scale[:, mixed.long()])
    for path in (tmp_path / "in order", tmp_path / "not set"):
        assert torch.equal(open_checkpoint(path).sources[0].read(name), weight.read(name))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"kv_cache_scheme": {"num_bits": 8}}, errors.UnsupportedModelError, "kv_cache_scheme .*changes the model"),
        ({"transform_config": {"config_groups": {"u": 1}}}, errors.UnsupportedModelError, "transform_config"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, errors.UnsupportedModelError, "sparsity_config"),
        ({"format": "marlin-24"}, errors.UnsupportedModelError, "stored as 'marlin-24'; lightrm reads int-quantized"),
        ({"format": "dense", "config_groups": {"g": {}}}, errors.UnsupportedModelError, "stored as 'dense'"),
        ({"config_groups": {}}, errors.ConfigError, "no config_groups"),
        ({"config_groups": {"W8A8": ["Linear"]}}, errors.UnsupportedModelError, "names the preset 'W8A8'"),
        ({"config_groups": {"g": {"targets": ["Linear"]}}}, errors.UnsupportedModelError, "does not quantize weights"),
        ({"unheard_of": 3}, errors.UnsupportedModelError, "unheard_of 3"),
    ],
)
def test_what_changes_the_model_is_refused(
    change: dict, error: type[Exception], says: str, compressed: dict, tmp_path: Path
) -> None:
    folder = compressed["w8a8"][0]
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config") | change
    with pytest.raises(error, match=says):
        lightrm.load(write(tmp_path, load_file(folder / "model.safetensors"), config, settings))


def test_files_without_a_group_of_their_own_format(compressed: dict, tmp_path: Path) -> None:
    """Groups of several formats in one file: each layer is read by the group that its tensors fit."""
    (one, _, _), (two, _, expected) = compressed["w8a8"], compressed["w4a16"]
    tensors, others = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    tensors = {k: v for k, v in tensors.items() if "mlp" not in k} | {k: v for k, v in others.items() if "mlp" in k}
    config = json.loads((one / "config.json").read_text())
    settings = config.pop("quantization_config")
    groups = {k: json.loads((f / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
              for k, f in (("a", one), ("b", two))}  # fmt: skip
    write(tmp_path, tensors, config, settings | {"format": "mixed-precision", "config_groups": groups})
    source = open_checkpoint(tmp_path).sources[0]
    assert source.holds is None
    assert torch.equal(source.read(UP + "weight"), expected[UP + "weight"])
    assert lightrm.load(tmp_path).report.scheme.name == "fp32"


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}


def fp8_files(block: tuple[int, int] | None, name: str, dtype: torch.dtype) -> tuple[Weights, Weights]:
    """Return the files of an fp8 model and the same as plain weights."""
    made, plain = {}, {}
    for key, weight in plain_model().state_dict().items():
        if "proj" not in key:
            made[key] = plain[key] = weight
            continue
        rows, columns = block or weight.shape
        parts = [[part.abs().max() / 448 for part in strip.split(columns, 1)] for strip in weight.split(rows)]
        scale = torch.tensor(parts).to(dtype)
        wide = scale.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: len(weight), : weight.shape[1]]
        made[key] = (weight / wide).to(torch.float8_e4m3fn)
        made[key.removesuffix("weight") + name] = scale if block else scale[0, 0]
        plain[key] = made[key].float() * wide
    return made, plain


@pytest.mark.parametrize(
    ("block", "name", "dtype"),
    [
        ((128, 128), "weight_scale_inv", torch.float32),
        ((64, 32), "weight_scale_inv", torch.bfloat16),
        (None, "weight_scale", torch.float32),
        (None, "weight_scale_inv", torch.bfloat16),
    ],
)
def test_fp8(block: tuple[int, int] | None, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, FineGrainedFP8Config

    made, plain = fp8_files(block, name, dtype)
    config = plain_model().config.to_dict() | {"dtype": "bfloat16", "intermediate_size": 192}
    folder = write(tmp_path, made, config, FP8 | {"weight_block_size": block and list(block)})
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.holds, checkpoint.stored) == (None, torch.bfloat16)
    for key, weight in plain.items():
        assert torch.equal(checkpoint.sources[0].read(key), weight)
    rm = lightrm.load(folder)
    assert rm.report.scheme.name == "fp32"
    if block == (64, 32):  # transformers reads blocks that divide the matrix, under this name
        theirs = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=torch.float32,
            quantization_config=FineGrainedFP8Config(weight_block_size=block, dequantize=True),
        )
        np.testing.assert_allclose(rm.score_ids(IDS), scores(theirs), rtol=1e-4, atol=1e-4)


def test_damaged_fp8(tmp_path: Path) -> None:
    made, _ = fp8_files((128, 128), "weight_scale_inv", torch.float32)
    config = plain_model().config.to_dict()
    settings = FP8 | {"weight_block_size": [128, 128]}

    def load(**changes: torch.Tensor | None) -> None:
        tensors = made | {UP + part: value for part, value in changes.items()}
        lightrm.load(write(tmp_path, {k: v for k, v in tensors.items() if v is not None}, config, settings))

    with pytest.raises(errors.TensorMismatchError, match=r"up_proj'.* has no \.weight_scale_inv"):
        load(weight_scale_inv=None)
    with pytest.raises(errors.TensorMismatchError, match=r"asks for floats \(2, 1\), for blocks"):
        load(weight_scale_inv=torch.ones(1, 1))
    settings |= {"weight_block_size": None}
    with pytest.raises(errors.TensorMismatchError, match=r"asks for floats \(1, 1\), for one scale"):
        load()
    settings |= {"kv_cache_scheme": "static"}
    with pytest.raises(errors.UnsupportedModelError, match="kv_cache_scheme 'static'"):
        load()
