"""nf4 and LLM.int8: the schemes, and files that transformers saved after bitsandbytes quantized them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lightrm
from lightrm import errors
from lightrm.checkpoints.detect import open_checkpoint
from lightrm.checkpoints.quantized import said_to_hold
from lightrm.engine.memory import Room, choose_scheme, weight_bytes
from lightrm.kernels import dispatch, products, reference
from lightrm.schemes.int8 import Rowwise, quantize_rows
from tests.zoo import HEAD_WEIGHT, LLAMA_CONFIG, Specimen, llama_weights, normal

IDS = [[5, 9, 33, 71, 2], [1, 2], list(range(3, 90))]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, np.ndarray]]:
    """Folders that transformers wrote, with the scores it gives in float32 from weights that bitsandbytes dequantized:
    what it gives from packed ones depends on the CPU, where bitsandbytes may go through bfloat16."""
    from bitsandbytes import functional, nn
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, LlamaConfig
    from transformers import LlamaForSequenceClassification as Model

    folder = tmp_path_factory.mktemp("bitsandbytes")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_labels=1, pad_token_id=0, max_position_embeddings=256, initializer_range=0.1,
    )  # fmt: skip
    Model(config).save_pretrained(folder / "plain")
    four = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
    settings = {
        "nf4 nested": BitsAndBytesConfig(**four, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        "nf4": BitsAndBytesConfig(**four, bnb_4bit_quant_type="nf4"),
        "fp4": BitsAndBytesConfig(**four, bnb_4bit_quant_type="fp4"),
        "nf4 as bfloat16": BitsAndBytesConfig(**four, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage="bfloat16"),
        "fp4 as float32": BitsAndBytesConfig(**four, bnb_4bit_quant_type="fp4", bnb_4bit_quant_storage="float32"),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
    }
    found = {}
    for name, setting in settings.items():
        model = AutoModelForSequenceClassification.from_pretrained(
            folder / "plain", quantization_config=setting, dtype=torch.float32, device_map="cpu"
        )
        model.save_pretrained(folder / name)
        plain = Model.from_pretrained(folder / "plain")
        for layer_name, layer in model.named_modules():
            weight = getattr(layer, "weight", None)
            if isinstance(layer, nn.Linear4bit):
                weight = functional.dequantize_4bit(weight.data, weight.quant_state)
            elif isinstance(layer, nn.Linear8bitLt):
                weight = functional.int8_vectorwise_dequant(weight.CB, weight.SCB)
            if weight is not None:
                plain.get_submodule(layer_name).weight.data = weight
        with torch.inference_mode():
            scores = [float(plain(torch.tensor([ids])).logits[0, 0]) for ids in IDS]
        found[name] = folder / name, np.array(scores, dtype=np.float32)
    return found


@pytest.mark.parametrize("name", ["nf4 nested", "nf4", "fp4", "nf4 as bfloat16", "fp4 as float32", "int8"])
def test_widened_files_score_as_transformers_scores_them(foreign: dict, name: str) -> None:
    folder, scores = foreign[name]
    np.testing.assert_allclose(lightrm.load(folder, scheme="fp32").score_ids(IDS), scores, rtol=1e-4, atol=1e-5)


def test_the_stored_dtype_of_the_bytes_is_the_trainers(foreign: dict) -> None:
    """bnb_4bit_quant_storage, which FSDP asks for."""
    for name, dtype in (("nf4", torch.uint8), ("nf4 as bfloat16", torch.bfloat16), ("fp4 as float32", torch.float32)):
        stored = load_file(foreign[name][0] / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
        assert stored.dtype == dtype


@pytest.mark.parametrize("name", ["nf4 nested", "nf4", "fp4", "nf4 as bfloat16"])
def test_four_bit_values_stay_packed(foreign: dict, name: str) -> None:
    """They compute what bf16 computes from the widened weights, bit for bit."""
    folder, scores = foreign[name]
    kept, widened = lightrm.load(folder), lightrm.load(folder, scheme="bf16")
    assert (kept.report.scheme.name, kept.report.scheme.reason) == ("nf4", "the file's own values")
    assert "bitsandbytes" in repr(kept)
    assert kept.report.bytes < 0.4 * widened.report.bytes
    np.testing.assert_array_equal(kept.score_ids(IDS), widened.score_ids(IDS))
    assert lightrm.load(folder, scheme="w8a8").score_ids(IDS).shape == scores.shape


def test_eight_bit_values_stay_packed(foreign: dict) -> None:
    folder, scores = foreign["int8"]
    kept = lightrm.load(folder)
    assert kept.report.scheme.name == "bnb-int8"
    assert np.abs(kept.score_ids(IDS) - scores).max() < 0.1, "activations are int8 as well: near, not equal"
    values = kept.engine.decoder.layers[0].down.weight.values_OI
    stored = load_file(folder / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(values, stored), "not quantized again"


def test_files_load_without_bitsandbytes(foreign: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading needs no bitsandbytes: "auto" then takes another scheme, and asking for nf4 says what is missing."""
    monkeypatch.setattr(dispatch, "bitsandbytes_kernels", lambda: (None, "ImportError: none here"))
    folder, scores = foreign["nf4 nested"]
    rm = lightrm.load(folder)
    assert rm.report.scheme.name == "fp32"
    np.testing.assert_allclose(rm.score_ids(IDS), scores, rtol=1e-4, atol=1e-5)
    with pytest.raises(lightrm.SchemeError, match=r"nf4 cannot run: .*none here.*pip install bitsandbytes"):
        lightrm.load(folder, scheme="nf4")


