"""IDEA-CCNL/Ziya-LLaMA-7B-Reward and its relatives: a LLaMA backbone with `value_head.*`, with or without a bias.

If the value head has several rows, they are averaged, as in one published copy of the modelling file.
"""

from __future__ import annotations

from collections.abc import Collection

from lightrm.checkpoints.config import Config
from lightrm.checkpoints.layout import Layout, backbone, linear_head
from lightrm.checkpoints.score_position import reads_last


def matches(config: Config, names: Collection[str]) -> bool:
    return "value_head.weight" in names


def rename(name: str) -> str | None:
    return linear_head(name, "value_head") or backbone(name)


LAYOUT = Layout(
    name="ziya",
    models="Ziya-LLaMA-7B-Reward, HuatuoGPT reward",
    describes="Ziya-LLaMA-7B-Reward: value_head",
    matches=matches,
    rename=rename,
    template=lambda config: "ziya",
    reading=lambda config: reads_last("as Ziya's class reads: the last of the mask"),
    outputs="mean",
)
