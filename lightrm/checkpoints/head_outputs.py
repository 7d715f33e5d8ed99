"""How many numbers a head outputs, and what for. Most reward models output one, for the whole text.

`architectures`, num_labels, id2label and the rows of the head's last weight are all looked at, and must agree. Several
outputs are attributes, each with a name, where the layout says so; the mean over the logits of a classifier is not a
score. A model of another kind is refused with the name of that kind.
"""

from __future__ import annotations

import re
from typing import Protocol

from lightrm.checkpoints.config import Config, shown
from lightrm.checkpoints.layout import Outputs
from lightrm.errors import ConfigError, TensorMismatchError, UnsupportedModelError

OTHER_KINDS = (
    (
        r"ForTokenClassification",
        "labels every token (TRL's process reward models are of this class; how the steps were divided is not in the "
        "files)",
    ),
    (
        r"ForProcessReward|ForPRM|PRMModel|ForPrm|PrmModel",
        "is a process reward model: it scores each step of an answer. lightrm knows those of Qwen2.5-Math-PRM, "
        "Skywork-o1-Open-PRM, math-shepherd and RLHFlow",
    ),
    (
        r"WithGating",
        "weighs several rewards by a gating network. lightrm knows those of ArmoRM, QRM and URM on LLaMA",
    ),
    (
        r"LDLReward",
        "weighs distributions of several rewards by a network in files of its own, regression_layer.pt and "
        "gating_layer.pt, which lightrm does not read",
    ),
    (r"PairRM", "compares two answers with each other, and gives none of them a score of its own"),
    (r"ForQuestionAnswering|ForMultipleChoice|ForMaskedLM|ForConditionalGeneration", "is no reward model"),
)
# Classes of these kinds that a layout knows.
KNOWN = re.compile(r"Qwen2ForProcessRewardModel|Qwen2ForPrmModel|LlamaForRewardModelWithGating(3|31)?")
CURE = "lightrm gives one score to a whole text, and does not choose or average for you: take a model with one output"
UNNAMED = re.compile(r"LABEL_\d+")


class Counted(Protocol):
    """What a layout says of its outputs: see `checkpoints.layout`."""

    @property
    def outputs(self) -> Outputs: ...
    @property
    def steps(self) -> str: ...
    @property
    def rows(self) -> object: ...
    @property
    def gate(self) -> object: ...


def check_kind(config: Config, layout: Counted | None = None) -> None:
    """Raise UnsupportedModelError on a class that does not output scores that lightrm understands, whatever its tensors
    are called. layout: the one that was found, if one was."""
    if KNOWN.fullmatch(config.classes) and (layout is None or layout.steps or layout.gate is not None):
        return
    for pattern, does in OTHER_KINDS:
        if re.search(pattern, config.classes):
            raise UnsupportedModelError(f"{config.path}: {config.classes} {does}; {said(config)}. {CURE}")


def check_outputs(config: Config, head: str, rows: int | None, layout: Counted) -> None:
    """Check that a head has as many outputs as its layout and the config say.

    head: the name of its last weight; rows: of that weight, None if it was not read. Raises UnsupportedModelError on
    more outputs than the layout can have, ConfigError or TensorMismatchError if the files contradict each other.
    """
    check_kind(config, layout)
    if layout.outputs == "mean" or layout.gate is not None or layout.rows is not None:
        return
    labels = promised(config)
    outputs = labels if rows is None else rows
    if layout.outputs == "pair":
        if outputs not in (None, 1, 2):  # one in a folder of lightrm's own, where the two are one already
            raise TensorMismatchError(f"{config.path}: {head} has {outputs} rows, expected 2: {said(config)}")
        return
    if rows is not None and labels is not None and rows != labels and not (rows == 1 and layout.steps):
        raise TensorMismatchError(
            f"{config.path}: {said(config)}, but {head} has {rows} rows: is the config another model's?"
        )
    if outputs is not None and outputs != 1 and layout.outputs != "attributes":
        found = f", and {head} has {rows} rows" if rows is not None else ""
        raise UnsupportedModelError(
            f"{config.path}: {config.classes or 'this model'} has {outputs} outputs ({said(config)}{found}). {CURE}"
        )


def label_names(config: Config, count: int) -> tuple[str, ...]:
    """Return the names of the outputs in their order, as id2label has them; LABEL_0, ... if it has none.

    Raises ConfigError if two have the same name.
    """
    named = config.entries("id2label")
    names = tuple(str(named.get(str(k), f"LABEL_{k}")) for k in range(count))
    if len(set(names)) < count:
        raise ConfigError(f"{config.path}: two labels of id2label have one name: {shown(named)}")
    return names


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
