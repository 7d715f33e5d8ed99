"""Texts that begin alike, such as one prompt with many answers: what they share is tokenized once.

In general the ids of a text are not the ids of its parts. There is one safe place to divide a text: a special token
that is matched before normalization. The tokenizers library splits the text there first and tokenizes each part by
itself; beside its own characters, a part's ids depend only on whether it opens the text. So the rest of a text is
tokenized from such a special token on, which then opens it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Dividers:
    """The special tokens of a tokenizer at which it divides a text.

    ids: of each such token, by its spelling; longest: characters of the longest token that it matches in a text.
    """

    ids: Mapping[str, int]
    longest: int

    def last(self, shared: str, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """Return the last divider of the start that some texts share, or None.

        pattern: matches special tokens. A token that begins before the divider could still swallow it if the texts
        differ soon behind it, and a `single_word` token looks at the next character: so some distance is kept.
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

    tokenize: a text, and whether BOS and EOS are put around it -> its ids; closing: how many ids the tokenizer puts
    behind a whole text. That a text can be divided is checked on the first: its ids must end in those of its rest.
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
