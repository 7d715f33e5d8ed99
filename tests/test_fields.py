"""Fields of config.json: each is read, or known to change nothing, or refused by name."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import lightrm
from lightrm import errors
from lightrm.architecture import Rope
from lightrm.checkpoints.config import Config, read_config
from lightrm.checkpoints.config_fields import READ, check_fields
from lightrm.checkpoints.detect import LAYOUTS, open_checkpoint
from lightrm.checkpoints.families import FAMILIES, read_architecture
from lightrm.model.positions import inverse_frequencies
from tests.zoo import HEAD_WEIGHT, LLAMA_CONFIG, Specimen, llama_weights, specimens

WEIGHTS = llama_weights() | {"score.weight": HEAD_WEIGHT}
CONFIG = {**LLAMA_CONFIG, "architectures": ["LlamaForSequenceClassification"], "pad_token_id": 0}
HERE = Path("config.json")


def folder_of(path: Path, **more: object) -> Path:
    return Specimen({"model.safetensors": WEIGHTS}, {**CONFIG, **more}).write(path)


@pytest.mark.parametrize(
    "more",
    [
        {"partial_rotary_factor": 0.5},
        {"rotary_pct": 0.25},
        {"is_causal": False},
        {"sliding_window": 8},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"per_layer_config": {"0": {"num_attention_heads": 2}}},
        {"attn_logit_softcapping": 50.0},
        {"residual_multiplier": 0.5},
        {"use_rope": False},
        {"rope_local_base_freq": 10000.0},
        {"num_local_experts": 8},
        {"is_encoder_decoder": True},
        {"mean": 0.5},
        {"something_new": True},
    ],
    ids=lambda more: next(iter(more)),
)
def test_fields_that_may_change_the_model_are_refused_by_name(more: dict, tmp_path: Path) -> None:
    (name,) = more
    with pytest.raises(errors.UnsupportedModelError, match=rf"{name}.*take it out of a copy of config\.json"):
        lightrm.load(folder_of(tmp_path, **more))


HARMLESS: dict[str, Any] = {
    "partial_rotary_factor": 1.0, "is_causal": True, "sliding_window": None, "use_sliding_window": False,
    "layer_types": ["full_attention"] * 2, "pretraining_tp": 1, "attention_dropout": 0.1, "classifier_dropout": None,
    "_name_or_path": "x", "_attn_implementation_autoset": True, "auto_map": {"AutoModel": "modeling.Model"},
    "torch_dtype": "bfloat16", "transformers_version": "4.40.0", "use_cache": False, "unsloth_version": "2024.9",
    "problem_type": "regression", "pruned_heads": {}, "is_decoder": False, "tie_encoder_decoder": False,
    "add_cross_attention": False, "output_hidden_states": True, "max_length": 20, "temperature": 0.6, "label2id": {},
    "tie_word_embeddings": True, "bad_words_ids": None, "gradient_checkpointing": True, "use_something": False,
    "use_mrope": False, "use_parallel_residual": False, "no_such_bias": False, "max_sequence_length": 2048,
    "rope_scaling": None, "attention_bias": False, "sep_token_id": 3,
}  # fmt: skip


def test_what_real_configs_carry_loads(tmp_path: Path) -> None:
    plain, full = lightrm.load(folder_of(tmp_path / "plain")), lightrm.load(folder_of(tmp_path / "full", **HARMLESS))
    ids = [[5, 9, 33, 71, 2], list(range(3, 90))]
    np.testing.assert_array_equal(full.score_ids(ids), plain.score_ids(ids))
    assert "unsloth_version" in full.checkpoint.fields.harmless
    assert "attention_bias" in full.checkpoint.fields.read


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3Text", "Phi3"])
@pytest.mark.parametrize("how", ["to_dict", "to_diff_dict"])
def test_all_that_transformers_writes_is_known(kind: str, how: str) -> None:
    """Of each family with its default values, and with the generation settings that older versions wrote."""
    config = getattr(transformers, f"{kind}Config")()
    raw = json.loads(json.dumps(getattr(config, how)())) | {"model_type": config.model_type}
    generation = transformers.GenerationConfig._get_default_generation_params()
    old = {name: value for name, value in generation.items() if name not in raw}
    known = check_fields(Config(raw | old, HERE), ())
    assert {*known.read, *known.harmless} == (raw | old).keys()
    assert read_architecture(Config(raw, HERE)).layers == config.num_hidden_layers


class Recorded(dict):
    """Remembers which keys were asked for."""

    def __init__(self, raw: dict[str, Any]) -> None:
        super().__init__(raw)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)


def test_every_field_called_read_is_read() -> None:
    """Somewhere between the file and the model: a name in the list that nobody asks for would hide a change."""
    elsewhere = {"bos_token_id", "eos_token_id"}  # by the tokenizer, which takes the whole object
    for name, specimen in specimens().items():
        raw = Recorded({**specimen.config, "pad_token_id": 1, "num_labels": 1, "max_window_layers": 1})
        config = Config(raw, HERE)
        layout = next(layout for layout in LAYOUTS if layout.matches(config, set().union(*specimen.files.values())))
        read_architecture(config)
        layout.reading(config)
        layout.post(config, {})
        for field in layout.fields - {
            "normalizer_type",
            "momentum",
            "mean",
            "std",
            "var",
            "bias",
            "score_bias",
            "score_dim",
        }:
            assert field in raw.asked or (layout.appended is not None), f"{name}: {field}"
    asked: set[str] = set()
    for family in FAMILIES:
        scaling = {"type": "longrope", "factor": 2.0, **{f"{end}_factor": [1.0] * 4 for end in ("long", "short")}}
        scaling = scaling if family == "phi3" else {"type": "dynamic", "factor": 2.0}
        activation = {"hidden_act": "gelu_pytorch_tanh"} if "gemma" in family else {}
        raw = Recorded({**CONFIG, "model_type": family, "rope_scaling": scaling, "head_dim": 8, **activation})
        config = Config(raw, HERE)
        read_architecture(config)
        asked |= raw.asked
    raw = Recorded({**CONFIG, "model_type": "baichuan", "max_position_embeddings": None, "model_max_length": 64})
    read_architecture(Config(raw, HERE))
    asked |= raw.asked
    needed = {field for family in FAMILIES.values() for field in family.reads} | READ
    outside = {"pad_token_id", "num_labels", "id2label", "architectures", "torch_dtype", "dtype"}
    outside |= {"quantization_config", "compression_config"}
    assert needed - asked - elsewhere - outside == set()


@pytest.mark.parametrize(
    ("family", "more", "windows"),
    [
        ("mistral", {"sliding_window": None}, ()),
        ("mistral", {"sliding_window": 64}, (64, 64)),
        ("mistral", {}, (4096, 4096)),  # transformers' default, where nothing is said
        ("qwen2", {"sliding_window": 64, "use_sliding_window": False}, ()),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2}, ()),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}, (None, 64)),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 0}, (64, 64)),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True}, ()),
        ("qwen2", {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, ()),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "layer_types": ["full_attention"] * 2}, ()),
        (
            "qwen3",
            {"sliding_window": 64, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
            (None, 64),
        ),
        ("gemma2", {"sliding_window": 64}, (64, None)),
        ("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}, (None, 4096)),
        ("gemma3_text", {"sliding_window": 64}, (64, 64)),
        ("gemma3_text", {"sliding_window": 64, "sliding_window_pattern": 2}, (64, None)),
        ("phi3", {"sliding_window": None}, ()),
        ("phi3", {"sliding_window": 64}, (64, 64)),
    ],
)
def test_windows_are_those_that_transformers_reads(family: str, more: dict, windows: tuple[int | None, ...]) -> None:
    raw = {**CONFIG, "model_type": family, "architectures": None, **more}
    raw |= {"hidden_act": None, "hidden_activation": "gelu_pytorch_tanh"} if "gemma" in family else {}
    assert read_architecture(Config(raw, HERE)).windows == windows
    theirs = transformers.AutoConfig.for_model(**{name: value for name, value in raw.items() if name != "hidden_act"})
    types = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 2
    each = tuple(theirs.sliding_window if kind == "sliding_attention" else None for kind in types)
    assert windows == (each if any(each) else ())


@pytest.mark.parametrize(
    ("family", "more", "says"),
    [
        ("gemma2", {"sliding_window": None}, "sliding_window is null, but the config gives layers a window"),
        ("gemma3_text", {"sliding_window": None}, "sliding_window is null"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 2}, "has sliding_attention, but use_sliding_window is off"),
        ("gemma2", {"hidden_act": "silu"}, "hidden_act 'silu' is not supported, expected 'gelu_pytorch_tanh'"),
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, expected 'silu'"),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries for 2 layers"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 2}, "layer_types .*: lightrm runs full_attention and"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "a list of 4"),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4}}, "'long_factor' must be a list"),
        ("phi3", {"partial_rotary_factor": 1.5}, "a part of each head is at most 1"),
        ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": 1}}, "'truncate' must be true or false"),
    ],
)
def test_what_is_nearly_a_family_names_what_differs(family: str, more: dict, says: str) -> None:
    raw = {**CONFIG, "model_type": family, "head_dim": 8, **more}
    raw |= {"hidden_act": "gelu_pytorch_tanh"} if "gemma" in family and "hidden_act" not in more else {}
    with pytest.raises(lightrm.CheckpointError, match=says):
        _ = read_architecture(Config(raw, HERE)), check_fields(Config(raw, HERE), ())


HUGE = 10**400
NUMBERS = ["num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
           "intermediate_size", "max_position_embeddings", "rms_norm_eps", "rope_theta"]  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "value", [HUGE, -1, 0, True, float("nan"), float("inf"), -HUGE, "1", [1], {}], ids=lambda v: str(v)[:8]
)
def test_numbers_out_of_bounds_name_their_field(name: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match=name):
        read_architecture(Config({**CONFIG, name: value}, HERE))


@pytest.mark.parametrize("layers", [10**12, 10**9, 1000, 3])
def test_layers_that_the_files_do_not_hold(layers: int, tmp_path: Path) -> None:
    """At once: nothing is counted up to what config.json says."""
    folder = folder_of(tmp_path, num_hidden_layers=layers)
    with pytest.raises((errors.ConfigError, errors.TensorMismatchError), match="num_hidden_layers"):
        lightrm.load(folder)


@pytest.mark.parametrize("name", ["hidden_size", "intermediate_size", "num_attention_heads"])
def test_sizes_that_the_files_do_not_hold(name: str, tmp_path: Path) -> None:
    with pytest.raises(errors.CheckpointError):
        lightrm.load(folder_of(tmp_path, **{name: 2**30, "head_dim": 8}))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000, '{"hidden_size": ' + "9" * 5000 + "}"])
def test_json_that_is_meant_to_break_readers(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(errors.ConfigError, match=r"config\.json cannot be read as JSON"):
        read_config(tmp_path)


ODD = st.sampled_from([None, True, False, -1, 0, 1, 7, 0.5, HUGE, "", "x", [], [1], {}, {"a": 1}, 2**31, float("nan")])


FIELDS = sorted(READ | {field for family in FAMILIES.values() for field in family.reads})


@given(
    name=st.sampled_from([*FIELDS, "unheard_of"]),
    value=ODD,
    family=st.sampled_from([name for name in FAMILIES if name not in ("baichuan", "internlm2")]),
)
@settings(max_examples=150, deadline=None)
def test_any_value_of_any_field_loads_or_is_refused(name: str, value: object, family: str, shared_folder: Path) -> None:
    (shared_folder / "config.json").write_text(json.dumps({**CONFIG, "model_type": family, name: value}))
    try:
        checkpoint = open_checkpoint(shared_folder)
    except lightrm.LightRMError:
        pass  # refused: a traceback of anything else fails this test
    else:
        assert checkpoint.architecture.layers >= 1


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("any"))


@pytest.mark.parametrize(
    ("more", "error", "says"),
    [
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, errors.UnsupportedModelError,
         "rope_parameters has partial_rotary_factor 0.5"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, errors.UnsupportedModelError,
         "has full_attention"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1.0}}, errors.UnsupportedModelError, "mscale"),
        ({"rope_scaling": {"type": "linear", "factor": -2.0}}, errors.ConfigError, "'factor' must be .* above 0"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
         errors.ConfigError, "which is it"),
        ({"rope_scaling": "linear"}, errors.ConfigError, "'rope_scaling' must be an object"),
    ],
)  # fmt: skip
def test_rope_settings_are_read_to_the_last(more: dict, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        read_architecture(Config({**CONFIG, **more}, HERE))


@pytest.mark.parametrize("scaling", [{"type": "dynamic", "factor": 2.0}, {"rope_type": "default", "type": "default"},
                                     {"type": "linear", "factor": 1.0, "finetuned": True}])  # fmt: skip
def test_rope_settings_that_people_publish(scaling: dict) -> None:
    found = read_architecture(Config({**CONFIG, "rope_scaling": scaling}, HERE)).positions
    assert isinstance(found, Rope)
    turns = inverse_frequencies(found, 8)
    assert torch.equal(turns, inverse_frequencies(Rope(), 8)), "turns as without it"


def test_yarn_extends_the_positions() -> None:
    """As people write it for Qwen3: max_position_embeddings stays what it was."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 200}
    assert read_architecture(Config({**CONFIG, "rope_scaling": scaling}, HERE)).max_positions == 800
    assert read_architecture(Config({**CONFIG, "rope_scaling": scaling | {"factor": 1.0}}, HERE)).max_positions == 256


