"""How many numbers a head outputs, and what for: a reward model outputs one, for the whole text.

`architectures`, num_labels, id2label and the rows of the head's last weight are all looked at, and must agree. A model
of another kind is refused with the name of that kind: the mean over the logits of a classifier is not a score.
"""

from __future__ import annotations

import re

from lightrm.checkpoints.config import Config, shown
from lightrm.errors import ConfigError, TensorMismatchError, UnsupportedModelError

OTHER_KINDS = (
    (r"ForTokenClassification", "labels every token"),
    (
        r"ForProcessReward|ForPRM|PRMModel|ForPrm|PrmModel",
        "is a process reward model: it scores each step of an answer",
    ),
    (r"WithGating", "weighs several rewards by a gating network"),
    (r"PairRM", "compares two answers with each other, and gives none of them a score of its own"),
    (r"ForQuestionAnswering|ForMultipleChoice|ForMaskedLM|ForConditionalGeneration", "is no reward model"),
)
CURE = "lightrm gives one score to a whole text, and does not choose or average for you: take a model with one output"
UNNAMED = re.compile(r"LABEL_\d+")


def check_kind(config: Config) -> None:
    """Raise UnsupportedModelError on a class that does not output a single score, whatever its tensors are called."""
    for pattern, does in OTHER_KINDS:
        if re.search(pattern, config.classes):
            raise UnsupportedModelError(f"{config.path}: {config.classes} {does}; {said(config)}. {CURE}")


def check_outputs(config: Config, head: str, rows: int | None, averages: bool) -> None:
    """Check that a head has one output.

    head: the name of its last weight; rows: of that weight, None if it was not read; averages: whether the layout's own
    code takes the mean of several outputs. Raises UnsupportedModelError on more than one output, ConfigError or
    TensorMismatchError if the files contradict each other.
    """
    check_kind(config)
    if averages:
        return
    labels = promised(config)
    outputs = labels if rows is None else rows
    if rows is not None and labels is not None and rows != labels:
        raise TensorMismatchError(
            f"{config.path}: {said(config)}, but {head} has {rows} rows: is the config another model's?"
        )
    if outputs is not None and outputs != 1:
        found = f", and {head} has {rows} rows" if rows is not None else ""
        raise UnsupportedModelError(
            f"{config.path}: {config.classes or 'this model'} has {outputs} outputs ({said(config)}{found}). {CURE}"
        )


def promised(config: Config) -> int | None:
    """Return how many labels the config names; None if it names none, or only the default that every config has."""
    named = config.entries("id2label")
    count = config.integer("num_labels") if config.has("num_labels") else None
    if count is not None and named and count != len(named):
        raise ConfigError(f"{config.path}: num_labels is {count}, id2label has {len(named)}: {shown(named)}")
    labels = len(named) if named else count
    default = labels == 2 and all(UNNAMED.fullmatch(str(name)) for name in named.values())
    return None if default and "ForSequenceClassification" not in config.classes else labels


def said(config: Config) -> str:
    """Return what the config says of its labels, for a message."""
    parts = [f"{name} {shown(config.raw[name])}" for name in ("num_labels", "id2label") if config.has(name)]
    return ", ".join(parts) or "its config.json names no labels"
