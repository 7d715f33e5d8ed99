"""OpenRLHF reward models: the config names the head (`value_head_prefix`), with an optional mean and std.

The trainer takes any name for the head; the default was `value_head`, and is `score` since December 2024. Its code
reads the score at the last token of the mask.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from lightrm.architecture import PostStep
from lightrm.checkpoints.config import Config
from lightrm.checkpoints.layout import Layout, backbone
from lightrm.checkpoints.score_position import reads_last
from lightrm.errors import MissingHeadError


def matches(config: Config, names: Collection[str]) -> bool:
    """Tell the layout by its config. Raises MissingHeadError if the head that it names is not there: the trainer itself
    would then make a random one."""
    if not config.has("value_head_prefix"):
        return False
    if f"{stem(config)}.weight" not in names:
        heads = sorted(name for name in names if "layers." not in name)
        raise MissingHeadError(
            f"{config.path}: value_head_prefix names the value head {stem(config)!r}, but there is no "
            f"{stem(config)}.weight beside {', '.join(heads[:6])}"
        )
    return True


def stem(config: Config) -> str:
    return config.text("value_head_prefix")


def rename(name: str) -> str | None:
    return backbone(name)


def post(config: Config, buffers: dict[str, torch.Tensor]) -> PostStep:
    """Return the normalization of scores: the trainer stores mean and std, and applies them if `normalize_reward` is
    set."""
    if not config.flag("normalize_reward"):
        return PostStep()
    return PostStep(mean=config.number("mean", 0.0), std=config.number("std", 1.0, positive=True))


LAYOUT = Layout(
    name="openrlhf",
    models="OpenRLHF",
    describes="OpenRLHF: the head that config.value_head_prefix names",
    matches=matches,
    rename=rename,
    template=lambda config: "chat",
    post=post,
    ending="openrlhf",
    reading=lambda config: reads_last("as OpenRLHF reads: the last of the mask"),
    head_stem=stem,
    fields=frozenset({"value_head_prefix", "normalize_reward", "mean", "std"}),
)
