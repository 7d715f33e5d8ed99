"""Heads that give another number of outputs than one: refused as what they are, whoever says so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import lightrm
from lightrm import errors
from tests.zoo import HEAD_WEIGHT, LLAMA_CONFIG, Specimen, llama_weights, write_tokenizer

WEIGHTS = llama_weights()
TWO = {"0": "negative", "1": "positive"}
CLASSIFIER = {**LLAMA_CONFIG, "architectures": ["LlamaForSequenceClassification"], "pad_token_id": 0}


def rows(count: int) -> torch.Tensor:
    return HEAD_WEIGHT.repeat(count, 1)


def opened(path: Path, config: dict[str, object], **head: torch.Tensor) -> lightrm.RewardModel:
    named = {name.replace("__", "."): tensor for name, tensor in head.items()}
    return lightrm.load(Specimen({"model.safetensors": WEIGHTS | named}, config).write(path))


@pytest.mark.parametrize(
    ("more", "count", "names"),
    [
        ({"id2label": TWO}, 2, ("negative", "positive")),
        ({"num_labels": 2}, 2, ("LABEL_0", "LABEL_1")),
        ({}, 2, ("LABEL_0", "LABEL_1")),
        (
            {"id2label": {str(k): f"attribute {k}" for k in (9, *range(9))}},
            10,
            tuple(f"attribute {k}" for k in range(10)),
        ),
        ({"architectures": ["SomeForRewardModel"]}, 5, tuple(f"LABEL_{k}" for k in range(5))),
        ({"architectures": None}, 2, ("LABEL_0", "LABEL_1")),
    ],
)
def test_several_outputs_are_attributes_and_no_score(more: dict, count: int, names: tuple, tmp_path: Path) -> None:
    head = torch.randn(count, 32, generator=torch.Generator().manual_seed(4))
    rm = opened(tmp_path, {**CLASSIFIER, **more}, score__weight=head)
    assert rm.attributes == names
    for call in (lambda: rm.score_ids([[1, 2]]), lambda: list(rm.engine.scores([[1, 2]]))):
        with pytest.raises(lightrm.InputError, match=f"{count} numbers, .*{names[0]}.*{names[-1]}.*label=NAME"):
            call()
    model = transformers.LlamaModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = (model(torch.tensor([[5, 6, 7]])).last_hidden_state[0, -1] @ head.T).numpy()
    found = lightrm.load(tmp_path, scheme="fp32", label=names[1]).score_ids([[5, 6, 7]])
    np.testing.assert_allclose(found, expected[1:2], rtol=1e-4, atol=1e-5)
    weights = [k - 1.5 for k in range(count)]
    for given in (weights, dict(zip(names, weights, strict=True)), np.asarray(weights)):
        found = lightrm.load(tmp_path, scheme="fp32", weights=given).score_ids([[5, 6, 7]])
        np.testing.assert_allclose(found, [expected @ weights], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"label": "good"}, "no attribute 'good'; it has 'negative', 'positive'"),
        ({"weights": {"good": 1}}, "no attribute 'good'"),
        ({"weights": [1]}, "weights has 1 numbers, the model 2 attributes"),
        ({"weights": [1, float("nan")]}, "'positive' must be a finite number, found nan"),
        ({"weights": [1, True]}, "must be a finite number, found True"),
        ({"weights": [1, 2], "label": "positive"}, "pass label or weights, not both"),
        ({"reduce": "min"}, "reduce is for process reward models"),
    ],
)
def test_what_is_asked_of_attributes_is_checked(options: dict, says: str, tmp_path: Path) -> None:
    opened(tmp_path, {**CLASSIFIER, "id2label": TWO}, score__weight=rows(2))
    with pytest.raises(lightrm.InputError, match=says):
        lightrm.load(tmp_path, **options)


def test_a_model_with_one_output_has_no_attributes_and_no_steps(tmp_path: Path) -> None:
    rm = opened(tmp_path, CLASSIFIER, score__weight=rows(1))
    with pytest.raises(lightrm.InputError, match="no attributes"):
        rm.score_attributes("a", ["b"])
    with pytest.raises(lightrm.InputError, match="no process reward model"):
        rm.score_steps("a", ["b"])
    with pytest.raises(lightrm.InputError, match="has a single output"):
        lightrm.load(tmp_path, label="positive")


def test_attributes_by_transformers_and_in_a_quantized_folder(tmp_path: Path) -> None:
    """w8a8: an attribute's bits do not depend on the batch, and a folder that lightrm wrote gives the same."""
    torch.manual_seed(3)
    sizes = {k: v for k, v in LLAMA_CONFIG.items() if k not in ("architectures", "model_type", "vocab_size")}
    config = transformers.LlamaConfig(**sizes, vocab_size=340, id2label=dict(enumerate("abc")), pad_token_id=0)
    model = transformers.LlamaForSequenceClassification(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    rm = lightrm.load(tmp_path / "model", scheme="fp32", template="ziya")
    assert rm.attributes == ("a", "b", "c")
    texts = ["it is sunny", "warm"]
    ids = rm.encode(["what is it?"] * 2, texts)
    with torch.inference_mode():
        expected = np.concatenate([model(torch.tensor([one])).logits.numpy() for one in ids])
    found = rm.score_attributes("what is it?", texts)
    assert (found.dtype, found.shape) == (np.float32, (2, 3))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert rm.score_attributes("what is it?", []).shape == (0, 3)
    labelled = lightrm.load(tmp_path / "model", scheme="w8a8", template="ziya", label="b")
    together = labelled.score_attributes("what is it?", texts)
    alone = [labelled.score_attributes("what is it?", [text])[0] for text in texts]
    assert [one.tobytes() for one in together] == [one.tobytes() for one in alone]
    np.testing.assert_allclose(labelled.score("what is it?", texts), together[:, 1], rtol=1e-5)
    labelled.save(tmp_path / "folder")
    restored = lightrm.load(tmp_path / "folder")
    assert restored.attributes == ("a", "b", "c")
    assert restored.score_attributes("what is it?", texts).tobytes() == together.tobytes()
    with pytest.raises(lightrm.InputError, match="nobody said which is the score: 'a', 'b', 'c'"):
        restored.score("what is it?", texts)


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
    assert opened(tmp_path, LLAMA_CONFIG, **mlp).attributes == ("LABEL_0", "LABEL_1")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Qwen2ForTokenClassification", "labels every token"),
        ("Qwen2ForProcessRewardModel", "is a process reward model"),
        ("Qwen2ForPrmModel", "is a process reward model"),
        ("LlamaForRewardModelWithGating", "gating network"),
        ("Gemma2ForRewardModelWithGating", "gating network"),
        ("LDLRewardModel27B", "regression_layer.pt"),
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
