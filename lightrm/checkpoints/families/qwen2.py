"""Qwen2 and 2.5: LLaMA with biases of query, key and value, and windows in the later layers if the config asks for
them."""

from __future__ import annotations

from dataclasses import replace

from lightrm.architecture import Architecture
from lightrm.checkpoints.config import Config, shown
from lightrm.checkpoints.families.family import (
    FULL,
    SLIDING,
    Family,
    decoder,
    layer_types,
    read_window,
    silu,
    windows_by_type,
)  # fmt: skip
from lightrm.checkpoints.rope_config import read_rope
from lightrm.errors import ConfigError, UnsupportedModelError

WINDOW, FIRST_WINDOWS = 4096, 28  # transformers' defaults, where config.json is silent
READS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")


def architecture(config: Config) -> Architecture:
    silu(config)
    return replace(decoder(config, read_rope(config)), qkv_bias=True, windows=windows(config))


def windows(config: Config) -> tuple[int | None, ...]:
    """Return the windows of the layers: from layer_types, or those from max_window_layers on. There are none if
    use_sliding_window is off or sliding_window is null."""
    types, slides = layer_types(config), config.flag("use_sliding_window")
    if types is not None and SLIDING in types and not slides:
        raise UnsupportedModelError(f"{config.path}: layer_types has {SLIDING}, but use_sliding_window is off")
    if types is None:
        first = config.raw.get("max_window_layers")
        first = FIRST_WINDOWS if first is None else first
        if isinstance(first, bool) or not isinstance(first, int):
            raise ConfigError(f"{config.path}: field 'max_window_layers' must be a whole number, found {shown(first)}")
        slides = slides and ("sliding_window" not in config.raw or config.has("sliding_window"))
        layers = range(config.integer("num_hidden_layers"))
        types = [SLIDING if slides and i >= first else FULL for i in layers] if slides else []
    return windows_by_type(config, types, read_window(config, WINDOW) if SLIDING in types else WINDOW)


FAMILY = Family("qwen2", architecture, reads=READS)
