"""Texts that begin alike, such as one prompt with many answers: what they share is tokenized once.

In general the ids of a text are not the ids of its parts put together. There is one safe place to divide a text: a
special token that is matched before normalization. The tokenizers library divides the text there first, then tokenizes
each part by itself. Apart from its own characters, the ids of a part depend only on whether it opens the text. So the
second part of a text is tokenized together with the special token before it, which then opens it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Dividers:
    """The special tokens at which a tokenizer divides a text.

    ids: the id of each, by its spelling; longest: number of characters of the longest token that is matched in a text.
    """

    ids: Mapping[str, int]
    longest: int

    def last(self, shared: str, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """Return the last divider in the common start of some texts, or None.

        pattern: matches special tokens. The texts differ after `shared`. A longer token that begins before the divider
        could contain it in one of them, and a `single_word` token depends on the next character. So a divider too close
        to the end is not used.
        """
        matches = (m for m in pattern.finditer(shared) if m[0] in self.ids)
        return max((m for m in matches if m.start() + self.longest < len(shared)), key=re.Match.start, default=None)


def ids_of_all(
    texts: Sequence[str],
    tokenize: Callable[[str, bool], list[int]],
    whole: bool,
    closing: int,
    dividers: Dividers,
    pattern: re.Pattern[str],
) -> list[list[int]]:
    """Return the ids of each text, equal to `tokenize(text, whole)`.

    tokenize: a text, and whether BOS and EOS are put around it -> its ids. closing: how many ids the tokenizer puts
    behind a whole text. The first text is tokenized both ways: its ids must end in the ids of its second part, or
    nothing is shared.
    """
    first = tokenize(texts[0], whole)
    divider = dividers.last(shared_start(texts), pattern) if len(texts) > 1 else None
    if divider is not None:
        rest = tokenize(texts[0][divider.start() :], False)
        end = len(first) - (closing if whole else 0)
        start = end - len(rest)
        if rest and rest[0] == dividers.ids[divider[0]] and first[start:end] == rest:
            rests = (tokenize(text[divider.start() :], False) for text in texts[1:])
            return [first, *(first[:start] + ids + first[end:] for ids in rests)]
    return [first, *(tokenize(text, whole) for text in texts[1:])]


def shared_start(texts: Sequence[str]) -> str:
    """Return the characters that all texts begin with."""
    least, most = min(texts), max(texts)  # in the order of characters: all others lie between them
    return least[: next((k for k, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), len(least))]
