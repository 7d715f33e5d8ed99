"""The numbers in a model's own card, README.md or MODEL_CARD.md, to compare the weights with.

Two forms are read: Python examples that assign `query` and `response` and end in a comment `# reward: ...`, as in
Ziya's card; and JSON results with the fields of an evaluation, as in the card of the Baichuan reward models. Code in a
card is parsed, never run.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightrm.errors import InputError

CARDS = ("README.md", "MODEL_CARD.md")
UNREADABLE = (SyntaxError, ValueError, TypeError, RecursionError, MemoryError, OverflowError)  # of code and JSON
FENCE = re.compile(r"```(?:python|py)?[^\S\n]*\n(.*?)```", re.DOTALL)
REWARD = re.compile(r"#\s*rewards?:\s*(.+)")
RESULT = re.compile(r"^#\s*([\w.-]+)[^\n{]*\n(\{[^{}]*\})", re.MULTILINE | re.ASCII)
MARK = "eval_accuracy"


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt, its responses, and their scores as the card shows them."""

    prompt: str
    responses: tuple[str, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Card:
    """results: the published fields, by the name of the model that they describe."""

    examples: tuple[Example, ...]
    results: dict[str, dict[str, float]]


def find_card(folder: Path) -> Path:
    """Return the card in a checkpoint's folder, or in the folder above it, where several models may share one.

    Raises InputError if there is none.
    """
    for place in (folder, folder.parent):
        for name in CARDS:
            if (place / name).is_file():
                return place / name
    raise InputError(
        f"neither {folder} nor the folder above it has a {' or '.join(CARDS)}: pass the card's file (--card)"
    )


def read_card(path: Path) -> Card:
    """Read a card. Raises InputError if the file cannot be read or holds no number to compare with."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the card {path} cannot be read: {error}") from error
    examples = [example for block in FENCE.findall(text) if (example := example_of(block)) is not None]
    results = {name: fields for name, block in RESULT.findall(text) if (fields := fields_of(block))}
    if not examples and not results:
        raise InputError(
            f"the card {path} publishes no number to compare with: neither an example (query = ..., response = ..., "
            f"# reward: ...) nor evaluation results ({MARK}, ...)"
        )
    return Card(tuple(dict.fromkeys(examples)), results)


def example_of(block: str) -> Example | None:
    """Return the example in a code block; None if it is not complete."""
    published = REWARD.search(block)
    try:
        statements = ast.parse(block).body
        scores = ast.literal_eval(published[1].strip()) if published is not None else None
    except UNREADABLE:
        return None
    assigned: dict[str, Any] = {}
    for statement in statements:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            try:
                assigned[statement.targets[0].id] = ast.literal_eval(statement.value)
            except UNREADABLE:
                continue  # computed, not written out
    query, answers = assigned.get("query"), assigned.get("response")
    responses = [answers] if isinstance(answers, str) else answers
    values = scores if isinstance(scores, list) else [scores]
    if not isinstance(query, str) or not isinstance(responses, list) or len(values) != len(responses):
        return None
    if not all(isinstance(text, str) for text in responses) or not all(map(is_score, values)):
        return None
    return Example(query, tuple(responses), tuple(map(float, values)))


def is_score(value: Any) -> bool:
    """Whether a value is a score that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def fields_of(block: str) -> dict[str, float]:
    try:
        raw = json.loads(block)
    except UNREADABLE:
        return {}
    fields = {name: float(value) for name, value in raw.items() if is_score(value)}
    return fields if MARK in fields else {}
