"""config.json -> Architecture: a module for each model family, found by `model_type`.

A family reads its own fields and describes the decoder; which reward model it is, the layouts beside this folder tell.
"""

from __future__ import annotations

from lightrm.architecture import Architecture
from lightrm.checkpoints.config import Config
from lightrm.checkpoints.families import (
    baichuan,
    gemma,
    gemma2,
    gemma3,
    internlm2,
    llama,
    mistral,
    phi3,
    qwen2,
    qwen3,
)  # fmt: skip
from lightrm.checkpoints.families.family import Family
from lightrm.errors import UnsupportedModelError

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY
    for module in (llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3, phi3, internlm2, baichuan)
}


def family_of(config: Config) -> Family:
    """Return the family of a model. Raises UnsupportedModelError if lightrm has no decoder for it."""
    name = config.text("model_type")
    if name not in FAMILIES:
        raise UnsupportedModelError(
            f"{config.path}: model_type {name!r} ({config.classes or 'no architectures entry'}) is not supported; "
            f"lightrm runs {', '.join(FAMILIES)}"
        )
    return FAMILIES[name]


def read_architecture(config: Config) -> Architecture:
    """Return the architecture. Raises ConfigError on a bad field, UnsupportedModelError on a model that lightrm cannot
    run."""
    return family_of(config).architecture(config)
