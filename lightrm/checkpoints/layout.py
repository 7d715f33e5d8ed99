"""What all layouts share: the names that lightrm uses, and the renaming of a LLaMA-shaped backbone.

Our names, one for each tensor that a file may hold:

    embedding.weight                          (V, D)
    layers.{i}.attention_norm.weight          (D,), before attention
    layers.{i}.attention_post_norm.weight     (D,), of what attention adds, where the family has it
    layers.{i}.query_norm|key_norm.weight     (E,), of each head, where the family has them
    layers.{i}.query|key|value.weight, .bias  rows of the fused qkv weight
    layers.{i}.qkv.weight                     the same three in one tensor, query rows first
    layers.{i}.output.weight, .bias           (D, H * E)
    layers.{i}.mlp_norm|mlp_post_norm.weight  (D,)
    layers.{i}.gate|up|down.weight, .bias     (F, D), (F, D), (D, F)
    layers.{i}.gate_up.weight                 gate and up in one tensor
    final_norm.weight                         (D,)
    head.{k}.weight, .bias                    the value head, k = 0, 1 for an MLP
    normalizer.mean, .var                     a score normalizer's buffers
    gate.{k}.weight, .bias                    the MLP that weighs the head's outputs
    gate.{k}.norm.weight, .bias, .mean, .var  a batch norm behind layer k of it
    gate.factor, gate.transform               (1,) and (K, K)

The `rename` of a layout maps a foreign name to one of ours, to "" for a tensor that a scorer does not need, or to None
for a tensor that it does not know.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lightrm.architecture import Architecture, GateForm, PostStep
from lightrm.checkpoints.config import Config
from lightrm.checkpoints.families import family_of
from lightrm.checkpoints.score_position import Reading

IGNORED = ""
BLOCKS = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.W_pack": "qkv",
    "self_attn.qkv_proj": "qkv",
    "self_attn.o_proj": "output",
    "self_attn.q_norm": "query_norm",
    "self_attn.k_norm": "key_norm",
    "attention_post_norm": "attention_post_norm",  # names that a family gives: see `families`
    "mlp_norm": "mlp_norm",
    "mlp_post_norm": "mlp_post_norm",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.gate_up_proj": "gate_up",
    "mlp.down_proj": "down",
}
TOP = {"embed_tokens.weight": "embedding.weight", "norm.weight": "final_norm.weight"}
BLOCK = re.compile(r"layers\.(\d+)\.(.+)\.(weight|bias)")
# The output layer, and the rotary and mask buffers of old conversions.
UNUSED = re.compile(r"(.*\.)?(lm_head\.weight|rotary_emb\.inv_freq|rotary_emb\.(cos|sin)_cached|future_mask)")

Outputs = Literal["one", "mean", "attributes", "pair"]  # see `Layout`
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
    regroup: sorts the rows of the file's fused qkv weight into query, key and value; None if they are in this order.
    reading: where the model's own code reads the score. appended: id of the token that this code puts behind every
    text.
    whole: whether this code tokenizes the rendered chat like any text, with the BOS that the tokenizer adds.
    head_stem: the name of the head, if the config says it.
    outputs: how many numbers the head gives, and what for: "one"; "mean", of several (Ziya); "attributes", each with a
    name; "pair", two logits of which the difference counts.
    condense: what this code does to the outputs of the last layer, along the first axis of its weight and of its bias;
    None if nothing. attributes: names of that many outputs, if the config does not name them. gate: how its gate works.
    steps: name of the form in `text.steps` of a process reward model; "" for all others.
    rows: of the output layer, which are the head, from the folder of the tokenizer. asked: whether the files look like
    those of any language model, so that the layout has to be asked for by name.
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
    outputs: Outputs = "one"
    condense: Callable[[Config, torch.Tensor], torch.Tensor] | None = None
    attributes: Callable[[Config, int], tuple[str, ...]] | None = None
    gate: GateForm | None = None
    steps: str = ""
    rows: Callable[[Path], tuple[int, ...]] | None = None
    asked: bool = False
    fields: frozenset[str] = frozenset()

    def ours(self, name: str, config: Config) -> str | None:
        """Return our name of a tensor, as `rename` does; the config may name the head, and its family other tensors."""
        name = family_of(config).spelled(name)
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


def difference(config: Config, two: torch.Tensor) -> torch.Tensor:
    """Return what makes of two logits the one whose sigmoid is softmax(logits)[1]: the second minus the first."""
    return two[1:] - two[:1]
