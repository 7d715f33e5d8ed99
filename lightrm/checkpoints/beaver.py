"""PKU-Alignment beaver reward and cost models: `score_head.*` and the buffers of a score normalizer.

If config.do_normalize is set, a reward is normalized as (x - mean) / (std + 1e-8), a cost as x / (std + 1e-8). A cost
grows with harm. It is negated, so that a higher score always means a better answer.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from lightrm.architecture import PostStep
from lightrm.checkpoints.config import Config
from lightrm.checkpoints.layout import IGNORED, Layout, backbone, linear_head
from lightrm.checkpoints.score_position import reads_last
from lightrm.errors import ConfigError

SMALLEST_STD = 1e-8  # safe-rlhf adds it to the standard deviation


def matches(config: Config, names: Collection[str]) -> bool:
    return "score_head.weight" in names


def rename(name: str) -> str | None:
    if name in ("normalizer.mean", "normalizer.var"):
        return name
    if name == "normalizer.count":
        return IGNORED
    return linear_head(name, "score_head") or backbone(name)


def post(config: Config, buffers: dict[str, torch.Tensor]) -> PostStep:
    score_type = config.raw.get("score_type", "reward")
    if score_type not in ("reward", "cost"):
        raise ConfigError(f"{config.path}: score_type {score_type!r} is neither 'reward' nor 'cost'")
    cost = score_type == "cost"
    if not config.flag("do_normalize"):
        return PostStep(negate=cost)
    if "normalizer.mean" not in buffers or "normalizer.var" not in buffers:
        raise ConfigError(f"{config.path}: do_normalize is set, but the weights hold no normalizer.mean and .var")
    mean, var = float(buffers["normalizer.mean"]), float(buffers["normalizer.var"])
    return PostStep(mean=0.0 if cost else mean, std=var**0.5 + SMALLEST_STD, negate=cost)


LAYOUT = Layout(
    name="beaver",
    models="beaver-7b reward and cost",
    describes="beaver reward and cost: score_head, normalizer",
    matches=matches,
    rename=rename,
    template=lambda config: "beaver",
    post=post,
    reading=lambda config: reads_last("as safe-rlhf reads: the last of the mask"),
    fields=frozenset(
        {
            "score_type",
            "do_normalize",
            "normalizer_type",
            "momentum",
            "mean",
            "var",
            "bias",
            "score_bias",
            "score_dim",
        }
    ),
)
