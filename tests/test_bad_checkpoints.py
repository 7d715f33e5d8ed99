"""Broken, foreign and hostile folders: each refused with what was found, what was expected, and what to do."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

import lightrm
from lightrm import errors
from tests.zoo import HEAD_WEIGHT, LLAMA_CONFIG, Specimen, llama_weights, sharded, write_weights

WEIGHTS = llama_weights() | {"value_head.weight": HEAD_WEIGHT}


def write(folder: Path, weights=WEIGHTS, config=LLAMA_CONFIG, name: str = "model.safetensors") -> Path:
    return Specimen({name: weights}, config).write(folder)


def without(*names: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in WEIGHTS.items() if name not in names}


def test_no_head(tmp_path: Path) -> None:
    body = without("value_head.weight") | {"lm_head.weight": torch.ones(96, 32)}
    with pytest.raises(errors.MissingHeadError, match=r"no value head among .*Expected one of: .*value_head\.bin"):
        lightrm.load(write(tmp_path, body))


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    body = without("model.layers.1.mlp.up_proj.weight", "model.norm.weight")
    with pytest.raises(
        errors.TensorMismatchError, match=r"2 tensors are missing: final_norm.weight, layers.1.up.weight"
    ):
        lightrm.load(write(tmp_path, body))


@pytest.mark.parametrize("name", ["model.layers.0.mlp.experts.3.weight", "model.layers.9.mlp.up_proj.weight"])
def test_unexpected_tensors_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(errors.TensorMismatchError, match=name):
        lightrm.load(write(tmp_path, WEIGHTS | {name: torch.ones(48, 32)}))


def test_biases_the_config_denies(tmp_path: Path) -> None:
    with pytest.raises(errors.TensorMismatchError, match=r"q_proj\.bias"):
        lightrm.load(write(tmp_path, WEIGHTS | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}))


def test_wrong_shape(tmp_path: Path) -> None:
    with pytest.raises(errors.TensorMismatchError, match=r"down_proj\.weight has shape \(32, 47\).* \(32, 48\)"):
        lightrm.load(write(tmp_path, WEIGHTS | {"model.layers.1.mlp.down_proj.weight": torch.ones(32, 47)}))


def test_wrong_head_shape(tmp_path: Path) -> None:
    with pytest.raises(errors.TensorMismatchError, match=r"value_head.weight has shape \(1, 31\)"):
        lightrm.load(write(tmp_path, WEIGHTS | {"value_head.weight": torch.ones(1, 31)}))


@pytest.mark.parametrize("keep", [0, 1, 100, 20000])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_truncated_files(name: str, keep: int, tmp_path: Path) -> None:
    path = write(tmp_path, name=name) / name
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(errors.CorruptFileError, match=name):
        lightrm.load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b"<html>", b"\xff\xfe"])
def test_files_that_are_something_else(name: str, content: bytes, tmp_path: Path) -> None:
    (write(tmp_path, name=name) / name).write_bytes(content * 100)
    with pytest.raises(errors.CorruptFileError, match=r"copy or download it again|not a PyTorch file|git lfs pull"):
        lightrm.load(tmp_path)


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_shard_missing(kind: str, tmp_path: Path) -> None:
    files, index = sharded(WEIGHTS, kind)
    folder = Specimen(files, LLAMA_CONFIG, extra=index).write(tmp_path)
    sorted(folder.glob(f"*-00002-of-*.{kind}"))[0].unlink()
    with pytest.raises(
        errors.TensorMismatchError, match=r"2 shards, missing are .*-00002-of-00002.*finish the download"
    ):
        lightrm.load(folder)


def test_index_promises_more_than_the_shards_hold(tmp_path: Path) -> None:
    files, index = sharded(WEIGHTS, "bin")
    index["pytorch_model.bin.index.json"]["weight_map"]["model.layers.0.extra.weight"] = (
        "pytorch_model-00001-of-00002.bin"
    )
    with pytest.raises(errors.TensorMismatchError, match=r"promises 1 tensors.*extra.weight"):
        lightrm.load(Specimen(files, LLAMA_CONFIG, extra=index).write(tmp_path))


def test_index_may_not_point_outside_its_folder(tmp_path: Path) -> None:
    write_weights(tmp_path / "secret.bin", WEIGHTS)
    index = {"weight_map": dict.fromkeys(WEIGHTS, "../secret.bin")}
    folder = Specimen({}, LLAMA_CONFIG, extra={"pytorch_model.bin.index.json": index}).write(tmp_path / "model")
    with pytest.raises(errors.CorruptFileError, match="outside its folder"):
        lightrm.load(folder)


class Payload:
    def __reduce__(self) -> tuple:
        return (print, ("code ran",))


@pytest.mark.parametrize("protocol", ["zip", "legacy"])
def test_a_pickle_that_runs_code_is_refused(protocol: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, name="pytorch_model.bin") / "pytorch_model.bin"
    hostile = {**WEIGHTS, "extra": Payload()}
    torch.save(hostile, path, _use_new_zipfile_serialization=protocol == "zip")
    with pytest.raises(errors.UnsafePickleError, match=r"more than plain tensors.*print") as caught:
        lightrm.load(tmp_path)
    assert "weights_only" not in str(caught.value), "no advice to load it unsafely"
    assert "code ran" not in capsys.readouterr().out


def test_a_bare_pickle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (write(tmp_path, name="pytorch_model.bin") / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(lightrm.CheckpointError, match=r"pytorch_model\.bin"):
        lightrm.load(tmp_path)
    assert "code ran" not in capsys.readouterr().out


def test_legacy_pickles_of_tensors_load(tmp_path: Path) -> None:
    write(tmp_path / "new", name="pytorch_model.bin")
    write(tmp_path / "old", name="pytorch_model.bin")
    torch.save(WEIGHTS, tmp_path / "old" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    ids = [[3, 4, 5]]
    assert lightrm.load(tmp_path / "old").score_ids(ids) == lightrm.load(tmp_path / "new").score_ids(ids)


def test_nan_in_weights_names_the_tensor(tmp_path: Path) -> None:
    bad = WEIGHTS["model.layers.1.mlp.up_proj.weight"].clone()
    bad[3, 4] = float("nan")
    with pytest.raises(lightrm.NumericsError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds 1 NaN"):
        lightrm.load(write(tmp_path, WEIGHTS | {"model.layers.1.mlp.up_proj.weight": bad}))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"model_type": "gpt_neox"}, errors.UnsupportedModelError, "'gpt_neox'.*lightrm runs llama"),
        ({"hidden_act": "gelu"}, errors.UnsupportedModelError, "hidden_act 'gelu'"),
        ({"mlp_bias": True}, errors.TensorMismatchError, "down.bias"),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, errors.UnsupportedModelError, "'ntk'"),
        ({"hidden_size": None}, errors.ConfigError, "'hidden_size' must be a positive whole number, found None"),
        ({"num_hidden_layers": "two"}, errors.ConfigError, "'num_hidden_layers'"),
        ({"rms_norm_eps": "small"}, errors.ConfigError, "'rms_norm_eps' must be a number"),
        ({"num_key_value_heads": 3}, errors.ConfigError, "4 attention heads cannot share 3"),
        ({"model_type": "baichuan", "max_position_embeddings": None}, errors.UnsupportedModelError, "tell which"),
        ({"model_type": None}, errors.ConfigError, "'model_type' must be a string"),
    ],
)
def test_configs(change: dict, error: type[Exception], says: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=says):
        lightrm.load(write(tmp_path, config={**LLAMA_CONFIG, **change}))


def test_baichuan_7b_is_told_from_13b_and_runs_with_rope(tmp_path: Path) -> None:
    """Baichuan-7B shares the model_type, has W_pack too, but rotary positions: the config's field decides."""
    body = dict(WEIGHTS)
    for i in range(2):
        prefix = f"model.layers.{i}.self_attn."
        parts = [body.pop(f"{prefix}{p}_proj.weight") for p in "qkv"]
        body[f"{prefix}W_pack.weight"] = torch.cat([parts[0], *(p.repeat(2, 1) for p in parts[1:])])
    config = {**LLAMA_CONFIG, "model_type": "baichuan", "num_key_value_heads": 4}
    rope = lightrm.load(write(tmp_path / "7b", body, config))
    assert "RoPE" in repr(rope)
    config = {**config, "max_position_embeddings": None, "model_max_length": 256}
    alibi = lightrm.load(write(tmp_path / "13b", body, config))
    assert "ALiBi" in repr(alibi)
    assert rope.score_ids([[3, 4, 5]]) != alibi.score_ids([[3, 4, 5]])


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_unreadable_config(text: str, tmp_path: Path) -> None:
    (write(tmp_path) / "config.json").write_text(text)
    with pytest.raises(errors.ConfigError, match=r"config\.json"):
        lightrm.load(tmp_path)


