"""A prompt and a response as a pair of texts, as encoders read them: the ids of `tokenizer(prompt, response)`.

A tokenizer reads each text of a pair by itself and puts its own tokens around both:

    before  prompt  middle  response  after          [CLS] prompt [SEP] response [SEP]
       0       0       0        1       1            token types, where the model has them

So is a batch read. A response that is empty has its place too, which transformers leaves out for a single pair.

So each text goes through the same guard as any other text: a special token that a caller spells is plain text. What
stands around the two is read off one pair, and checked on another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from lightrm.errors import TokenizerError
from lightrm.text.checkpoint_tokenizer import UNUSABLE, CheckpointTokenizer
from lightrm.text.tokenizer_limits import as_tokenizer_errors

CHECKED = "How do I make tea?", "Boil water, and pour it over 2 leaves."


@dataclass(frozen=True, slots=True)
class Segments:
    """The token types of a pair: 0 up to the first `divider`, the ids between the two texts, and 1 behind it."""

    divider: tuple[int, ...]

    def first(self, ids: Sequence[int]) -> int:
        """Return how many ids belong to the first text with its divider: all, if there is no divider."""
        size = len(self.divider)
        starts = (k for k in range(len(ids) - size + 1) if tuple(ids[k : k + size]) == self.divider)
        return next((k + size for k in starts), len(ids))

    def types(self, ids: Sequence[int]) -> list[int]:
        first = self.first(ids)
        return [0] * first + [1] * (len(ids) - first)


@dataclass(frozen=True, slots=True)
class Frame:
    """The ids that a tokenizer puts before, between and behind the two texts of a pair."""

    before: list[int]
    middle: list[int]
    after: list[int]

    @property
    def size(self) -> int:
        return len(self.before) + len(self.middle) + len(self.after)

    def around(self, first: list[int], second: list[int]) -> list[int]:
        return [*self.before, *first, *self.middle, *second, *self.after]


class PairTexts:
    """Reads pairs of texts with a checkpoint's own tokenizer."""

    def __init__(self, tokenizer: CheckpointTokenizer) -> None:
        """Raises TokenizerError if what the tokenizer puts around a pair cannot be told from the texts."""
        self.tokenizer = tokenizer
        one, two = (tokenizer.plain(text, False) for text in ("a", "b"))
        ids, _ = self.both("a", "b")
        start = place(ids, one, range(len(ids)))
        end = place(ids, two, range(len(ids) - len(two), start + len(one) - 1, -1))
        self.frame = Frame(ids[:start], ids[start + len(one) : end], ids[end + len(two) :])
        first, second = (tokenizer.plain(text, False) for text in CHECKED)
        if min(start, end) < 0 or self.both(*CHECKED)[0] != self.frame.around(first, second):
            raise TokenizerError(
                f"{tokenizer.folder}: what the tokenizer puts around a pair of texts cannot be told from the texts"
            )

    def both(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """Return the ids and the token types that the tokenizer itself gives a pair; no types if it has none."""
        with self.tokenizer.lock, as_tokenizer_errors(UNUSABLE.format(self.tokenizer.folder)):
            found = self.tokenizer.tokenizer(first, second, truncation=False, padding=False, verbose=False)
        return list(found["input_ids"]), list(found.get("token_type_ids") or ())

    @cached_property
    def segments(self) -> Segments | None:
        """How token types follow from ids; None if all are 0. Raises TokenizerError if they follow another rule."""
        ids, types = self.both(*CHECKED)
        if not any(types):
            return None
        found = Segments(tuple(self.frame.middle))
        if not found.divider or found.types(ids) != types:
            raise TokenizerError(
                f"{self.tokenizer.folder}: the tokenizer gives a pair of texts the token types {types}; lightrm knows "
                "0 for the first text and 1 for the second"
            )
        return found

    def encode(self, prompt: str, responses: Sequence[str], limit: int) -> list[tuple[list[int], list[int]]]:
        """Return, for each response, all ids and those that are kept within `limit`: as the tokenizers library cuts
        pairs, the shorter text is kept whole if the longer one can make up for it, else each gets half."""
        first, *seconds = self.tokenizer.encode_all(
            [prompt, *responses], whole=False, written=[((0, len(text)),) for text in (prompt, *responses)]
        )
        self.check_divider(first)
        room = max(0, limit - self.frame.size)
        found = []
        for second in seconds:
            a, b = kept_of(len(first), len(second), room)
            kept = self.frame.around(self.cut(first, a), self.cut(second, b))
            found.append((self.frame.around(first, second), kept))
        return found

    def check_divider(self, first: list[int]) -> None:
        """Raise TokenizerError if a first text holds the divider, by which the types would go wrong."""
        if self.segments is not None and self.segments.first([*first, *self.frame.middle]) <= len(first):
            raise TokenizerError(
                f"{self.tokenizer.folder}: the prompt spells what divides it from the response; remove it from the text"
            )

    def cut(self, ids: list[int], count: int) -> list[int]:
        left = self.tokenizer.tokenizer.truncation_side == "left"
        return ids[len(ids) - count :] if left else ids[:count]

    def text(self, prompt: str, response: str) -> str:
        """Return both texts with the pieces around them, as one text to look at."""
        pieces = self.tokenizer.tokenizer.convert_ids_to_tokens
        before, middle, after = (
            "".join(pieces(ids)) for ids in (self.frame.before, self.frame.middle, self.frame.after)
        )
        return f"{before}{prompt}{middle}{response}{after}"


def place(ids: list[int], part: list[int], starts: range) -> int:
    """Return the first of `starts` at which a part stands in ids, -1 if it stands nowhere."""
    return next((k for k in starts if ids[k : k + len(part)] == part), -1)


def kept_of(first: int, second: int, room: int) -> tuple[int, int]:
    """Return how many tokens of each of two texts are kept within `room`."""
    if first + second <= room:
        return first, second
    shorter = min(first, second)
    if 2 * shorter > room:
        half = room // 2  # the longer text gets the odd one
        return (half, room - half) if first <= second else (room - half, half)
    return (first, room - first) if first <= second else (room - second, second)
