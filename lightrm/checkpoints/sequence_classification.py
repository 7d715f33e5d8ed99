"""Hugging Face `*ForSequenceClassification`: `score.weight`, no bias, or an MLP `score.0`, `score.2` (Qwen2 RM).

transformers reads the score at the last token that is not config.pad_token_id, so a text that ends in that token (pad =
eos = eot) is read before it. The classes that come with Qwen2.5-Math-RM and INF-ORM read before the first pad instead,
as transformers once did. If a wrapped model was saved whole, peft leaves the head under `score.modules_to_save`.

Several rows are as many attributes, with the names in config.id2label.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from lightrm.checkpoints.config import Config
from lightrm.checkpoints.layout import IGNORED, Layout, backbone, linear_head
from lightrm.checkpoints.score_position import Reading, reads_last
from lightrm.errors import ConfigError

OWN_CLASSES = re.compile(r"(Llama|Mistral|Qwen2|Qwen3|Gemma|Gemma2|Gemma3Text|Phi3)ForSequenceClassification")
FIRST_PAD = re.compile(r"Qwen2ForRewardModel|INFORMForSequenceClassification")
SAVED = re.compile(r"score\.modules_to_save(\.default)?\.")


def matches(config: Config, names: Collection[str]) -> bool:
    """Tell the layout by the head's name. Raises ConfigError on a bias, which transformers' own class would leave
    out."""
    if "score.bias" in names and OWN_CLASSES.fullmatch(config.classes):
        raise ConfigError(
            f"{config.path}: {config.classes} has no bias in its head, but the weights hold score.bias: which class "
            "are they of?"
        )
    return any(SAVED.sub("score.", name) in ("score.weight", "score.0.weight") for name in names)


def rename(name: str) -> str | None:
    if name.startswith("score.original_module."):
        return IGNORED
    return linear_head(SAVED.sub("score.", name), "score") or backbone(name)


def reading(config: Config) -> Reading:
    pad, classes = config.token_id("pad_token_id"), config.classes
    if pad is None:
        return reads_last("as config.json has no pad_token_id")
    if FIRST_PAD.search(classes):
        return Reading("before pad", f"as {classes} reads", pad)
    known = bool(OWN_CLASSES.fullmatch(classes))
    return Reading("last but pad", f"as {classes if known else 'transformers *ForSequenceClassification'} reads", pad)


LAYOUT = Layout(
    name="sequence_classification",
    models="Skywork-Reward, FsfairX, RM-Mistral, Qwen2 reward models; classifiers; adapters made by peft",
    describes="transformers *ForSequenceClassification: score",
    matches=matches,
    rename=rename,
    template=lambda config: "chat",
    reading=reading,
    outputs="attributes",
)
