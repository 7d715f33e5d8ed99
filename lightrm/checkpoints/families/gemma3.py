"""Gemma 3's text models: Gemma 2 without caps, with a norm over each head of query and key; five layers with a window
to one without, and a RoPE of their own in layers with a window."""

from __future__ import annotations

from dataclasses import replace

from lightrm.architecture import Architecture, Rope
from lightrm.checkpoints.config import Config
from lightrm.checkpoints.families.family import (
    FULL,
    GELU_TANH,
    SLIDING,
    Family,
    check_activation,
    layer_types,
    read_layers,
    read_window,
    windows_by_type,
)  # fmt: skip
from lightrm.checkpoints.families.gemma import gemma
from lightrm.checkpoints.families.gemma2 import NAMES, SCORE_WIDTH, WINDOW
from lightrm.checkpoints.rope_config import rope_of, theta_of

THETA, LOCAL_THETA, PATTERN = 1e6, 1e4, 6  # transformers' defaults, where config.json is silent
READS = (
    "attention_bias", "hidden_activation", "query_pre_attn_scalar", "sliding_window", "layer_types",
    "sliding_window_pattern", "rope_local_base_freq",
)  # fmt: skip


def architecture(config: Config) -> Architecture:
    check_activation(config, ("hidden_act", "hidden_activation"), GELU_TANH)
    whole, local = positions(config)
    types = layer_types(config)
    if types is None:
        pattern = config.integer("sliding_window_pattern", PATTERN)
        types = [SLIDING if (i + 1) % pattern else FULL for i in range(read_layers(config))]
    return replace(
        gemma(config, whole),
        head_norms=True,
        post_norms=True,
        score_width=config.number("query_pre_attn_scalar", SCORE_WIDTH, positive=True),
        windows=windows_by_type(config, types, read_window(config, WINDOW)),
        local_positions=local,
    )


def positions(config: Config) -> tuple[Rope, Rope]:
    """Return the RoPE of layers without a window, and of those with one. transformers 5 writes one for each layer type,
    transformers 4 one with its scaling, and the other's theta."""
    nested = config.entries("rope_parameters")
    if FULL in nested or SLIDING in nested:
        each = Config(nested, config.path)
        return tuple(
            rope_of(config, Config(each.entries(kind), config.path), kind, theta)
            for kind, theta in ((FULL, THETA), (SLIDING, LOCAL_THETA))
        )  # type: ignore[return-value]
    scaling = "rope_scaling" if config.entries("rope_scaling") else "rope_parameters"
    whole = rope_of(config, Config(config.entries(scaling), config.path), scaling, theta_of(config, THETA))
    return whole, Rope(config.number("rope_local_base_freq", LOCAL_THETA, positive=True))


FAMILY = Family("gemma3_text", architecture, reads=READS, names=NAMES)
