"""What all families share: the fields that each decoder has, sliding windows, activations.

`decoder` reads the fields that mean the same everywhere. A family replaces what is different in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lightrm.architecture import Alibi, Architecture, Rope, YarnScaling
from lightrm.checkpoints.config import Config, shown
from lightrm.checkpoints.rope_config import read_head_width
from lightrm.errors import ConfigError, UnsupportedModelError

MOST_LAYERS = 2**12
FULL, SLIDING = "full_attention", "sliding_attention"
GELU_TANH = ("gelu_pytorch_tanh", "gelu_tanh")


@dataclass(frozen=True, slots=True)
class Family:
    """One model_type. reads: the fields of config.json that only such families read. architecture: reads them all.

    names: parts of tensor names that mean something else here than in LLaMA, with the name to read them under.
    """

    model_type: str
    architecture: Callable[[Config], Architecture]
    reads: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)

    def spelled(self, name: str) -> str:
        """Return a tensor's name as the layouts know it."""
        for theirs, known in self.names.items():
            name = name.replace(f".{theirs}.", f".{known}.")
        return name


def decoder(
    config: Config,
    positions: Rope | Alibi,
    activation: Literal["silu", "gelu_tanh"] = "silu",
    head_width: int | None = None,
) -> Architecture:
    """Return what the fields say that all families have. head_width: where the config is silent, None to divide the
    width among the heads. Raises ConfigError on a bad field."""
    width, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ConfigError(f"{config.path}: {heads} attention heads cannot share {kv_heads} key/value heads evenly")
    head_width = read_head_width(config) if head_width is None else config.integer("head_dim", head_width)
    if isinstance(positions, Rope) and positions.turned(head_width) % 2:
        raise ConfigError(
            f"{config.path}: RoPE turns pairs of numbers, found attention heads of {head_width}, of which "
            f"{positions.turned(head_width)} turn"
        )
    return Architecture(
        family=config.text("model_type"),
        layers=read_layers(config),
        width=width,
        ffn_width=config.integer("intermediate_size"),
        query_heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        vocabulary=config.integer("vocab_size"),
        norm_eps=config.number("rms_norm_eps", positive=True),
        positions=positions,
        max_positions=read_max_positions(config, positions),
        activation=activation,
    )


def read_max_positions(config: Config, positions: Rope | Alibi) -> int:
    """Return the positions that a sequence may have. Configs that ask for YaRN often name those before scaling."""
    longest = config.integer("max_position_embeddings" if config.has("max_position_embeddings") else "model_max_length")
    if isinstance(positions, Rope) and isinstance(scaling := positions.scaling, YarnScaling):
        return max(longest, int(scaling.factor * scaling.original_positions))
    return longest


def read_layers(config: Config) -> int:
    layers = config.integer("num_hidden_layers")
    if layers > MOST_LAYERS:
        raise ConfigError(f"{config.path}: num_hidden_layers is {layers}, more than any model has: is it damaged?")
    return layers


def check_activation(config: Config, names: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    """Raise UnsupportedModelError if one of the fields `names` has another value than those allowed."""
    for name in names:
        value = config.raw.get(name)
        if value is not None and value not in allowed:
            raise UnsupportedModelError(
                f"{config.path}: {name} {shown(value)} is not supported, expected {' or '.join(map(repr, allowed))}"
            )


def silu(config: Config) -> None:
    check_activation(config, ("hidden_act",), ("silu", "swish"))


def windows_by_type(config: Config, types: list[str], window: int) -> tuple[int | None, ...]:
    """Return each layer's window from its type; no windows if no layer has one."""
    found = tuple(window if kind == SLIDING else None for kind in types)
    return found if any(found) else ()


def read_window(config: Config, default: int) -> int:
    """Return how many positions a layer with a window sees. Raises UnsupportedModelError if the config says that there
    is no window, and yet that layers have one."""
    if "sliding_window" in config.raw and not config.has("sliding_window"):
        raise UnsupportedModelError(f"{config.path}: sliding_window is null, but the config gives layers a window")
    return config.integer("sliding_window", default)


def layer_types(config: Config) -> list[str] | None:
    """Return the field of that name, one entry for each layer; None if it is missing. Raises ConfigError or
    UnsupportedModelError."""
    types: Any = config.raw.get("layer_types")
    if types is None:
        return None
    if not isinstance(types, list) or not all(isinstance(kind, str) and kind in (FULL, SLIDING) for kind in types):
        raise UnsupportedModelError(f"{config.path}: layer_types {shown(types)}: lightrm runs {FULL} and {SLIDING}")
    if len(types) != (layers := read_layers(config)):
        raise ConfigError(f"{config.path}: layer_types has {len(types)} entries for {layers} layers")
    return types
