"""Heads that give another number of outputs than one: refused as what they are, whoever says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

import lightrm
from lightrm import errors
from tests.zoo import HEAD_WEIGHT, LLAMA_CONFIG, Specimen, llama_weights

WEIGHTS = llama_weights()
TWO = {"0": "negative", "1": "positive"}
CLASSIFIER = {**LLAMA_CONFIG, "architectures": ["LlamaForSequenceClassification"], "pad_token_id": 0}


def rows(count: int) -> torch.Tensor:
    return HEAD_WEIGHT.repeat(count, 1)


def opened(path: Path, config: dict[str, object], **head: torch.Tensor) -> lightrm.RewardModel:
    named = {name.replace("__", "."): tensor for name, tensor in head.items()}
    return lightrm.load(Specimen({"model.safetensors": WEIGHTS | named}, config).write(path))


@pytest.mark.parametrize(
    ("more", "count", "says"),
    [
        ({"id2label": TWO}, 2, r"has 2 outputs \(id2label .*negative.*positive.*score.weight has 2 rows"),
        ({"num_labels": 2}, 2, "has 2 outputs .*num_labels 2"),
        ({}, 2, "has 2 outputs .*names no labels.*score.weight has 2 rows"),
        ({"id2label": {str(k): f"attribute {k}" for k in range(10)}}, 10, "has 10 outputs"),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, 2, "has 2 outputs"),
        ({"architectures": ["URMForRewardModel"]}, 5, "URMForRewardModel has 5 outputs"),
        ({"architectures": None}, 2, "this model has 2 outputs"),
    ],
)
def test_several_outputs_are_refused_by_name(more: dict, count: int, says: str, tmp_path: Path) -> None:
    with pytest.raises(errors.UnsupportedModelError, match=says):
        opened(tmp_path, {**CLASSIFIER, **more}, score__weight=rows(count))


@pytest.mark.parametrize(
    ("more", "count", "error", "says"),
    [
        ({"id2label": TWO}, 1, errors.TensorMismatchError, "id2label .*but score.weight has 1 rows"),
        ({"num_labels": 1}, 2, errors.TensorMismatchError, "num_labels 1, but score.weight has 2 rows"),
        ({"id2label": {"0": "LABEL_0"}}, 3, errors.TensorMismatchError, "but score.weight has 3 rows"),
        ({"num_labels": 1, "id2label": TWO}, 1, errors.ConfigError, "num_labels is 1, id2label has 2"),
        ({"id2label": ["good"]}, 1, errors.ConfigError, "'id2label' must be an object"),
        ({"num_labels": True}, 1, errors.ConfigError, "'num_labels'"),
    ],
)
def test_config_and_weights_must_agree(more: dict, count: int, error: type, says: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=says):
        opened(tmp_path, {**CLASSIFIER, **more}, score__weight=rows(count))


def test_the_default_labels_of_every_config_say_nothing_of_a_trainers_own_head(tmp_path: Path) -> None:
    """transformers writes two unnamed labels into the config of any language model."""
    config = {**LLAMA_CONFIG, "architectures": ["LlamaForCausalLM"], "id2label": {"0": "LABEL_0", "1": "LABEL_1"}}
    assert opened(tmp_path, config, v_head__summary__weight=HEAD_WEIGHT).score_ids([[1, 2]]).shape == (1,)


@pytest.mark.parametrize("head", ["v_head__summary__weight", "regression_head__weight", "score_head__weight"])
def test_other_heads_give_one_output_too(head: str, tmp_path: Path) -> None:
    with pytest.raises(errors.UnsupportedModelError, match=f"{head.replace('__', '.')} has 2 rows"):
        opened(tmp_path, LLAMA_CONFIG, **{head: rows(2)})


def test_an_mlps_last_layer_counts(tmp_path: Path) -> None:
    mlp = {"score__0__weight": rows(8), "score__2__weight": torch.ones(2, 8)}
    with pytest.raises(errors.UnsupportedModelError, match=r"score\.2\.weight has 2 rows"):
        opened(tmp_path, LLAMA_CONFIG, **mlp)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Qwen2ForTokenClassification", "labels every token"),
        ("Qwen2ForProcessRewardModel", "is a process reward model"),
        ("Qwen2ForPrmModel", "is a process reward model"),
        ("LlamaForRewardModelWithGating", "gating network"),
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_models_of_another_kind_are_refused_by_their_class(name: str, says: str, count: int, tmp_path: Path) -> None:
    with pytest.raises(errors.UnsupportedModelError, match=f"{name} .*{says}"):
        opened(tmp_path, {**CLASSIFIER, "architectures": [name]}, score__weight=rows(count))


def test_token_classification_by_transformers(tmp_path: Path) -> None:
    sizes = {k: v for k, v in LLAMA_CONFIG.items() if k not in ("architectures", "model_type")}
    for labels in (1, 2):
        config = transformers.LlamaConfig(**sizes, num_labels=labels)
        transformers.LlamaForTokenClassification(config).save_pretrained(tmp_path / str(labels))
        with pytest.raises(errors.UnsupportedModelError, match="labels every token"):
            lightrm.load(tmp_path / str(labels))


def test_a_bias_that_transformers_would_leave_out(tmp_path: Path) -> None:
    """A token classifier whose config calls it a sequence classifier."""
    with pytest.raises(errors.ConfigError, match=r"has no bias in its head, but the weights hold score\.bias"):
        opened(tmp_path, CLASSIFIER, score__weight=HEAD_WEIGHT, score__bias=torch.ones(1))


def test_a_quantized_folder_of_such_a_model_is_refused_too(tmp_path: Path) -> None:
    """One that an older version wrote."""
    rm = opened(tmp_path / "source", CLASSIFIER, score__weight=HEAD_WEIGHT)
    w8a8 = lightrm.load(tmp_path / "source", scheme="w8a8")
    w8a8.save(tmp_path / "native")
    path = tmp_path / "native" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "id2label": TWO}))
    assert rm.score_ids([[1, 2]]).shape == (1,)
    with pytest.raises(errors.CheckpointError):
        lightrm.load(tmp_path / "native")
