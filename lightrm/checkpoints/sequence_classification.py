"""Hugging Face `*ForSequenceClassification`: `score.weight`, no bias, or an MLP `score.0`, `score.2` (Qwen2 RM)."""

from __future__ import annotations

from collections.abc import Collection

from lightrm.checkpoints.config import Config
from lightrm.checkpoints.layout import Layout, backbone, linear_head


def matches(config: Config, names: Collection[str]) -> bool:
    return "score.weight" in names or "score.0.weight" in names


def rename(name: str) -> str | None:
    return linear_head(name, "score") or backbone(name)


LAYOUT = Layout(
    name="sequence_classification",
    describes="transformers *ForSequenceClassification: score",
    matches=matches,
    rename=rename,
    template=lambda config: "chat",
)
