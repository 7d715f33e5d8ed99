"""The docstrings' own form, for the API pages: "name: what it is" becomes a list with an item for each name.

An extension of griffe, which reads the sources for mkdocstrings. It imports nothing of lightrm.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import griffe


def listed(text: str, names: Iterable[str]) -> str:
    """Markdown in which each of the names, where a colon follows it at the start of a sentence, starts a list item."""
    word = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    if not word:
        return text
    start = re.compile(rf"(?:^|(?<=[.;)]) |(?<=\.\n)|(?<=\n))((?:{word})(?:, (?:{word}))*): ")
    paragraphs = []
    for paragraph in text.split("\n\n"):
        before, *items = start.split(paragraph)
        parts = [before.strip()] if before.strip() else []
        pairs = list(zip(items[::2], items[1::2], strict=True))
        parts += ["\n".join(f"- `{name}`: {what.strip()}" for name, what in pairs)] if pairs else []
        paragraphs += parts
    return "\n\n".join(paragraphs)


class Docstrings(griffe.Extension):
    """Lists the parameters of functions and the fields of dataclasses."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        if func.docstring:
            func.docstring.value = listed(func.docstring.value, [parameter.name for parameter in func.parameters])

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        if cls.docstring:
            cls.docstring.value = listed(cls.docstring.value, cls.attributes)
