"""Nexusflow/Athene-RM: a LLaMA-3 backbone, `v_head.weight`, read at the token `<|cls|>` that its code appends.

Its pipeline puts the tokenizer's cls token, id 128003, behind the rendered chat, and tokenizes the result like any
text, which adds a second BOS. Its class reads the last token of that id.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from lightrm.checkpoints.config import Config
from lightrm.checkpoints.layout import Layout, backbone, linear_head
from lightrm.checkpoints.score_position import Reading
from lightrm.errors import ConfigError

CLASSES = re.compile(r"Athene|\bCustomAutoModelForSequenceClassification\b")
CLS = 128003


def matches(config: Config, names: Collection[str]) -> bool:
    """Tell the layout by the class name, or by what no other layout has: `v_head` beside a plain LLaMA-3."""
    if config.raw.get("model_type") != "llama" or "v_head.weight" not in names:
        return False
    plain = "model.embed_tokens.weight" in names
    return bool(CLASSES.search(config.classes)) or (plain and config.integer("vocab_size") > CLS)


def rename(name: str) -> str | None:
    return linear_head(name, "v_head") or backbone(name)


def appended(config: Config) -> int:
    if config.integer("vocab_size") <= CLS:
        raise ConfigError(
            f"{config.path}: Athene-RM is read at token {CLS}, and vocab_size is {config.raw['vocab_size']}"
        )
    return CLS


LAYOUT = Layout(
    name="athene",
    models="Athene-RM",
    describes="Athene-RM: v_head at the appended <|cls|>",
    matches=matches,
    rename=rename,
    template=lambda config: "chat",
    whole=True,
    appended=appended,
    reading=lambda config: Reading("last of kind", "as Athene-RM's class reads", appended(config)),
)
