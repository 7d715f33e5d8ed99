"""config.json -> Architecture, field by field, with types and bounds. An error names the bad field or the foreign
model.

`config_fields` says which other fields a config may have, and at which values.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lightrm.architecture import Alibi, Architecture, Rope
from lightrm.errors import ConfigError, UnsupportedModelError
from lightrm.files import read_json

LLAMA_LIKE = ("llama", "mistral", "qwen2")
SUPPORTED = (*LLAMA_LIKE, "internlm2", "baichuan")
LARGEST = 2**31 - 1  # of a count: no published model is near it, and what follows from it stays a number
MISTRAL_WINDOW = QWEN2_WINDOW = 4096  # transformers' defaults, where config.json is silent
QWEN2_FIRST_WINDOWS = 28


class Config:
    """A config.json with typed access to its fields. raw: the whole object."""

    def __init__(self, raw: dict[str, Any], path: Path) -> None:
        self.raw, self.path = raw, path

    def number(self, name: str, default: float | None = None, positive: bool = False) -> float:
        """Return a number. Raises ConfigError unless it is finite, and above 0 if `positive`."""
        value = self.raw.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{self.path}: field {name!r} must be a number, found {shown(value)}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number) or (positive and number <= 0):
            kind = "a finite number above 0" if positive else "a finite number"
            raise ConfigError(f"{self.path}: field {name!r} must be {kind}, found {shown(value)}")
        return number

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.raw.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ConfigError(f"{self.path}: field {name!r} must be a positive whole number, found {shown(value)}")
        if value > LARGEST:
            raise ConfigError(f"{self.path}: field {name!r} is {shown(value)}, more than any model has: is it damaged?")
        return value

    def token_id(self, name: str) -> int | None:
        """Return a token id, None if there is none; old conversions write -1 for that."""
        value = self.raw.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ConfigError(f"{self.path}: field {name!r} must be a token id or null, found {shown(value)}")
        return value if value is not None and value >= 0 else None

    def flag(self, name: str) -> bool:
        """Return true or false; a missing field is false."""
        value = self.raw.get(name)
        value = False if value is None else value
        if not isinstance(value, bool):
            raise ConfigError(f"{self.path}: field {name!r} must be true or false, found {shown(value)}")
        return value

    def text(self, name: str) -> str:
        value = self.raw.get(name)
        if not isinstance(value, str):
            raise ConfigError(f"{self.path}: field {name!r} must be a string, found {shown(value)}")
        return value

    def entries(self, name: str) -> dict[str, Any]:
        """Return an object, an empty one if the field is missing."""
        value = self.raw.get(name)
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{self.path}: field {name!r} must be an object, found {shown(value)}")
        return value or {}

    def has(self, name: str) -> bool:
        return self.raw.get(name) is not None

    @property
    def classes(self) -> str:
        """The `architectures` entry as one string."""
        names = self.raw.get("architectures") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"{self.path}: field 'architectures' must be a list of class names, found {shown(names)}")
        return " ".join(names)


def shown(value: object) -> str:
    """Return a value for a message, shortened: it may be a number of a thousand digits."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def read_config(folder: Path, name: str = "config.json") -> Config:
    """Read a config. Raises ConfigError if the file is missing, not JSON, or not an object."""
    path = folder / name
    if not path.is_file():
        raise ConfigError(f"{folder} has no {name}: a checkpoint folder needs one beside its weights")
    return Config(read_json(path, ConfigError), path)


