"""Adapters that peft wrote, of every kind that it trains: the scores peft gives, or a refusal that says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lightrm
from lightrm import errors
from lightrm.checkpoints.adapter import first_factors
from lightrm.loading.options import LoadOptions

IDS = [[5, 9, 33, 71, 2], [1, 2], [60] * 17, list(range(3, 90))]
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "num_labels": 1, "initializer_range": 0.2,
}  # fmt: skip
Model = transformers.PreTrainedModel


def base_model(kind: str = "Qwen2") -> Model:
    """Qwen2 has biases to train."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES)
    config.pad_token_id = None
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    base_model().save_pretrained(folder)
    return folder


def trained(folder: Path, settings: dict[str, Any]) -> None:
    """An adapter that peft saves after every trainable weight has moved a little."""
    torch.manual_seed(1)
    lora = peft.LoraConfig(
        **{"task_type": "SEQ_CLS", "r": 4, "lora_alpha": 12, "target_modules": ["q_proj"], **settings}
    )
    model = peft.get_peft_model(base_model(), lora)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def theirs(folder: Path, base: Path) -> np.ndarray:
    """What peft gives for the saved adapter on the saved base, as a user would load them."""
    own = transformers.Qwen2ForSequenceClassification.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(own, folder).eval()
    with torch.inference_mode():
        return np.array([float(model(input_ids=torch.tensor([ids])).logits) for ids in IDS])


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa", "target_modules": ["q_proj", "k_proj", "down_proj", "up_proj"]},
    "pissa, ranks and alphas": {
        "init_lora_weights": "pissa", "target_modules": ["q_proj", "v_proj", "o_proj"], "use_rslora": True,
        "rank_pattern": {"v_proj": 2, r"layers\.1\.self_attn\.o_proj": 6}, "alpha_pattern": {"v_proj|o_proj": 3},
    },
    "olora": {"init_lora_weights": "olora", "target_modules": ["v_proj", "down_proj", "gate_proj"]},
    "bias: all": {"bias": "all", "target_modules": ["q_proj", "v_proj"]},
    "bias: lora_only": {"bias": "lora_only", "target_modules": ["v_proj"]},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "k_proj"]},
    "dora": {"use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    "dora, rslora, biases": {"use_dora": True, "use_rslora": True, "bias": "all", "target_modules": ["v_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["q_proj", "score"]},
    "tokens": {"trainable_token_indices": [2, 5, 60]},
    "tokens of a module": {"trainable_token_indices": {"embed_tokens": [9, 33]}, "bias": "all"},
    "modules_to_save": {"modules_to_save": ["score", "embed_tokens", "norm"]},
    "layers_to_transform": {"layers_to_transform": [1]},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_pefts(kind: str, base: Path, tmp_path: Path) -> None:
    trained(tmp_path, KINDS[kind])
    expected = theirs(tmp_path, base)
    rm = lightrm.load(tmp_path, base=base, scheme="fp32")
    np.testing.assert_allclose(rm.score_ids(IDS), expected, rtol=1e-3, atol=1e-4)
    untouched = lightrm.load(base, scheme="fp32").score_ids(IDS)
    assert np.abs(expected - untouched).max() > 0.01, "the adapter changes something"


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_what_was_taken_off_is_pefts(shape: tuple[int, int]) -> None:
    layer = torch.nn.Linear(shape[1], shape[0], bias=False)
    weight = layer.weight.detach().clone()
    for kind in ("pissa", "olora"):
        layer.weight.data = weight.clone()
        config = peft.LoraConfig(r=5, lora_alpha=15, init_lora_weights=kind, target_modules=["0"])
        model = peft.get_peft_model(torch.nn.Sequential(layer), config)
        left = model.base_model.model[0].base_layer.weight.detach()
        torch.testing.assert_close(weight - first_factors(weight, 5, kind, 3.0), left, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("save_embedding_layers", [True, False])
def test_an_embedding_saved_with_its_pair(save_embedding_layers: bool, base: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["embed_tokens"], init_lora_weights=False)
    model = peft.get_peft_model(base_model(), lora)
    model.save_pretrained(tmp_path, save_embedding_layers=save_embedding_layers)
    found = lightrm.load(tmp_path, base=base, scheme="fp32").score_ids(IDS)
    np.testing.assert_allclose(found, theirs(tmp_path, base), rtol=1e-3, atol=1e-4)


def test_a_base_in_half_precision_is_merged_in_float32(base: Path, tmp_path: Path) -> None:
    trained(tmp_path / "adapter", KINDS["pissa"])
    base_model().half().save_pretrained(tmp_path / "base")
    wide = base_model().half().float()
    wide.save_pretrained(tmp_path / "wide")
    found = lightrm.load(tmp_path / "adapter", base=tmp_path / "base", scheme="fp32").score_ids(IDS)
    np.testing.assert_allclose(found, theirs(tmp_path / "adapter", tmp_path / "wide"), rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    trained(folder, {"target_modules": ["q_proj", "v_proj"], "bias": "all"})
    return folder


def changed(adapter: Path, folder: Path, **settings: object) -> Path:
    shutil.copytree(adapter, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"init_lora_weights": "pissa_niter_16"}, "found at random"),
        ({"init_lora_weights": "corda"}, "come from its training texts"),
        ({"init_lora_weights": "lora_ga"}, "come from its first gradients"),
        ({"init_lora_weights": "loftq"}, "quantized the base"),
        ({"init_lora_weights": "something"}, "is not known"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out True"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"peft_type": "ADALORA"}, "peft_type 'ADALORA'"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"something_new": 3}, "something_new 3"),
    ],
)
def test_what_is_not_read_is_refused_by_name(
    settings: dict, says: str, adapter: Path, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(errors.UnsupportedModelError, match=f"{says}.*merge the adapter with peft"):
        lightrm.load(changed(adapter, tmp_path / "a", **settings), base=base)


def test_an_adapter_that_labels_tokens(adapter: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.UnsupportedModelError, match="'TOKEN_CLS' labels every token"):
        lightrm.load(changed(adapter, tmp_path / "a", task_type="TOKEN_CLS"), base=base)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"use_dora": True}, errors.TensorMismatchError, "0 of 4 pairs have DoRA's lengths"),
        ({"r": 8}, errors.TensorMismatchError, "rank 8 for .*_proj, the file's pair has 4"),
        ({"rank_pattern": {"q_proj": 2}}, errors.TensorMismatchError, "rank 2 for .*q_proj"),
        ({"rank_pattern": {"q_proj(": 2}}, errors.ConfigError, "cannot be read"),
        ({"rank_pattern": {"([a-z._0-9]+)+!": 2}}, errors.ConfigError, "repeats a group"),
        ({"alpha_pattern": {".*" * 9 + "!": 2}}, errors.ConfigError, "more than 4 times"),
        ({"alpha_pattern": {"q_proj": "much"}}, errors.ConfigError, "alpha_pattern"),
        ({"lora_alpha": float("nan")}, errors.ConfigError, "lora_alpha"),
        ({"alpha_pattern": [1]}, errors.ConfigError, "alpha_pattern"),
    ],
)
def test_settings_that_do_not_fit(
    settings: dict, error: type, says: str, adapter: Path, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        lightrm.load(changed(adapter, tmp_path / "a", **settings), base=base)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda name: name.replace("lora_A", "lora_E"), "is not a plain LoRA pair"),
        (lambda name: None if "lora_B" in name else name, "only one half"),
        (lambda name: name.replace("q_proj.lora", "other_proj.lora"), "which the base does not have"),
        (lambda name: name.replace("q_proj.base_layer.bias", "q_proj.strange"), "no place for"),
    ],
)
def test_tensors_that_do_not_fit(change: Callable, says: str, adapter: Path, base: Path, tmp_path: Path) -> None:
    folder = changed(adapter, tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    named = {change(name): tensor for name, tensor in load_file(path).items()}
    save_file({name: tensor for name, tensor in named.items() if name is not None}, path)
    with pytest.raises(errors.CheckpointError, match=says):
        lightrm.load(folder, base=base)


def test_a_pair_of_an_output_layer_that_a_scorer_leaves_out(adapter: Path, base: Path, tmp_path: Path) -> None:
    """target_modules of everything, on a base whose output layer is tied and in no file."""
    folder = changed(adapter, tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    pair = {"lora_A": torch.ones(4, 32), "lora_B": torch.ones(96, 4)}
    more = {f"base_model.model.lm_head.{part}.weight": tensor for part, tensor in pair.items()}
    save_file(load_file(path) | more, path)
    expected = lightrm.load(adapter, base=base).score_ids(IDS)
    np.testing.assert_array_equal(lightrm.load(folder, base=base).score_ids(IDS), expected)


def test_an_adapters_own_config_describes_its_base(adapter: Path, base: Path, tmp_path: Path) -> None:
    own = json.loads((base / "config.json").read_text())
    folder = changed(adapter, tmp_path / "a")
    (folder / "config.json").write_text(json.dumps(own))
    expected = lightrm.load(adapter, base=base).score_ids(IDS)
    np.testing.assert_array_equal(lightrm.load(folder, base=base).score_ids(IDS), expected)
    (folder / "config.json").write_text(json.dumps({**own, "rms_norm_eps": 1e-3}))
    with pytest.raises(errors.ConfigError, match="one of them is another model's"):
        lightrm.load(folder, base=base)


def test_inspect_tells_what_is_taken_off(base: Path, tmp_path: Path) -> None:
    from lightrm.checkpoints.hub_headers import Outline
    from lightrm.cli.looking import describe

    trained(tmp_path / "a", KINDS["pissa"])
    changed(tmp_path / "a", tmp_path / "b", base_model_name_or_path=str(base))
    told = dict(describe(Outline(tmp_path / "b"), LoadOptions()))
    assert "whose pissa factors are taken off" in told["adapter"]


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_half_a_pair_that_is_no_matrix(half: str, adapter: Path, base: Path, tmp_path: Path) -> None:
    folder = changed(adapter, tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if half in name)
    save_file(tensors | {name: tensors[name].reshape(-1)}, path)
    with pytest.raises(errors.TensorMismatchError, match=f"{half}.*expected a matrix"):
        lightrm.load(folder, base=base)
