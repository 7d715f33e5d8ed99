"""Baichuan 7B with RoPE and 13B with ALiBi. Both are called alike: the configs of the 7B models have
max_position_embeddings, those of the 13B models do not."""

from __future__ import annotations

from lightrm.architecture import Alibi, Architecture, Rope
from lightrm.checkpoints.config import Config
from lightrm.checkpoints.families.family import Family, decoder, silu
from lightrm.checkpoints.rope_config import read_rope
from lightrm.errors import UnsupportedModelError


def architecture(config: Config) -> Architecture:
    silu(config)
    return decoder(config, positions(config))


def positions(config: Config) -> Rope | Alibi:
    if config.has("max_position_embeddings"):
        return read_rope(config)
    if config.has("model_max_length"):
        return Alibi()
    raise UnsupportedModelError(
        f"{config.path}: model_type 'baichuan' with neither model_max_length (13B, ALiBi) nor "
        "max_position_embeddings (7B, RoPE): lightrm cannot tell which of the two it is"
    )


FAMILY = Family("baichuan", architecture, reads=("model_max_length",))