def read_architecture(config: Config) -> Architecture:
    """Return the architecture. Raises ConfigError on a bad field, UnsupportedModelError on a model that lightrm cannot
    run."""
    family = config.text("model_type")
    if family not in SUPPORTED:
        raise UnsupportedModelError(
            f"{config.path}: model_type {family!r} ({config.classes or 'no architectures entry'}) is not supported; "
            f"lightrm runs {', '.join(SUPPORTED)}"
        )
    activation = config.raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModelError(f"{config.path}: hidden_act {shown(activation)} is not supported, expected 'silu'")
    if config.flag("mlp_bias"):
        raise UnsupportedModelError(f"{config.path}: mlp_bias is not supported")
    width, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ConfigError(f"{config.path}: {heads} attention heads cannot share {kv_heads} key/value heads evenly")
    if not config.has("head_dim") and width % heads:
        raise ConfigError(f"{config.path}: hidden_size {width} is not a multiple of {heads} attention heads")
    head_width = config.integer("head_dim", width // heads)
    positions = read_positions(config, family)
    if isinstance(positions, Rope) and head_width % 2:
        raise ConfigError(f"{config.path}: RoPE turns pairs of numbers, found attention heads of {head_width}")
    # Only these two ask for it: Qwen2 always has query, key and value biases, Mistral none.
    biased = {"llama": "attention_bias", "internlm2": "bias"}.get(family)
    llama_bias = biased is not None and config.flag(biased)
    return Architecture(
        family=family,
        layers=config.integer("num_hidden_layers"),
        width=width,
        ffn_width=config.integer("intermediate_size"),
        query_heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        vocabulary=config.integer("vocab_size"),
        norm_eps=config.number("rms_norm_eps", positive=True),
        positions=positions,
        max_positions=read_max_positions(config, family),
        qkv_bias=family == "qwen2" or llama_bias,
        output_bias=llama_bias,
    )


def read_max_positions(config: Config, family: str) -> int:
    longest = config.integer("max_position_embeddings" if config.has("max_position_embeddings") else "model_max_length")
    window = read_window(config, family)
    return longest if window is None else min(longest, window)  # inside one window, it is plain attention


def read_window(config: Config, family: str) -> int | None:
    """Return how many positions a layer attends to, if any layer has such a limit."""
    if family == "mistral":
        absent = "sliding_window" not in config.raw
        return config.integer("sliding_window", MISTRAL_WINDOW) if absent or config.has("sliding_window") else None
    if family != "qwen2":
        return None
    types = config.raw.get("layer_types")
    if types is None:
        first = config.raw.get("max_window_layers")
        first = QWEN2_FIRST_WINDOWS if first is None else first
        if isinstance(first, bool) or not isinstance(first, int):
            raise ConfigError(f"{config.path}: field 'max_window_layers' must be a whole number, found {shown(first)}")
        slides = config.flag("use_sliding_window") and first < config.integer("num_hidden_layers")
    elif not isinstance(types, list) or not set(map(str, types)) <= {"full_attention", "sliding_attention"}:
        raise UnsupportedModelError(
            f"{config.path}: layer_types {shown(types)}: lightrm runs full_attention and sliding_attention"
        )
    else:
        slides = "sliding_attention" in types
    return config.integer("sliding_window", QWEN2_WINDOW) if slides else None


def read_positions(config: Config, family: str) -> Rope | Alibi:
    """Return the position scheme. Baichuan names its RoPE and ALiBi models alike: the configs of the 7B models have
    max_position_embeddings, those of the 13B models do not."""
    if family == "baichuan":
        if not config.has("max_position_embeddings") and config.has("model_max_length"):
            return Alibi()
        if not config.has("max_position_embeddings"):
            raise UnsupportedModelError(
                f"{config.path}: model_type 'baichuan' with neither model_max_length (13B, ALiBi) nor "
                "max_position_embeddings (7B, RoPE): lightrm cannot tell which of the two it is"
            )
    return read_rope(config)


ROPE_FIELDS = {
    "default": (), "dynamic": ("factor",), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}  # fmt: skip
ROPE_NOTES = ("rope_type", "type", "rope_theta", "finetuned", "partial_rotary_factor")


def read_rope(config: Config) -> Rope:
    """Return RoPE's settings, from rope_theta + rope_scaling (transformers 4) or rope_parameters (transformers 5)."""
    found = [rope_of(config, name) for name in ("rope_scaling", "rope_parameters") if config.entries(name)]
    if len(found) == 2 and found[0] != found[1]:
        raise ConfigError(f"{config.path}: rope_scaling says {found[0]}, rope_parameters says {found[1]}: which is it?")
    return found[0] if found else rope_of(config, "rope_parameters")


def rope_of(config: Config, spelling: str) -> Rope:
    scaling = config.entries(spelling)
    values = Config(scaling, config.path)
    theta = values.number("rope_theta", config.number("rope_theta", 10000.0, positive=True), positive=True)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if not isinstance(kind, str) or kind not in ROPE_FIELDS:
        raise UnsupportedModelError(
            f"{config.path}: RoPE scaling {shown(kind)} is not supported; lightrm runs default, linear, llama3 and, "
            "within max_position_embeddings, dynamic"
        )
    known = (*ROPE_NOTES, *(name for names in ROPE_FIELDS.values() for name in names))
    for name, value in scaling.items():
        if (name not in known and value is not None) or (name == "partial_rotary_factor" and value not in (None, 1)):
            raise UnsupportedModelError(
                f"{config.path}: {spelling} has {name} {shown(value)}, which lightrm does not run; of RoPE "
                f"{kind!r} it reads {', '.join(('rope_theta', *ROPE_FIELDS[kind]))}"
            )
    if kind == "linear":
        return Rope(theta, "linear", values.number("factor", positive=True))
    if kind == "llama3":
        low, high = (values.number(f"{end}_freq_factor", positive=True) for end in ("low", "high"))
        if low >= high:
            raise ConfigError(f"{config.path}: low_freq_factor {low:g} must be below high_freq_factor {high:g}")
        original = values.integer("original_max_position_embeddings")
        return Rope(theta, "llama3", values.number("factor", positive=True), low, high, original)
    return Rope(theta)  # dynamic NTK scaling acts beyond max_position_embeddings only, where lightrm does not go
