"""config.json -> Architecture, field by field, with types. A missing field names itself; a foreign model too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightrm.architecture import Alibi, Architecture, Rope
from lightrm.errors import ConfigError, UnsupportedModelError

LLAMA_LIKE = ("llama", "mistral", "qwen2")
SUPPORTED = (*LLAMA_LIKE, "internlm2", "baichuan")


class Config:
    """A config.json with typed, named access. `raw` is the whole object."""

    def __init__(self, raw: dict[str, Any], path: Path) -> None:
        self.raw, self.path = raw, path

    def number(self, name: str, default: float | None = None) -> float:
        value = self.raw.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{self.path}: field {name!r} must be a number, found {value!r}")
        return float(value)

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.raw.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ConfigError(f"{self.path}: field {name!r} must be a positive whole number, found {value!r}")
        return value

    def flag(self, name: str) -> bool:
        return bool(self.raw.get(name, False))

    def text(self, name: str) -> str:
        value = self.raw.get(name)
        if not isinstance(value, str):
            raise ConfigError(f"{self.path}: field {name!r} must be a string, found {value!r}")
        return value

    def has(self, name: str) -> bool:
        return self.raw.get(name) is not None

    @property
    def classes(self) -> str:
        """The `architectures` entry as one string."""
        return " ".join(map(str, self.raw.get("architectures") or ()))


def read_config(folder: Path, name: str = "config.json") -> Config:
    """Raises ConfigError if the file is missing, not JSON, or not an object."""
    path = folder / name
    if not path.is_file():
        raise ConfigError(f"{folder} has no {name}: a checkpoint folder needs one beside its weights")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return Config(raw, path)


def read_architecture(config: Config) -> Architecture:
    """Raises ConfigError on a bad field, UnsupportedModelError on a model that lightrm does not run."""
    family = config.text("model_type")
    if family not in SUPPORTED:
        raise UnsupportedModelError(
            f"{config.path}: model_type {family!r} ({config.classes or 'no architectures entry'}) is not supported; "
            f"lightrm runs {', '.join(SUPPORTED)}"
        )
    activation = config.raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModelError(f"{config.path}: hidden_act {activation!r} is not supported, expected 'silu'")
    if config.flag("mlp_bias"):
        raise UnsupportedModelError(f"{config.path}: mlp_bias is not supported")
    width, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ConfigError(f"{config.path}: {heads} attention heads cannot share {kv_heads} key/value heads evenly")
    if not config.has("head_dim") and width % heads:
        raise ConfigError(f"{config.path}: hidden_size {width} is not a multiple of {heads} attention heads")
    positions = read_positions(config, family)
    llama_bias = config.flag("attention_bias") or (family == "internlm2" and config.flag("bias"))
    return Architecture(
        family=family,
        layers=config.integer("num_hidden_layers"),
        width=width,
        ffn_width=config.integer("intermediate_size"),
        query_heads=heads,
        kv_heads=kv_heads,
        head_width=config.integer("head_dim", width // heads),
        vocabulary=config.integer("vocab_size"),
        norm_eps=config.number("rms_norm_eps"),
        positions=positions,
        max_positions=read_max_positions(config, family),
        qkv_bias=family == "qwen2" or llama_bias,
        output_bias=llama_bias,
    )


def read_max_positions(config: Config, family: str) -> int:
    longest = config.integer("max_position_embeddings" if config.has("max_position_embeddings") else "model_max_length")
    window = config.raw.get("sliding_window")
    if isinstance(window, int) and (family == "mistral" or config.flag("use_sliding_window")):
        longest = min(longest, window)  # inside one window, sliding attention is plain attention
    return longest


def read_positions(config: Config, family: str) -> Rope | Alibi:
    """Baichuan names RoPE and ALiBi models alike: the 7B configs have max_position_embeddings, the 13B ones do not."""
    if family == "baichuan":
        if not config.has("max_position_embeddings") and config.has("model_max_length"):
            return Alibi()
        if not config.has("max_position_embeddings"):
            raise UnsupportedModelError(
                f"{config.path}: model_type 'baichuan' with neither model_max_length (13B, ALiBi) nor "
                "max_position_embeddings (7B, RoPE): which of the two it is cannot be told"
            )
    return read_rope(config)


def read_rope(config: Config) -> Rope:
    """Both spellings: rope_theta + rope_scaling (transformers 4) and rope_parameters (transformers 5)."""
    scaling = config.raw.get("rope_parameters") or config.raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ConfigError(f"{config.path}: rope_scaling must be an object, found {scaling!r}")
    values = Config(scaling, config.path)
    theta = values.number("rope_theta", config.number("rope_theta", 10000.0))
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind in ("default", "dynamic"):
        return Rope(theta)  # dynamic NTK scaling acts beyond max_position_embeddings only, where lightrm does not go
    if kind == "linear":
        return Rope(theta, "linear", values.number("factor"))
    if kind == "llama3":
        return Rope(
            theta,
            "llama3",
            values.number("factor"),
            values.number("low_freq_factor"),
            values.number("high_freq_factor"),
            values.integer("original_max_position_embeddings"),
        )
    raise UnsupportedModelError(
        f"{config.path}: RoPE scaling {kind!r} is not supported; lightrm runs default, linear, llama3 and, within "
        "max_position_embeddings, dynamic"
    )
