"""LLaMA 1 to 3, and everything that is published under its name."""

from __future__ import annotations

from dataclasses import replace

from lightrm.architecture import Architecture
from lightrm.checkpoints.config import Config
from lightrm.checkpoints.families.family import Family, decoder, silu
from lightrm.checkpoints.rope_config import read_rope


def architecture(config: Config) -> Architecture:
    silu(config)
    biased = config.flag("attention_bias")
    plain = decoder(config, read_rope(config))
    return replace(plain, qkv_bias=biased, output_bias=biased, mlp_bias=config.flag("mlp_bias"))


FAMILY = Family("llama", architecture, reads=("attention_bias", "mlp_bias"))