def test_empty_and_absent_folders(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match=r"has no config\.json"):
        lightrm.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    with pytest.raises(errors.CheckpointError, match=r"holds no weights: expected .*; found config\.json"):
        lightrm.load(tmp_path)
    with pytest.raises(errors.CheckpointError, match="neither a folder on this machine nor a hub id"):
        lightrm.load(tmp_path / "gone")
    with pytest.raises(errors.CheckpointError, match="is a file: pass the folder"):
        lightrm.load(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("scheme", "device", "says"),
    [
        ("w9a9", "cpu", "no scheme 'w9a9'"),
        ("fp16", "cpu", "fp16 on a CPU"),
        ("auto", "tpu", "device"),
        ("auto", "meta", "not supported"),
    ],
)
def test_schemes_and_devices(scheme: str, device: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(lightrm.SchemeError, match=says):
        lightrm.load(write(tmp_path), scheme=scheme, device=device)


@pytest.mark.parametrize("change", [{"fan_in_fan_out": True}, {"peft_type": "IA3"}])
def test_adapters_that_are_not_plain_lora(change: dict, tmp_path: Path) -> None:
    config = {"lora_alpha": 8, "base_model_name_or_path": "base", **change}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(errors.UnsupportedModelError, match=r"fan_in_fan_out|IA3"):
        lightrm.load(tmp_path)
