"""TRL and LLaMA-Factory value heads: `v_head.summary.*` or, in a file of its own, `summary.*`.

Five variants are told apart by what lies in the folder: merged shards with value_head.bin; shards that hold v_head
themselves; a saved wrapper (`pretrained_model.*`); an unmerged LoRA adapter with value_head.bin (see `adapter`);
value_head.safetensors with full names. GRM's MLP heads are `v_head.summary.0` and `.2`.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from lightrm.checkpoints.config import Config
from lightrm.checkpoints.layout import IGNORED, Layout, backbone, linear_head
from lightrm.checkpoints.score_position import reads_last

# Buffers that a trainer registered beside the head; `default_head_*` is the untrained one.
LEFT_OVER = re.compile(r"(reward|default)_head_(weight|bias)")


def matches(config: Config, names: Collection[str]) -> bool:
    return any(re.fullmatch(r"(v_head\.)?summary(\.\d+)?\.weight", name) for name in names)


def rename(name: str) -> str | None:
    head = linear_head(name, "v_head.summary") or linear_head(name, "summary")
    if head is not None:
        return head
    if LEFT_OVER.fullmatch(name):
        return IGNORED
    return backbone(name, ("pretrained_model.model.", "model."))


def template(config: Config) -> str | None:
    """Return the template. Baichuan models of LLaMA-Efficient-Tuning have no chat template; its default one is the best
    guess."""
    return "let-default" if config.raw.get("model_type") == "baichuan" else "chat"


LAYOUT = Layout(
    name="value_head",
    models="rw_helpful_13b_wpack, rw_safe_13b_wpack, any TRL or LLaMA-Factory reward model, also with unmerged LoRA, "
    "GRM",
    describes="TRL / LLaMA-Factory: v_head.summary, in the shards or in value_head.bin",
    matches=matches,
    rename=rename,
    template=template,
    reading=lambda config: reads_last("as the trainer reads: the last of the mask"),
)
