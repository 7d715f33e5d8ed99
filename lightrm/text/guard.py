"""What a caller wrote never acts as a special token: which tokens steer a model, and a tokenizer that tells the
template's from the caller's.

A text is tokenized whole, so that everything in it comes out as the library would have it. Where the caller's own
words spell a token that steers the model, a second tokenizer is used, the same in all but one thing: there each such
token is spelled by one private-use character, its alias. The template's tokens are written by their aliases; what the
caller wrote matches nothing and is text.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import tokenizers

from lightrm.errors import TokenizerError

Span = tuple[int, int]  # characters start to end of a text
PRIVATE = range(0xF0000, 0xFFFFE)  # characters that no vocabulary has
OPENING, CLOSING = "<[{◁＜「【", ">]}▷＞」】"
# What a model writes in its own answer when it reasons.
THOUGHT = re.compile(r"[<\[{◁]/?(\w+:)?think(ing)?[>\]}▷]", re.IGNORECASE)
# HTML's own elements are words of a vocabulary, not marks; `<s>` is no such element here.
ELEMENTS = (
    "a|abbr|article|aside|b|base|big|blockquote|body|br|button|caption|center|cite|code|col|dd|del|details|"
    "div|dl|dt|em|figcaption|figure|font|footer|form|h[1-6]|head|header|hr|html|i|img|input|ins|kbd|label|li|"
    "link|main|mark|meta|nav|ol|option|p|param|pre|q|samp|script|section|select|small|span|strike|strong|"
    "style|sub|summary|sup|table|tbody|td|textarea|tfoot|th|thead|title|tr|tt|u|ul|var|video"
)
TAG = re.compile(rf"</?({ELEMENTS})\s*/?>", re.IGNORECASE)


def steers(spelling: str, special: bool) -> bool:
    """Whether a token of this spelling steers a model: all that are marked special, and every mark in brackets, however
    the vocabulary lists it. Spaces, digits, words, HTML tags and the marks of a model's own reasoning are text."""
    if not spelling.strip() or THOUGHT.fullmatch(spelling):
        return False
    if special:
        return True
    if TAG.fullmatch(spelling):
        return False
    return len(spelling) > 2 and spelling[0] in OPENING and spelling[-1] in CLOSING and not re.search(r"\s", spelling)


def pattern_of(spellings: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the spellings, the longest first; nothing where there are none."""
    longest_first = sorted({s for s in spellings if s}, key=lambda s: (-len(s), s))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def overlaps(start: int, end: int, spans: Sequence[Span]) -> bool:
    """Whether a span has a character of one of the spans, which are in order and apart."""
    before = bisect_left(spans, end, key=itemgetter(0))  # these start before it ends
    return before > 0 and start < spans[before - 1][1]


def made_at(backend: tokenizers.Tokenizer, text: str, spans: Sequence[Span], ids: Mapping[str, int]) -> list[Span]:
    """Those spans where the tokenizer makes the token that stands there. It may not: `single_word`, `normalized`."""
    found = backend.encode(text, add_special_tokens=False)
    by_place = {k: i for i, (a, b) in zip(found.ids, found.offsets, strict=True) for k in range(a, b)}
    return [(a, b) for a, b in spans if any(by_place.get(k, -1) == ids.get(text[a:b]) for k in range(a, b))]


@dataclass(frozen=True, slots=True)
class Aliased:
    """tokenizer: the second one; alias: of each spelling; ids: of the aliases there; back: the first one's."""

    tokenizer: tokenizers.Tokenizer
    alias: Mapping[str, str]
    ids: Mapping[str, int]
    back: Mapping[int, int]

    def encode(self, text: str, matches: Sequence[Span]) -> list[int]:
        """Ids of a text in which the tokens at `matches`, in order, are meant and no others."""
        while True:
            written, places = self.written(text, matches)
            made = set(made_at(self.tokenizer, written, places, self.ids))
            if len(made) == len(places):
                return [self.back.get(i, i) for i in self.tokenizer.encode(written, add_special_tokens=False).ids]
            matches = [match for match, place in zip(matches, places, strict=True) if place in made]  # the rest is text

    def written(self, text: str, matches: Sequence[Span]) -> tuple[str, list[Span]]:
        """The text with aliases at `matches`, and where they stand."""
        parts: list[str] = []
        places: list[Span] = []
        at = length = 0
        for start, end in matches:
            parts += [text[at:start], self.alias[text[start:end]]]
            length += start - at + 1
            places.append((length - 1, length))
            at = end
        return "".join([*parts, text[at:]]), places


def unused(text: str, count: int) -> int:
    """The first of `count` private-use characters in a row of which the text holds none. Raises TokenizerError."""
    held = sorted({ord(character) for character in text if ord(character) in PRIVATE})
    start = PRIVATE.start
    for code in [*held, PRIVATE.stop]:
        if code - start >= count:
            return start
        start = code + 1
    raise TokenizerError("a text that spells a special token holds too many private-use characters to keep it apart")


def aliased(backend: tokenizers.Tokenizer, spellings: Mapping[str, int], alphabet: int) -> Aliased:
    """The second tokenizer of one. spellings: the tokens that steer, with their ids; alphabet: the first alias.

    Raises TokenizerError.
    """
    alias = {spelling: chr(alphabet + k) for k, spelling in enumerate(sorted(spellings))}
    description = json.loads(backend.to_str())
    description["post_processor"] = None
    for token in description["added_tokens"]:
        if backend.encode_special_tokens:  # it splits what was ever special, and describes what is special now
            made = backend.encode(token["content"], add_special_tokens=False).ids
            token["special"] = token["special"] or token["id"] not in made
        if (name := alias.get(token["content"])) is not None:
            stays = backend.normalizer is None or name in backend.normalizer.normalize_str(name)
            token |= {"content": name, "normalized": token["normalized"] and stays}
    rename(description["model"], alias)
    try:
        second = tokenizers.Tokenizer.from_str(json.dumps(description))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise TokenizerError(f"this tokenizer cannot keep a caller's special tokens apart: {error}") from error
    second.encode_special_tokens = backend.encode_special_tokens
    second.no_truncation()
    second.no_padding()
    ids = {name: int(i) for name in alias.values() if (i := second.token_to_id(name)) is not None}
    return Aliased(
        second, alias, ids, {ids[alias[spelling]]: i for spelling, i in spellings.items() if alias[spelling] in ids}
    )


def rename(model: dict[str, Any], alias: Mapping[str, str]) -> None:
    """A model's own pieces by their aliases, so that it cannot make them of text either. BPE's merges into them go."""
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {alias.get(piece, piece): i for piece, i in vocabulary.items()}
    elif isinstance(vocabulary, list):
        model["vocab"] = [[alias.get(piece, piece), score] for piece, score in vocabulary]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = alias.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        pairs = ((merge, merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"])
        model["merges"] = [merge for merge, (left, right) in pairs if not {left, right, left + right} & alias.keys()]
