"""User text never acts as a special token: which tokens steer a model, and a tokenizer that lets only the template's
act.

A text is tokenized whole, so that everything in it is read as the library reads it. If the caller's words spell a token
that steers the model, a second tokenizer is used. It is the same except that each such token is spelled by one
private-use character, its alias. The template's tokens are written as aliases; what the caller wrote then matches no
special token and is read as text.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import tokenizers

from lightrm.errors import TokenizerError

Span = tuple[int, int]  # characters start to end of a text
PRIVATE = range(0xF0000, 0xFFFFE)  # characters that no vocabulary has
OPENING, CLOSING = "<[{◁＜「【", ">]}▷＞」】"
# Marks that a model writes around its reasoning, in its own answer.
THOUGHT = re.compile(r"[<\[{◁]/?(\w+:)?think(ing)?[>\]}▷]", re.IGNORECASE)
# HTML elements are ordinary words of a vocabulary. `<s>` is missing on purpose: it is BOS.
ELEMENTS = (
    "a|abbr|article|aside|b|base|big|blockquote|body|br|button|caption|center|cite|code|col|dd|del|details|"
    "div|dl|dt|em|figcaption|figure|font|footer|form|h[1-6]|head|header|hr|html|i|img|input|ins|kbd|label|li|"
    "link|main|mark|meta|nav|ol|option|p|param|pre|q|samp|script|section|select|small|span|strike|strong|"
    "style|sub|summary|sup|table|tbody|td|textarea|tfoot|th|thead|title|tr|tt|u|ul|var|video"
)
TAG = re.compile(rf"</?({ELEMENTS})\s*/?>", re.IGNORECASE)


def steers(spelling: str, special: bool) -> bool:
    """Whether a token of this spelling steers a model: every token marked as special, and every mark in brackets,
    however the vocabulary lists it. Spaces, digits, words, HTML tags and the marks of a model's own reasoning are text.
    """
    if not spelling.strip() or THOUGHT.fullmatch(spelling):
        return False
    if special:
        return True
    if TAG.fullmatch(spelling):
        return False
    return len(spelling) > 2 and spelling[0] in OPENING and spelling[-1] in CLOSING and not re.search(r"\s", spelling)


def pattern_of(spellings: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of the spellings, the longest first; nothing if there are none."""
    longest_first = sorted({s for s in spellings if s}, key=lambda s: (-len(s), s))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def overlaps(start: int, end: int, spans: Sequence[Span]) -> bool:
    """Whether start .. end has a character in common with one of the spans, which are in order and do not overlap."""
    before = bisect_left(spans, end, key=itemgetter(0))  # these start before it ends
    return before > 0 and start < spans[before - 1][1]


def made_at(
    backend: tokenizers.Tokenizer, text: str, spans: Sequence[Span], ids: Mapping[str, int], spelled: Iterable[str]
) -> list[Span]:
    """Return the spans where the tokenizer really makes the token that is spelled there. With the flags `single_word`
    and `normalized` it may not.

    spelled: every token that the text spells, in `spans` or elsewhere. A token that is made as often as it is spelled
    is made everywhere. Only for others the library's offsets decide: a normalizer that deletes characters shifts them.
    """
    found = backend.encode(text, add_special_tokens=False)
    made, wanted = Counter(found.ids), Counter(spelled)
    by_place = {k: i for i, (a, b) in zip(found.ids, found.offsets, strict=True) for k in range(a, b)}

    def is_made(start: int, end: int) -> bool:
        token_id = ids.get(text[start:end])
        everywhere = token_id is not None and made[token_id] == wanted[text[start:end]]
        return everywhere or any(by_place.get(k, -1) == token_id for k in range(start, end))

    return [span for span in spans if is_made(*span)]


@dataclass(frozen=True, slots=True)
class Aliased:
    """tokenizer: the second tokenizer. alias: of each spelling. ids: of the aliases in it. back: its ids -> the first
    one's."""

    tokenizer: tokenizers.Tokenizer
    alias: Mapping[str, str]
    ids: Mapping[str, int]
    back: Mapping[int, int]

    def encode(self, text: str, matches: Sequence[Span]) -> list[int]:
        """Return the ids of a text in which the special tokens at `matches` act, and no others. matches: in order."""
        while True:
            written, places = self.written(text, matches)
            made = set(made_at(self.tokenizer, written, places, self.ids, [written[a:b] for a, b in places]))
            if len(made) == len(places):
                return [self.back.get(i, i) for i in self.tokenizer.encode(written, add_special_tokens=False).ids]
            matches = [
                match for match, place in zip(matches, places, strict=True) if place in made
            ]  # the others are text

    def written(self, text: str, matches: Sequence[Span]) -> tuple[str, list[Span]]:
        """Return the text with aliases at `matches`, and the spans of the aliases."""
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
    """Return the first of `count` consecutive private-use characters that the text does not hold. Raises
    TokenizerError."""
    held = sorted({ord(character) for character in text if ord(character) in PRIVATE})
    start = PRIVATE.start
    for code in [*held, PRIVATE.stop]:
        if code - start >= count:
            return start
        start = code + 1
    raise TokenizerError("a text that spells a special token holds too many private-use characters to keep it apart")


def aliased(backend: tokenizers.Tokenizer, spellings: Mapping[str, int], alphabet: int) -> Aliased:
    """Make the second tokenizer of a tokenizer. spellings: steering tokens with their ids; alphabet: the first alias.

    Raises TokenizerError if the library refuses it.
    """
    alias = {spelling: chr(alphabet + k) for k, spelling in enumerate(sorted(spellings))}
    description = json.loads(backend.to_str())
    description["post_processor"] = None
    for token in description["added_tokens"]:
        if backend.encode_special_tokens:  # it splits all that was ever special, and lists what is special now
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
    """Replace a model's own pieces by their aliases, so that it cannot make them from text either. BPE merges that
    would make them are removed."""
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