def test_a_stated_alibi_is_one_of_two(tmp_path: Path) -> None:
    with pytest.raises(lightrm.InputError, match="alibi must be 'relative' or 'absolute', found 'exact'"):
        lightrm.load(folder_of(tmp_path), alibi="exact")  # type: ignore[arg-type]


def test_time_is_bounded(tmp_path: Path) -> None:
    """A bound that no real work is near; what it guards against takes minutes, or all memory."""
    started = time.monotonic()
    with pytest.raises(lightrm.LightRMError):
        lightrm.load(folder_of(tmp_path, num_hidden_layers=2 * 10**9))
    assert time.monotonic() - started < 30
    assert torch.get_default_dtype() == torch.float32


# The keys and values of configs as they are published, sizes left to the tiny model.
PUBLISHED: dict[str, dict[str, Any]] = {
    "a Llama-3.1 reward model": {
        "_name_or_path": "models/llama",
        "architectures": ["LlamaForSequenceClassification"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "head_dim": 8,
        "id2label": {"0": "LABEL_0"},
        "initializer_range": 0.02,
        "label2id": {"LABEL_0": 0},
        "mlp_bias": False,
        "pad_token_id": 4,
        "pretraining_tp": 1,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 64,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.2",
        "use_cache": False,
    },
    "a Llama-1 conversion": {
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.02,
        "max_sequence_length": 2048,
        "pad_token_id": -1,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.27.0.dev0",
        "use_cache": True,
    },
    "a Mistral reward model": {
        "model_type": "mistral",
        "architectures": ["MistralForSequenceClassification"],
        "attention_dropout": 0.0,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    },
    "a Qwen2.5 reward model": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForRewardModel"],
        "attention_dropout": 0.0,
        "auto_map": {"AutoModel": "modeling_qwen2_rm.Qwen2ForRewardModel"},
        "max_window_layers": 2,
        "num_labels": 1,
        "rope_theta": 10000,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.42.0.dev0",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
    },
    "saved by unsloth": {
        "unsloth_fixed": True,
        "unsloth_version": "2025.3",
        "model_name": "unsloth/llama-3-8b-bnb-4bit",
    },
    "saved by transformers 5": {
        "dtype": "float32",
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "layer_types": None,
        "chunk_size_feed_forward": 0,
        "is_encoder_decoder": False,
        "output_attentions": False,
        "problem_type": None,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_as_they_are_published(name: str, tmp_path: Path) -> None:
    config = {**CONFIG, **PUBLISHED[name]}
    biases = {"q": 32, "k": 16, "v": 16} if config["model_type"] == "qwen2" else {}
    more = {
        f"model.layers.{i}.self_attn.{part}_proj.bias": torch.zeros(size)
        for i in range(2)
        for part, size in biases.items()
    }
    rm = lightrm.load(Specimen({"model.safetensors": WEIGHTS | more}, config).write(tmp_path))
    assert rm.score_ids([[5, 9, 33]]).shape == (1,)
