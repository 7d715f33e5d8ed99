"""Gemma 1: LLaMA with norms of 1 + w, embedded tokens times the square root of the width, GELU, and heads of 256."""

from __future__ import annotations

import math
from dataclasses import replace

from lightrm.architecture import Architecture, Rope
from lightrm.checkpoints.config import Config
from lightrm.checkpoints.families.family import GELU_TANH, Family, check_activation, decoder
from lightrm.checkpoints.rope_config import read_rope

HEAD_WIDTH = 256  # transformers' default, where config.json is silent


def architecture(config: Config) -> Architecture:
    # The first files say "gelu" and mean its approximation by tanh, which transformers runs for them.
    check_activation(config, ("hidden_act", "hidden_activation"), (*GELU_TANH, "gelu"))
    return gemma(config, read_rope(config))


def gemma(config: Config, positions: Rope) -> Architecture:
    """Return what all Gemmas have in common."""
    biased = config.flag("attention_bias")
    plain = decoder(config, positions, "gelu_tanh", HEAD_WIDTH)
    return replace(
        plain, qkv_bias=biased, output_bias=biased, norms_add_one=True, embedding_scale=math.sqrt(plain.width)
    )


FAMILY = Family("gemma", architecture, reads=("attention_bias", "hidden_activation"))
