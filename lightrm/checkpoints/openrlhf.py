"""OpenRLHF reward models: the head's name is in the config (`value_head_prefix`), with an optional mean and std."""

from __future__ import annotations

from collections.abc import Collection

import torch

from lightrm.checkpoints.config import Config
from lightrm.checkpoints.layout import Layout, backbone, linear_head
from lightrm.heads import PostStep

STEMS = ("value_head", "score")  # the default changed from the first to the second in December 2024


def matches(config: Config, names: Collection[str]) -> bool:
    prefix = config.raw.get("value_head_prefix")
    return isinstance(prefix, str) and prefix in STEMS and f"{prefix}.weight" in names


def rename(name: str) -> str | None:
    for stem in STEMS:
        head = linear_head(name, stem)
        if head is not None:
            return head
    return backbone(name)


def post(config: Config, buffers: dict[str, torch.Tensor]) -> PostStep:
    """The trainer stores the scores' mean and std; they are applied where `normalize_reward` asks for it."""
    if not config.flag("normalize_reward"):
        return PostStep()
    return PostStep(mean=config.number("mean"), std=config.number("std"))


LAYOUT = Layout(
    name="openrlhf",
    describes="OpenRLHF: value_head or score, named in config.value_head_prefix",
    matches=matches,
    rename=rename,
    template=lambda config: "chat",
    post=post,
    ending="openrlhf",
)
