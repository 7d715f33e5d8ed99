"""The metadata of a GGUF file as a config.json in transformers' spelling, which `config` then reads like any other.

llama.cpp's names begin with the architecture. What it knows beside the ones below may change the model (a softcap, a
scale of the residual stream, experts), so a name that is not listed is refused, unless its value says that the part is
absent.

LLaMA 3.1's RoPE is not in the metadata: its frequencies are divided by the numbers of the tensor rope_freqs.weight.
They must be those that Meta's published constants give for some factor; any others are refused.

The score is read at the last token. llama.cpp's pooling type "rank" does the same for qwen3. For other causal models it
takes the first token, which sees nothing of the text.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from lightrm.architecture import Rope
from lightrm.checkpoints.config import Config, shown
from lightrm.checkpoints.gguf_file import GgufFile
from lightrm.errors import ConfigError, UnsupportedModelError

FAMILIES = ("llama", "qwen2", "qwen3")
PERMUTED = ("llama",)  # whose query and key rows llama.cpp reorders
FREQUENCIES = "rope_freqs.weight"
RANK, LAST = 4, 3  # llama.cpp's pooling types for a head, and for the last token
# Setting -> field of a config.json.
FIELDS = {
    "block_count": "num_hidden_layers", "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta", "attention.key_length": "head_dim",
}  # fmt: skip
OPTIONAL = ("attention.head_count_kv", "rope.freq_base", "attention.key_length")
READ = (
    *FIELDS, "vocab_size", "attention.value_length", "attention.sliding_window", "rope.dimension_count",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
    "rope.scale_linear", "pooling_type", "classifier.output_labels",
)  # fmt: skip
ABSENT: dict[str, tuple[object, ...]] = {
    "expert_count": (0,), "expert_used_count": (0,), "attention.causal": (True,), "use_parallel_residual": (False,),
    "tensor_data_layout": ("Meta AI original pth",), "logit_scale": (1.0,),
}  # fmt: skip
TOKENS = "tokenizer.ggml.tokens"
META_LOW, META_HIGH, META_POSITIONS = 1.0, 4.0, 8192  # of every published LLaMA 3.1 to 3.3


def gguf_config(file: GgufFile) -> Config:
    """Return the config of a file. Raises ConfigError on a missing or bad setting, UnsupportedModelError on what
    lightrm does not run."""
    path, settings = file.watched.path, file.settings
    family = settings.get("general.architecture")
    if settings.get("general.type", "model") != "model" or settings.get("split.count", 1) not in (0, 1):
        raise UnsupportedModelError(
            f"{path} holds {shown(settings.get('general.type', 'model'))}, one of "
            f"{shown(settings.get('split.count', 1))} parts; lightrm reads a whole model in one file: join the parts "
            "with `llama-gguf-split --merge`"
        )
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"{path}: general.architecture {shown(family)} is not supported; of GGUF files lightrm reads "
            f"{', '.join(FAMILIES)}: take the model's safetensors"
        )
    given = {
        name.removeprefix(f"{family}."): value for name, value in settings.items() if name.startswith(f"{family}.")
    }
    unread = [name for name, value in given.items() if name not in READ and not absent(name, value)]
    if unread:
        raise UnsupportedModelError(
            f"{path}: lightrm does not know the setting {family}.{unread[0]} ({shown(given[unread[0]])}), and what it "
            "does not know may change the scores: take the model's safetensors"
        )
    missing = [name for name in FIELDS if name not in given and name not in OPTIONAL]
    if missing:
        raise ConfigError(f"{path}: the setting {family}.{missing[0]} is missing")
    raw: dict[str, Any] = {"model_type": family, "hidden_act": "silu"}
    raw |= {field: plain(given[name], f"{path}: {family}.{name}") for name, field in FIELDS.items() if name in given}
    tokens = settings.get(TOKENS)
    raw["vocab_size"] = given.get("vocab_size") or (len(tokens) if isinstance(tokens, list) else None)
    if family == "llama":
        raw["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    labels = given.get("classifier.output_labels")
    if isinstance(labels, list):
        raw["id2label"] = {str(i): str(label) for i, label in enumerate(labels)}
    raw |= checked(Config(given, path), raw, family)
    scaling = rope_scaling(Config(given, path))
    if FREQUENCIES in file.tensors:
        scaling = from_frequencies(file, Config(raw, path), scaling)
    return Config(raw | ({} if scaling is None else {"rope_scaling": scaling}), path)


def absent(name: str, value: Any) -> bool:
    """Whether a setting says that a part of a model is not there."""
    return not isinstance(value, np.ndarray) and value in ABSENT.get(name, ())


def plain(value: Any, where: str) -> Any:
    """Return a setting; one that is listed for each layer must be the same for all."""
    if not isinstance(value, np.ndarray):
        return value
    if len(value) and (value == value[0]).all():
        return value[0].item()
    raise UnsupportedModelError(
        f"{where} differs from layer to layer ({shown(value.tolist())}): lightrm runs equal ones"
    )


def checked(given: Config, raw: dict[str, Any], family: str) -> dict[str, Any]:
    """Return the fields that follow from several settings. Raises UnsupportedModelError on settings that no model of
    these families has."""
    pooling = given.raw.get("pooling_type")
    if pooling not in (None, 0, LAST, RANK):
        raise UnsupportedModelError(
            f"{given.path}: {family}.pooling_type {shown(pooling)} does not read the last token; lightrm reads "
            f"{RANK} (rank) and {LAST} (last)"
        )
    config = Config(raw, given.path)
    width = config.integer("head_dim", config.integer("hidden_size") // config.integer("num_attention_heads"))
    for name in ("attention.value_length", "rope.dimension_count"):
        if given.has(name) and given.raw[name] != width:
            raise UnsupportedModelError(
                f"{given.path}: {family}.{name} is {shown(given.raw[name])}, and a head is {width} wide: lightrm runs "
                "heads that are turned as a whole"
            )
    window = given.raw.get("attention.sliding_window")
    if not window:
        return {}
    if family == "llama":  # llama.cpp's name of Mistral's models too
        return {"model_type": "mistral", "sliding_window": window}
    return {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": window}


def rope_scaling(given: Config) -> dict[str, Any] | None:
    """Return the scaling that the metadata names, in transformers' spelling; None for none."""
    kind = given.raw.get("rope.scaling.type")
    if kind is None and given.has("rope.scale_linear"):
        return {"rope_type": "linear", "factor": given.number("rope.scale_linear", positive=True)}
    if kind in (None, "none"):
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": given.raw.get("rope.scaling.factor")}
    if given.has("rope.scaling.original_context_length") and kind != "linear":
        scaling["original_max_position_embeddings"] = given.raw["rope.scaling.original_context_length"]
    return scaling


