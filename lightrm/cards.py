"""A model card's own numbers, read out of its README.md, so that weights at hand can be held against them.

Two forms: Python examples that assign `query` and `response` and end in a comment `# reward: ...`, as Ziya's card has
them, and JSON results with the fields of an evaluation, as the Baichuan reward models' card has them. Code of a card is
parsed, never run.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightrm.errors import InputError

CARD = "README.md"
FENCE = re.compile(r"```(?:python|py)?[^\S\n]*\n(.*?)```", re.DOTALL)
REWARD = re.compile(r"#\s*rewards?:\s*(.+)")
RESULT = re.compile(r"^#\s*([\w.-]+)[^\n{]*\n(\{[^{}]*\})", re.MULTILINE | re.ASCII)
MARK = "eval_accuracy"


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt, its responses, and the scores that the card gives them, as many digits as it shows."""

    prompt: str
    responses: tuple[str, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Card:
    """results: the published fields by the name of the model that they are of."""

    examples: tuple[Example, ...]
    results: dict[str, dict[str, float]]


def find_card(folder: Path) -> Path:
    """The card in a checkpoint's folder, or in the one above it, where several models share one.

    Raises InputError if there is none.
    """
    for place in (folder, folder.parent):
        if (place / CARD).is_file():
            return place / CARD
    raise InputError(f"{folder} has no {CARD}, and neither has the folder above it: pass the card's file")


def read_card(path: Path) -> Card:
    """Raises InputError if the file cannot be read or holds no number to compare with."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the card {path} cannot be read: {error}") from error
    examples = [example for block in FENCE.findall(text) if (example := example_of(block)) is not None]
    results = {name: fields for name, block in RESULT.findall(text) if (fields := fields_of(block))}
    if not examples and not results:
        raise InputError(f"{path} holds neither examples with their rewards nor evaluation results")
    return Card(tuple(dict.fromkeys(examples)), results)


def example_of(block: str) -> Example | None:
    """A code block's example; None where it is no whole one."""
    published = REWARD.search(block)
    try:
        statements = ast.parse(block).body
        scores = ast.literal_eval(published[1].strip()) if published is not None else None
    except (SyntaxError, ValueError):
        return None
    assigned: dict[str, Any] = {}
    for statement in statements:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            try:
                assigned[statement.targets[0].id] = ast.literal_eval(statement.value)
            except ValueError:
                continue  # computed, not written out
    query, answers = assigned.get("query"), assigned.get("response")
    responses = [answers] if isinstance(answers, str) else answers
    values = [scores] if isinstance(scores, int | float) else scores
    if not isinstance(query, str) or not isinstance(responses, list) or not isinstance(values, list):
        return None
    if len(values) != len(responses):
        return None
    return Example(query, tuple(map(str, responses)), tuple(map(float, values)))


def fields_of(block: str) -> dict[str, float]:
    try:
        raw = json.loads(block)
    except ValueError:
        return {}
    fields = {name: float(value) for name, value in raw.items() if isinstance(value, int | float)}
    return fields if MARK in fields else {}
