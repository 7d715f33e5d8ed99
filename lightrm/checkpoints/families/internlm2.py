"""InternLM2: LLaMA under other tensor names, see `checkpoints.internlm2_reward`, and biases if the config says so."""

from __future__ import annotations

from dataclasses import replace

from lightrm.architecture import Architecture
from lightrm.checkpoints.config import Config
from lightrm.checkpoints.families.family import Family, decoder, silu
from lightrm.checkpoints.rope_config import read_rope


def architecture(config: Config) -> Architecture:
    silu(config)
    biased = config.flag("bias")
    return replace(decoder(config, read_rope(config)), qkv_bias=biased, output_bias=biased)


FAMILY = Family("internlm2", architecture, reads=("bias",))
