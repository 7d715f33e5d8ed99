"""DeepSpeed-Chat reward models (`rwtransformer.*`, also misspelt) and Starling-RM (`transformer.*`): `v_head.weight`.

Their prompts are whatever the trainer's data had, so they have no template. Their code reads the score before the first
pad token behind the prompt. In a sequence without padding, only pad tokens at its end count as such.
"""

from __future__ import annotations

from collections.abc import Collection

from lightrm.checkpoints.config import Config
from lightrm.checkpoints.layout import Layout, backbone, linear_head
from lightrm.checkpoints.score_position import Reading, reads_last

PREFIXES = (
    "rwtransformer.model.", "rwtransformer.", "rwtranrsformer.model.", "rwtranrsformer.",
    "transformer.model.", "transformer.", "model.",
)  # fmt: skip


def matches(config: Config, names: Collection[str]) -> bool:
    return "v_head.weight" in names


def rename(name: str) -> str | None:
    return linear_head(name, "v_head") or backbone(name, PREFIXES)


def reading(config: Config) -> Reading:
    pad = config.token_id("pad_token_id")
    if pad is None:
        return reads_last("as config.json has no pad_token_id")
    return Reading("last but pad", "as DeepSpeed-Chat reads: before the pads behind the answer", pad)


LAYOUT = Layout(
    name="deepspeed_chat",
    models="DeepSpeed-Chat, Starling-RM",
    describes="DeepSpeed-Chat, Starling-RM: v_head",
    matches=matches,
    rename=rename,
    template=lambda config: None,
    reading=reading,
)
