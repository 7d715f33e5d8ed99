"""Phi-3 and Phi-4: LLaMA with fused matrices, a window in all layers if the config has one, LongRoPE, and in Phi-4-mini
a RoPE on a part of each head."""

from __future__ import annotations

from dataclasses import replace

from lightrm.architecture import Architecture
from lightrm.checkpoints.config import Config
from lightrm.checkpoints.families.family import Family, decoder, silu
from lightrm.checkpoints.rope_config import read_rope

OLD_NAMES = {"su": "longrope", "yarn": "longrope"}  # of its first configs, for what transformers calls longrope


def architecture(config: Config) -> Architecture:
    silu(config)
    plain = decoder(config, read_rope(config, renamed=OLD_NAMES, partial=True))
    if not config.has("sliding_window"):
        return plain
    return replace(plain, windows=(config.integer("sliding_window"),) * plain.layers)


FAMILY = Family(
    "phi3", architecture, reads=("sliding_window", "original_max_position_embeddings", "partial_rotary_factor")
)
