"""internlm/internlm2-*-reward: tensor names of its own, `v_head.weight`, and a reward token that ends every sequence.

The rows of wqkv are grouped by key/value head: the query rows of a group, then its key rows, then its value rows.
"""

from __future__ import annotations

import re
from collections.abc import Collection

import torch

from lightrm.architecture import Architecture
from lightrm.checkpoints.config import Config
from lightrm.checkpoints.layout import BLOCK, IGNORED, Layout, linear_head
from lightrm.checkpoints.score_position import reads_last

BLOCKS = {
    "attention_norm": "attention_norm",
    "attention.wqkv": "qkv",
    "attention.wo": "output",
    "ffn_norm": "mlp_norm",
    "feed_forward.w1": "gate",
    "feed_forward.w3": "up",
    "feed_forward.w2": "down",
}
TOP = {"model.tok_embeddings.weight": "embedding.weight", "model.norm.weight": "final_norm.weight"}


def matches(config: Config, names: Collection[str]) -> bool:
    return config.raw.get("model_type") == "internlm2" and "v_head.weight" in names


def rename(name: str) -> str | None:
    if name in TOP:
        return TOP[name]
    block = BLOCK.fullmatch(name.removeprefix("model."))
    if block is not None and block[2] in BLOCKS:
        return f"layers.{block[1]}.{BLOCKS[block[2]]}.{block[3]}"
    if re.fullmatch(r"output\.weight|.*rotary_emb\.inv_freq", name):
        return IGNORED
    return linear_head(name, "v_head")


def regroup(wqkv: torch.Tensor, a: Architecture) -> torch.Tensor:
    """Sort the row groups (J, H/J + 2, E) into query rows, key rows, value rows."""
    shared = a.query_heads // a.kv_heads
    grouped = wqkv.reshape(a.kv_heads, shared + 2, a.head_width, *wqkv.shape[1:])
    parts = grouped[:, :shared], grouped[:, shared : shared + 1], grouped[:, shared + 1 :]
    return torch.cat([part.flatten(0, 2) for part in parts])


LAYOUT = Layout(
    name="internlm2",
    models="internlm2-reward",
    describes="internlm2-reward: v_head at the reward token",
    matches=matches,
    rename=rename,
    template=lambda config: "chat",
    regroup=regroup,
    reading=lambda config: reads_last("as InternLM2's class reads: the reward token that ends a text"),
    appended=lambda config: config.integer("reward_token_id"),
    fields=frozenset({"reward_token_id"}),
)