@pytest.mark.parametrize("scheme", ["nf4", "bnb-int8"])
def test_any_checkpoint_runs_through_bitsandbytes(scheme: str, foreign: dict) -> None:
    plain = foreign["nf4"][0].parent / "plain"
    rm = lightrm.load(plain, scheme=scheme)
    assert rm.score_ids(IDS).shape == (len(IDS),)
    floor = {"nf4": 18, "bnb-int8": 38}[scheme]
    assert all(db > floor for db in rm.report.sqnr_db.values())
    planned = weight_bytes(rm.engine.decoder.architecture, rm.report.scheme)
    assert abs(planned - rm.report.bytes) <= 0.01 * rm.report.bytes
    with pytest.raises(lightrm.SchemeError, match="not a scheme of lightrm's own folders"):
        rm.save(Path("nowhere"))


def test_a_file_of_another_tool_keeps_its_values_as_lightrm_would_make_them(foreign: dict) -> None:
    plain = foreign["nf4"][0].parent / "plain"
    made, read = lightrm.load(plain, scheme="nf4"), lightrm.load(foreign["nf4 nested"][0])
    np.testing.assert_array_equal(made.score_ids(IDS), read.score_ids(IDS))


@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(1, 64, 64), (17, 31, 128), (5, 96, 96), (40, 7, 1024)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_agree_with_their_twins(tokens: int, outputs: int, inputs: int, bias: bool) -> None:
    """Shapes whose rows end inside a block are among them: there bitsandbytes itself is wrong on a CPU."""
    weight, x = normal(outputs, inputs, seed=1), normal(tokens, inputs, seed=2, scale=1.0)
    x[:, 3] = 9.0  # an outlier column
    bias_O = normal(outputs, seed=3) if bias else None
    packed = products.quantize_blockwise(weight)
    assert float((packed.rows(0, outputs) - weight).norm() / weight.norm()) < 0.12
    some = packed.rows(outputs // 3, outputs)
    assert torch.equal(some, packed.rows(0, outputs)[outputs // 3 :])
    twin = reference.blockwise_product(x, packed, bias_O)
    torch.testing.assert_close(products.blockwise_product(x, packed, bias_O), twin, rtol=1e-4, atol=1e-4)
    eight = Rowwise(*quantize_rows(weight))
    mixed = products.mixed_product(x, eight, bias_O)
    torch.testing.assert_close(mixed, reference.mixed_product(x, eight, bias_O), rtol=1e-2, atol=1e-2)
    exact = x @ weight.T + (0 if bias_O is None else bias_O)
    assert float((mixed - exact).norm() / exact.norm()) < 0.02


UP = "model.layers.0.mlp.up_proj."
STATE = "weight.quant_state.bitsandbytes__nf4"


def changed(source: Path, folder: Path, **changes: torch.Tensor | None) -> Path:
    """Write a checkpoint in which tensors of one layer are others, or missing."""
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors") | {UP + k: v for k, v in changes.items()}
    save_file({k: v.contiguous() for k, v in tensors.items() if v is not None}, folder / "model.safetensors")
    return folder


def test_damaged_files_are_named(foreign: dict, tmp_path: Path) -> None:
    def damaged(name: str, **changes: torch.Tensor | None) -> Path:
        return changed(foreign[name][0], tmp_path / str(len(list(tmp_path.iterdir()))), **changes)

    with pytest.raises(errors.TensorMismatchError, match=r"up_proj.weight' lacks .quant_map"):
        lightrm.load(damaged("nf4", **{"weight.quant_map": None}))
    with pytest.raises(errors.TensorMismatchError, match="do not fit a weight of"):
        lightrm.load(damaged("nf4", **{"weight.absmax": torch.ones(3)}))
    blob = torch.tensor(list(b'{"shape": 5}'), dtype=torch.uint8)
    with pytest.raises(errors.CorruptFileError, match="cannot be read"):
        lightrm.load(damaged("nf4", **{STATE: blob}))
    bad = torch.full_like(load_file(foreign["nf4"][0] / "model.safetensors")[UP + "weight.absmax"], torch.nan)
    for scheme in ("auto", "fp32"):
        with pytest.raises(lightrm.NumericsError, match="up_proj"):
            lightrm.load(damaged("nf4", **{"weight.absmax": bad}), scheme=scheme)
    with pytest.raises(errors.TensorMismatchError, match=r"up_proj' lacks its weight"):
        lightrm.load(damaged("int8", weight=None))
    with pytest.raises(errors.UnsupportedModelError, match="tiled form"):
        lightrm.load(damaged("int8", weight_format=torch.tensor(2, dtype=torch.uint8)))
    with pytest.raises(errors.TensorMismatchError, match="row maxima"):
        lightrm.load(damaged("int8", SCB=torch.ones(3)))


@pytest.mark.parametrize(
    ("file", "part", "value", "says"),
    [
        ("nf4", "weight.absmax", torch.tensor(1.0), r"absmax' has the shape \(\), expected a list"),
        ("int8", "SCB", torch.tensor(1.0), r"SCB' has the shape \(\), expected a list"),
        ("int8", "weight", torch.ones(4, dtype=torch.int8), r"has the shape \(4,\), expected a matrix"),
        ("int8", "weight_format", torch.zeros(3, dtype=torch.uint8), "tiled form"),
        ("nf4 nested", "weight.nested_absmax", None, "lacks .*nested_absmax"),
        ("nf4 nested", "weight.nested_quant_map", None, "lacks .*nested_quant_map"),
        ("nf4 nested", "weight.nested_absmax", torch.ones(3000), "3000 nested maxima do not fit"),
    ],
)
def test_parts_of_another_shape_are_named(
    file: str, part: str, value: torch.Tensor | None, says: str, foreign: dict, tmp_path: Path
) -> None:
    folder = changed(foreign[file][0], tmp_path / "damaged", **{part: value})
    with pytest.raises(errors.CheckpointError, match=says):
        lightrm.load(folder)


@pytest.mark.parametrize("damage", [{"nested_blocksize": None}, {"nested_blocksize": 0}, {"nested_offset": "far"}])
def test_a_state_that_does_not_tell_of_its_nested_maxima(damage: dict, foreign: dict, tmp_path: Path) -> None:
    source = foreign["nf4 nested"][0]
    state = json.loads(bytes(load_file(source / "model.safetensors")[UP + STATE].tolist()))
    blob = torch.tensor(list(json.dumps(state | damage).encode()), dtype=torch.uint8)
    with pytest.raises(errors.CorruptFileError, match="does not tell how its maxima are quantized"):
        lightrm.load(changed(source, tmp_path / "damaged", **{STATE: blob}))


def test_a_quantized_head_is_widened(tmp_path: Path) -> None:
    """Some tools quantize the value head as well; ours multiplies in float32 whatever the file holds."""
    values, scale = quantize_rows(HEAD_WEIGHT)
    files = llama_weights() | {"value_head.weight": values, "value_head.SCB": scale * 127}
    rm = lightrm.load(Specimen({"model.safetensors": files}, LLAMA_CONFIG).write(tmp_path / "a"), scheme="fp32")
    assert rm.engine.head.weights[0].dtype == torch.float32
    torch.testing.assert_close(rm.engine.head.weights[0], HEAD_WEIGHT, rtol=0, atol=0.01)


def test_auto_knows_what_a_file_holds(foreign: dict) -> None:
    for name, scheme in (("nf4", "nf4"), ("int8", "bnb-int8"), ("plain", None)):
        checkpoint = open_checkpoint(foreign["nf4"][0].parent / name)
        assert checkpoint.holds == said_to_hold(checkpoint.config, checkpoint.folder) == scheme
        chosen = choose_scheme("auto", CPU, checkpoint.architecture, Room(2**30, "1 GiB"), 128, checkpoint.holds)
        assert chosen.name == (scheme or "fp32")
    assert json.loads((foreign["nf4"][0] / "config.json").read_text())["quantization_config"]["load_in_4bit"]