def from_frequencies(file: GgufFile, config: Config, scaling: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the scaling that the divisors of the frequencies show. Raises UnsupportedModelError on any but LLaMA
    3.1's."""
    divisors = file.read(FREQUENCIES).float().view(-1)
    factor = float(divisors.max())
    width = config.integer("head_dim", config.integer("hidden_size") // config.integer("num_attention_heads"))
    theta = config.number("rope_theta", Rope().theta, positive=True)
    if scaling is None and len(divisors) == width // 2 and math.isfinite(factor):
        if bool((divisors == 1).all()):
            return None
        if factor > 1 and torch.allclose(divisors, llama3_divisors(theta, width, factor), rtol=1e-4):
            return {
                "rope_type": "llama3", "factor": factor, "low_freq_factor": META_LOW, "high_freq_factor": META_HIGH,
                "original_max_position_embeddings": META_POSITIONS,
            }  # fmt: skip
    raise UnsupportedModelError(
        f"{config.path}: {FREQUENCIES} holds {len(divisors)} numbers up to {factor:g}, which are not LLaMA 3.1's for "
        f"heads of {width} and theta {theta:g}: take the model's safetensors"
    )


def llama3_divisors(theta: float, width: int, factor: float) -> torch.Tensor:
    """Return what LLaMA 3.1 divides its frequencies by: 1 for short waves, the factor for long ones, a smooth band
    between."""
    length = 2 * math.pi * theta ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    smooth = ((META_POSITIONS / length - META_LOW) / (META_HIGH - META_LOW)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()
