"""Mistral: LLaMA with one sliding window in all layers, where the config has one."""

from __future__ import annotations

from dataclasses import replace

from lightrm.architecture import Architecture
from lightrm.checkpoints.config import Config
from lightrm.checkpoints.families.family import Family, decoder, silu
from lightrm.checkpoints.rope_config import read_rope

WINDOW = 4096  # transformers' default, where config.json is silent; null means none


def architecture(config: Config) -> Architecture:
    silu(config)
    plain = decoder(config, read_rope(config))
    if "sliding_window" in config.raw and not config.has("sliding_window"):
        return plain
    return replace(plain, windows=(config.integer("sliding_window", WINDOW),) * plain.layers)


FAMILY = Family("mistral", architecture, reads=("sliding_window",))
