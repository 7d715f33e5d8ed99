"""Qwen3: LLaMA with a norm over each head of query and key, a head width of its own, and Qwen2's windows."""

from __future__ import annotations

from dataclasses import replace

from lightrm.architecture import Architecture
from lightrm.checkpoints.config import Config
from lightrm.checkpoints.families import qwen2
from lightrm.checkpoints.families.family import Family, decoder, silu
from lightrm.checkpoints.rope_config import read_rope

HEAD_WIDTH = 128  # transformers' default, where config.json is silent


def architecture(config: Config) -> Architecture:
    silu(config)
    biased = config.flag("attention_bias")
    plain = decoder(config, read_rope(config), head_width=HEAD_WIDTH)
    return replace(plain, qkv_bias=biased, output_bias=biased, head_norms=True, windows=qwen2.windows(config))


FAMILY = Family("qwen3", architecture, reads=("attention_bias", *qwen2.READS))
