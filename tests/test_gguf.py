"""GGUF files: written by llama.cpp's own Python package, and compared with what it and transformers read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import lightrm
from lightrm import errors
from lightrm.checkpoints.detect import open_checkpoint
from lightrm.cli import main
from lightrm.schemes.ggml import KINDS

gguf = pytest.importorskip("gguf")
Type = gguf.GGMLQuantizationType

IDS = [[5, 9, 33, 71, 2], [1, 2], list(range(3, 90))]
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "score": "cls.output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192, "rope_theta": 500000.0}  # fmt: skip


def plain_model(family: str = "llama", **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    settings = {
        "vocab_size": 96, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_labels": 1, "pad_token_id": None,
        "max_position_embeddings": 256, "initializer_range": 0.1,
    }  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(family, **settings | changes)).eval()
    for name, weight in model.named_parameters():
        if "norm" in name or "bias" in name:
            weight.data += 0.2 * torch.randn(weight.shape)
    return model


def scores(model: Any) -> np.ndarray:
    with torch.no_grad():
        return np.array([float(model(torch.tensor([ids])).logits) for ids in IDS])


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """As llama.cpp's converter reorders the rows of query and key."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def original(weight: torch.Tensor, heads: int) -> torch.Tensor:
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def packed(weight: np.ndarray, kind: Any) -> np.ndarray:
    """Quantize with the package; kinds that it only reads are filled with random values of a sane size."""
    try:
        return gguf.quants.quantize(weight, kind)
    except NotImplementedError:
        one = KINDS[kind.value]
        generator = np.random.default_rng(weight.size)
        blocks = generator.integers(0, 256, (weight.size // one.weights, one.bytes), dtype=np.uint8)
        for at in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(one.name, (0, 2)):
            halves = generator.uniform(0.5e-3, 1e-3, (len(blocks), 1)).astype(np.float16)
            blocks[:, at : at + 2] = halves.view(np.uint8)
        return blocks.reshape(len(weight), -1)


def write(
    path: Path, model: Any, kinds: dict[str, Any], more: dict[str, Any] | None = None, **changes: Any
) -> dict[str, torch.Tensor]:
    """Write a model as llama.cpp's converter does. kinds: of matrices, by part of their name, "" for all others.

    Returns its tensors as they are after quantization. changes: settings of the architecture that are added, replaced,
    or None; more: others.
    """
    config, family = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, family)
    settings = {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "rope.dimension_count": config.hidden_size // config.num_attention_heads, "vocab_size": config.vocab_size,
    }  # fmt: skip
    floats = {"attention.layer_norm_rms_epsilon": config.rms_norm_eps,
              "rope.freq_base": config.rope_parameters["rope_theta"]}  # fmt: skip
    own = {f"{family}.{name}": value for name, value in (settings | floats | changes).items()}
    for name, value in (own | (more or {})).items():
        if isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, list | np.ndarray):
            writer.add_array(name, list(value) if isinstance(value, list) else value.tolist())
        elif value is not None:
            writer.add_uint32(name, value)
    expected = {}
    for name, tensor in model.state_dict().items():
        stem, _, ending = name.rpartition(".")
        block = stem.removeprefix("model.layers.").split(".", 1) if "layers" in stem else None
        theirs = f"blk.{block[0]}.{NAMES[block[1]]}" if block else NAMES[stem]
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(theirs.split(".")[-1])
        turned = heads is not None and family == "llama"
        values = (permuted(tensor, heads) if turned else tensor).float().numpy()
        kind = next((kind for part, kind in kinds.items() if part in theirs), Type.F32)
        kind = kind if values.ndim == 2 and len(values) > 1 else Type.F32
        blocks = packed(values, kind)
        writer.add_tensor(f"{theirs}.{ending}", blocks, raw_dtype=kind)
        wide = torch.from_numpy(gguf.quants.dequantize(blocks, kind).reshape(values.shape).copy())
        expected[name] = original(wide, heads) if turned else wide
    if config.rope_parameters["rope_type"] == "llama3":
        turns = 1 / (500000.0 ** (torch.arange(0, 64, 2).float() / 64))
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        writer.add_tensor("rope_freqs.weight", (turns / scaled).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


MIXES = {
    "F32": {"": Type.F32},
    "F16": {"": Type.F16},
    "BF16": {"": Type.BF16},
    "Q8_0": {"": Type.Q8_0},
    "Q4_0": {"token_embd": Type.Q8_0, "": Type.Q4_0},
    "Q4_K_M": {"token_embd": Type.Q6_K, "attn_v": Type.Q6_K, "ffn_down": Type.Q6_K, "": Type.Q4_K},
    "Q5_K": {"token_embd": Type.F16, "": Type.Q5_K},
    "Q3_K": {"attn_v": Type.Q5_1, "attn_q": Type.Q5_0, "ffn_up": Type.Q4_1, "ffn_gate": Type.Q2_K, "": Type.Q3_K},
}


@pytest.mark.parametrize("kind", [kind for kind, one in KINDS.items() if one.blocks is not None])
def test_blocks_are_those_of_the_package(kind: int) -> None:
    """Random bytes in every format, NaN and Inf among the scales."""
    blocks = np.random.default_rng(0).integers(0, 256, (200, KINDS[kind].bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks, Type(kind))
    assert gguf.GGML_QUANT_SIZES[Type(kind)] == (KINDS[kind].weights, KINDS[kind].bytes)
    found = KINDS[kind].blocks(torch.from_numpy(blocks)).numpy()
    np.testing.assert_array_equal(found, expected)
    finite = np.isfinite(expected)
    assert np.array_equal(found[finite].view(np.int32), expected[finite].view(np.int32))


@pytest.mark.parametrize("mix", MIXES)
def test_files_of_every_kind(mix: str, tmp_path: Path) -> None:
    model = plain_model()
    expected = write(tmp_path / "model.gguf", model, MIXES[mix])
    source = open_checkpoint(tmp_path / "model.gguf").sources[0]
    for name, weight in expected.items():
        assert torch.equal(source.read(name).float(), weight), name
    model.load_state_dict(expected)
    rm = lightrm.load(tmp_path, scheme="fp32")
    np.testing.assert_allclose(rm.score_ids(IDS), scores(model), rtol=1e-4, atol=1e-4)
    holds = "w4a16" if mix == "Q4_0" else None
    kept = lightrm.load(tmp_path)
    assert open_checkpoint(tmp_path).holds == holds
    assert kept.report.scheme.name == (holds or "fp32")
    if holds:
        np.testing.assert_array_equal(kept.score_ids(IDS), lightrm.load(tmp_path, scheme="bf16").score_ids(IDS))
    model.save_pretrained(tmp_path / "plain")
    for scheme in ("w8a8", "w4a8"):
        found, widened = (lightrm.load(path, scheme=scheme).score_ids(IDS) for path in (tmp_path, tmp_path / "plain"))
        np.testing.assert_allclose(found, widened, atol=1e-5)


def test_transformers_reads_the_same_weights(tmp_path: Path) -> None:
    from transformers import AutoModel

    model = plain_model()
    write(tmp_path / "model.gguf", model, MIXES["Q4_K_M"])
    theirs = AutoModel.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).state_dict()
    source = open_checkpoint(tmp_path).sources[0]
    for name, weight in theirs.items():
        torch.testing.assert_close(source.read(f"model.{name}").float(), weight, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("family", "changes", "settings"),
    [
        ("qwen2", {}, {"pooling_type": 4}),
        ("qwen3", {"head_dim": 32}, {"attention.key_length": 32, "rope.dimension_count": 32}),
        ("llama", {"attention_bias": True}, {"classifier.output_labels": ["reward"]}),
        ("llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 16384}, {}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
         {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    ],
)  # fmt: skip
def test_families_and_positions(family: str, changes: dict, settings: dict, tmp_path: Path) -> None:
    model = plain_model(family, **changes)
    model.load_state_dict(write(tmp_path / "model.gguf", model, MIXES["Q8_0"], **settings))
    found = lightrm.load(tmp_path / "model.gguf", scheme="fp32").score_ids(IDS)
    np.testing.assert_allclose(found, scores(model), rtol=1e-4, atol=1e-4)


def test_a_head_whose_axis_llama_cpp_dropped(tmp_path: Path) -> None:
    """Its quantizer writes a matrix of one row as a list."""
    model = plain_model()
    model.load_state_dict(write(tmp_path / "model.gguf", model, MIXES["Q8_0"]))
    content = (tmp_path / "model.gguf").read_bytes()
    name = b"cls.output.weight"
    at = content.index(name) + len(name)
    assert content[at : at + 4] == (2).to_bytes(4, "little")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    shorter = (
        content[:at] + (1).to_bytes(4, "little") + content[at + 4 : at + 12] + content[at + 20 : reader.data_offset]
    )
    padded = shorter + b"\0" * (reader.data_offset - len(shorter))
    (tmp_path / "model.gguf").write_bytes(padded + content[reader.data_offset :])
    found = lightrm.load(tmp_path, scheme="fp32").score_ids(IDS)
    np.testing.assert_allclose(found, scores(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"expert_count": 8}, errors.UnsupportedModelError, "llama.expert_count .8."),
        ({"attention.causal": False}, errors.UnsupportedModelError, "llama.attention.causal"),
        ({"final_logit_softcapping": 30.0}, errors.UnsupportedModelError, "softcapping"),
        ({"pooling_type": 1}, errors.UnsupportedModelError, "pooling_type 1 does not read the last token"),
        ({"rope.dimension_count": 32}, errors.UnsupportedModelError, "rope.dimension_count is 32"),
        ({"rope.scaling.type": "ntk", "rope.scaling.factor": 2.0}, errors.UnsupportedModelError, "'ntk'"),
        ({"embedding_length": None}, errors.ConfigError, "llama.embedding_length is missing"),
        ({"block_count": 3}, errors.TensorMismatchError, "num_hidden_layers is 3, the weights hold 2"),
        ({"attention.head_count_kv": [2, 1]}, errors.UnsupportedModelError, "differs from layer to layer"),
        ({"attention.head_count": "four"}, errors.ConfigError, "num_attention_heads"),
        ({"classifier.output_labels": ["yes", "no"]}, errors.TensorMismatchError, "score.weight has 1 rows"),
    ],
)
def test_other_models_are_refused_by_name(settings: dict, error: type[Exception], says: str, tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", plain_model(), MIXES["Q8_0"], **settings)
    with pytest.raises(error, match=says):
        lightrm.load(tmp_path / "model.gguf")


def test_inspect_and_plan(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for mix, told, takes in (("Q4_0", "run under w4a16", "w4a16"), ("Q8_0", "widened while loading", "fp32")):
        write(path, plain_model(), MIXES[mix])
        assert told in " ".join(CliRunner().invoke(main, ["inspect", str(path)]).output.split())
        assert f"auto takes {takes}" in CliRunner().invoke(main, ["plan", str(path)]).output


def test_folders(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        write(tmp_path / name, plain_model(), MIXES["Q8_0"])
    with pytest.raises(errors.CheckpointError, match=r"holds 2 models, a\.gguf, b\.gguf: pass the path of one"):
        lightrm.load(tmp_path)
    (tmp_path / "c.gguf").write_bytes((tmp_path / "a.gguf").read_bytes().replace(b"cls.output.", b"cls.other_."))
    with pytest.raises(errors.MissingHeadError, match="no value head"):
        lightrm.load(tmp_path / "c.gguf")


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(path, plain_model(hidden_size=32, intermediate_size=32, num_hidden_layers=1), MIXES["Q4_0"])
    content = path.read_bytes()
    for keep in (0, 3, 8, 20, 100, 1000, 3000, len(content) - 1):
        path.write_bytes(content[:keep])
        with pytest.raises(errors.CorruptFileError, match=r"model\.gguf"):
            lightrm.load(path)
    path.write_bytes(b"GGUF" + (1).to_bytes(4, "little") + content[8:])
    with pytest.raises(errors.UnsupportedModelError, match="GGUF version 1"):
        lightrm.load(path)
    for at in range(0, 1800, 11):  # no damage of the header ends in anything but an error of ours, or in scores
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
        try:
            lightrm.load(path, scheme="fp32")
        except lightrm.LightRMError as error:
            assert str(tmp_path) in str(error)  # noqa: PT017
