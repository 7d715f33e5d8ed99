"""What all layouts share: the names that lightrm uses, and the renaming of a LLaMA-shaped backbone.

Our names, one for each tensor that a file may hold:

    embedding.weight                          (V, D)
    layers.{i}.attention_norm.weight          (D,)
    layers.{i}.query|key|value.weight, .bias  rows of the fused qkv weight
    layers.{i}.qkv.weight                     the same three in one tensor, query rows first
    layers.{i}.output.weight, .bias           (D, H * E)
    layers.{i}.mlp_norm.weight                (D,)
    layers.{i}.gate|up|down.weight            (F, D), (F, D), (D, F)
    final_norm.weight                         (D,)
    head.{k}.weight, .bias                    the value head, k = 0, 1 for an MLP
    normalizer.mean, .var                     a score normalizer's buffers

The `rename` of a layout maps a foreign name to one of ours, to "" for a tensor that a scorer does not need, or to None
for a tensor that it does not know.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import torch

from lightrm.architecture import Architecture, PostStep
from lightrm.checkpoints.config import Config
from lightrm.checkpoints.score_position import Reading

IGNORED = ""
BLOCKS = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.W_pack": "qkv",
    "self_attn.o_proj": "output",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
TOP = {"embed_tokens.weight": "embedding.weight", "norm.weight": "final_norm.weight"}
BLOCK = re.compile(r"layers\.(\d+)\.(.+)\.(weight|bias)")
# The output layer, and the rotary and mask buffers of old conversions.
UNUSED = re.compile(r"(.*\.)?(lm_head\.weight|rotary_emb\.inv_freq|rotary_emb\.(cos|sin)_cached|future_mask)")

Rename = Callable[[str], str | None]
Post = Callable[[Config, dict[str, torch.Tensor]], PostStep]


def no_post(config: Config, buffers: dict[str, torch.Tensor]) -> PostStep:
    return PostStep()


@dataclass(frozen=True, slots=True)
class Layout:
    """One kind of reward-model checkpoint.

    models: those that have it, as in docs/models.md. describes: its head, for messages.
    matches: tells the layout from the config and the tensor names.
    template: name of its prompt template, "chat" for the checkpoint's own, None if unknown.
    ending: what the trainer puts at the end of every text: see `text.templates.Ending`.
    regroup: turns the file's fused qkv weight into query, key, value rows; None if its rows are in this order.
    reading: where the model's own code reads the score. appended: id of the token that this code puts behind every
    text.
    whole: whether this code tokenizes the rendered chat like any text, with the BOS that the tokenizer adds.
    head_stem: the name of the head, if the config says it.
    averages: whether this code takes the mean of several outputs; in other layouts several outputs are refused.
    fields: fields of config.json that only this layout reads.
    """

    name: str
    models: str
    describes: str
    matches: Callable[[Config, Collection[str]], bool]
    rename: Rename
    template: Callable[[Config], str | None]
    reading: Callable[[Config], Reading]
    post: Post = no_post
    regroup: Callable[[torch.Tensor, Architecture], torch.Tensor] | None = None
    ending: Literal["none", "eos", "openrlhf"] = "none"
    appended: Callable[[Config], int] | None = None
    whole: bool = False
    head_stem: Callable[[Config], str] | None = None
    averages: bool = False
    fields: frozenset[str] = frozenset()

    def ours(self, name: str, config: Config) -> str | None:
        """Return our name of a tensor, as `rename` does; the config may name the head."""
        head = None if self.head_stem is None else linear_head(name, self.head_stem(config))
        return self.rename(name) if head is None else head


def backbone(name: str, prefixes: tuple[str, ...] = ("model.",)) -> str | None:
    """Return our name of a LLaMA or Baichuan backbone tensor. prefixes: what a trainer put before its name."""
    if UNUSED.fullmatch(name):
        return IGNORED
    for prefix in prefixes:
        if not name.startswith(prefix):
            continue
        rest = name.removeprefix(prefix)
        if rest in TOP:
            return TOP[rest]
        block = BLOCK.fullmatch(rest)
        if block is not None and block[2] in BLOCKS:
            return f"layers.{block[1]}.{BLOCKS[block[2]]}.{block[3]}"
    return None


def linear_head(name: str, stem: str) -> str | None:
    """Return our name of `stem.weight` and `stem.bias`, or of the layers of an MLP, `stem.0.weight` and
    `stem.2.weight`."""
    match = re.fullmatch(re.escape(stem) + r"(?:\.(\d+))?\.(weight|bias)", name)
    if match is None:
        return None
    return f"head.{int(match[1] or 0) // 2}.{match[2]}"
