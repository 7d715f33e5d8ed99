"""DeepSpeed-Chat reward models (`rwtransformer.*`, also misspelt) and Starling-RM (`transformer.*`): `v_head.weight`.

Their prompts are whatever the trainer's data set had, so no template goes with them.
"""

from __future__ import annotations

from collections.abc import Collection

from lightrm.checkpoints.config import Config
from lightrm.checkpoints.layout import Layout, backbone, linear_head

PREFIXES = (
    "rwtransformer.model.", "rwtransformer.", "rwtranrsformer.model.", "rwtranrsformer.",
    "transformer.model.", "transformer.", "model.",
)  # fmt: skip


def matches(config: Config, names: Collection[str]) -> bool:
    return "v_head.weight" in names


def rename(name: str) -> str | None:
    return linear_head(name, "v_head") or backbone(name, PREFIXES)


LAYOUT = Layout(
    name="deepspeed_chat",
    describes="DeepSpeed-Chat, Starling-RM: v_head",
    matches=matches,
    rename=rename,
    template=lambda config: None,
)
