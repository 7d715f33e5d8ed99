"""What lightrm and transformers make of the same folder and the same conversation, side by side.

`Ours` is the one place that calls lightrm's text side, `Theirs` the one that calls transformers.
"""

from __future__ import annotations

import re
import warnings
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime, tzinfo
from html import unescape
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hypothesis import HealthCheck, given, seed, settings
from hypothesis.strategies import DataObject, SearchStrategy, data

from lightrm.errors import LightRMError
from lightrm.text.chat_template import DATE
from lightrm.text.conversation import turns_of
from lightrm.text.encoding import Encoded, Tokens, read_tokens
from lightrm.text.templates import AnyTemplate, find_template
from tests.chat_draws import Message, conversations, texts
from tests.tokenizer_draws import MAY_BE_REFUSED, PLAIN, Folder

ENDLESS = 10**6
UNKNOWN = ("<unk>", "[UNK]")  # made of any character that a vocabulary lacks, too
UNTOLD = "cannot be told"  # whose a token is, in the message of a refusal
HARMLESS = ("<think>", "</think>", "<p>")  # a model's own reasoning, and HTML


@dataclass(frozen=True, slots=True)
class Refused:
    """A refusal, and whether it is one that a caller can catch by lightrm's root error."""

    message: str
    raw: bool = False


@dataclass(frozen=True, slots=True)
class Made:
    """The ids, and the text that a template rendered (of lightrm: as it tells the caller)."""

    ids: list[int]
    text: str | None


def refused(error: BaseException) -> Refused:
    """What transformers raised; a panic of the tokenizers library is no Exception. Raises all that is no refusal."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    return Refused(f"{type(error).__name__}: {error}")


def refusal(error: Exception) -> Refused:
    return Refused(f"{type(error).__name__}: {error}", raw=not isinstance(error, LightRMError))


class Ours:
    """lightrm's text side of one folder."""

    def __init__(self, folder: Path, parse_specials: bool) -> None:
        self.tokens: Tokens | Refused
        try:
            self.tokens = read_tokens(folder, parse_specials=parse_specials)
        except Exception as error:
            self.tokens = refusal(error)

    def chat(self, messages: Sequence[Message]) -> Made | Refused:
        """A conversation whose last turn is the answer that is scored."""
        return self.encode("chat", turns_of(messages[:-1]), messages[-1]["content"])

    def plain(self, text: str) -> Made | Refused:
        return self.encode("plain", [{"role": "user", "content": text}], "")

    def encode(self, template: str, turns: Sequence[Message], response: str) -> Made | Refused:
        if isinstance(self.tokens, Refused):
            return self.tokens
        try:
            form = self.tokens.own_template() if template == "chat" else find_template(template)
            made = self.encode_beside(form, turns, response)
            text = self.tokens.text(form, turns, response)
        except Exception as error:
            return refusal(error)
        return Made(made.token_ids, text)

    def encode_beside(self, form: AnyTemplate, turns: Sequence[Message], response: str) -> Encoded:
        """As the second of two answers, which begin alike: what they share is tokenized once."""
        assert isinstance(self.tokens, Tokens)
        for others in ((f"{response}.",), ()):
            with suppress(*((Exception,) if others else ())):  # the other answer may be refused, and this one not
                return self.tokens.encode(form, turns, (*others, response), ENDLESS, strict=False)[-1]
        raise AssertionError


class Dated(datetime):
    """A clock that shows the date that lightrm's templates see."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Dated:
        return cls(*DATE.timetuple()[:6])


class Theirs:
    """transformers' tokenizer of one folder."""

    def __init__(self, folder: Path) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        self.tokenizer: Any
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self.tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
            except BaseException as error:
                self.tokenizer = refused(error)

    @property
    def name(self) -> str:
        return type(self.tokenizer).__name__

    @property
    def loaded(self) -> bool:
        return not isinstance(self.tokenizer, Refused)

    def chat(self, messages: Sequence[Message]) -> Made | Refused:
        if isinstance(self.tokenizer, Refused):
            return self.tokenizer
        text = None
        try:
            messages = self.as_read(messages)
            with patch("transformers.utils.chat_template_utils.datetime", Dated):
                text = self.tokenizer.apply_chat_template(messages, tokenize=False)
                ids = self.fresh(text).apply_chat_template(messages, tokenize=True, return_dict=False)
        except BaseException as error:
            return Made([], text) if text is not None and self.fills(text) else refused(error)
        return Made(ids, text)

    def fills(self, text: str) -> bool:
        """Whether CodeLlama's class would fill in there."""
        return (getattr(self.tokenizer, "fill_token", None) or "\0 none") in text

    def fresh(self, text: str) -> Any:
        """The tokenizer, or a copy for a text that would change how it reads later ones."""
        return deepcopy(self.tokenizer) if self.fills(text) else self.tokenizer

    def as_read(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The same with a list of parts as one string where the template does not write each part by itself: there
        transformers refuses, drops it, or writes it as Python does."""
        lists = {k: turn["content"] for k, turn in enumerate(messages) if isinstance(turn.get("content"), list)}
        joined = [
            {**turn, "content": "".join(part["text"] for part in lists[k])} if k in lists else turn
            for k, turn in enumerate(messages)
        ]
        found = [*messages]
        for k, parts in lists.items():
            names = [f"9007{k}{i}7009" for i in range(len(parts))]
            listed = {**messages[k], "content": [{"type": "text", "text": name} for name in names]}
            together = self.rendered([*messages[:k], listed, *messages[k + 1 :]])
            alone = self.rendered([*joined[:k], listed, *joined[k + 1 :]])
            if together is None or alone is None or as_python(alone) or not all(name in alone for name in names):
                found[k] = joined[k]
        return found

    def rendered(self, messages: Sequence[Message]) -> str | None:
        try:
            with patch("transformers.utils.chat_template_utils.datetime", Dated):
                return str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception:
            return None

    def plain(self, text: str) -> Made | Refused:
        if isinstance(self.tokenizer, Refused):
            return self.tokenizer
        try:
            return Made(self.fresh(text)(text)["input_ids"], None)
        except BaseException as error:
            return refused(error)

    def ids(self, text: str) -> list[int]:
        """Of a text alone; none where the tokenizer cannot encode it."""
        try:
            return list(self.tokenizer.encode(text, add_special_tokens=False))
        except BaseException as error:
            refused(error)
            return []

    def controls(self, user_defined: Sequence[str]) -> dict[int, str]:
        """Tokens that steer a model, by id: added ones but for those that are words, and marks of a sentencepiece.
        A mark that is harmless elsewhere steers where it is the tokenizer's bos, eos, pad or the like."""
        added = self.tokenizer.added_tokens_decoder
        found = {i: token.content for i, token in added.items() if token.special or token.content not in PLAIN}
        vocabulary = self.tokenizer.get_vocab()
        found |= {vocabulary[name]: name for name in user_defined if name in vocabulary}
        harmless = set(HARMLESS) - {str(token) for token in self.tokenizer.special_tokens_map.values()}
        return {i: name for i, name in found.items() if name.strip() and name not in harmless}

    def steering(self, controls: Mapping[int, str]) -> set[int]:
        """Those that no plain text makes: the unknown token, under whatever name, is made of any strange character."""
        unknown = {self.tokenizer.get_vocab().get(str(self.tokenizer.unk_token)), *self.ids("\U0010fffd")}
        return {i for i, spelling in controls.items() if spelling not in UNKNOWN and i not in unknown}

    def offsets(self, text: str) -> list[tuple[int, int]]:
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(found["offset_mapping"])


def as_python(text: str) -> bool:
    """Whether a text holds a list of parts, or a part, as Python writes it, in whatever a filter makes of that."""
    plain = unescape(text).lower()
    return "'type'" in plain or "'epyt'" in plain


@dataclass(frozen=True, slots=True)
class Finding:
    """One comparison. `fault`: None where all is right."""

    rule: str  # "chat" or "text" with specials parsed; "asleep" or "awake": the protection
    class_name: str  # transformers' class
    case: Any
    fault: str | None
    made: bool  # transformers gave ids
    refused: bool = False  # lightrm says that it cannot tell whose a token is


Draw = Callable[[SearchStrategy[Any]], Any]


def parsed_specials(folder: Folder, path: Path, draw: Draw) -> Iterator[Finding]:
    """With parse_specials=True: two chats and two plain texts."""
    theirs, ours = Theirs(path), Ours(path, parse_specials=True)
    pairs: list[tuple[str, Any, Made | Refused, Made | Refused]] = []
    for _ in range(2):
        messages = draw(conversations(folder.added))
        pairs.append(("chat", messages, ours.chat(messages), theirs.chat(messages)))
    for _ in range(2):
        text = draw(texts(folder.added))
        pairs.append(("text", text, ours.plain(text), theirs.plain(text)))
    for rule, case, mine, wanted in pairs:
        fault = pardoned(folder, equal_ids(mine, wanted, theirs.loaded))
        yield Finding(rule, theirs.name, case, fault, isinstance(wanted, Made))


def protected(folder: Folder, path: Path, draw: Draw) -> Iterator[Finding]:
    """As users get it: a chat without control tokens in what they wrote, and two with some."""
    theirs, ours = Theirs(path), Ours(path, parse_specials=False)
    if not theirs.loaded:
        return
    controls = theirs.controls(folder.user_defined)
    messages = draw(conversations())
    wanted = theirs.chat(messages)
    if not holds(controls, theirs, written(messages)):
        fault = pardoned(folder, equal_ids(ours.chat(messages), wanted))
        yield Finding("asleep", theirs.name, messages, fault, isinstance(wanted, Made))
    for _ in range(2):
        messages = draw(conversations(tuple(controls.values()) or ("<s>",)))
        mine, whole = ours.chat(messages), theirs.chat(messages)
        refused = isinstance(mine, Refused) and UNTOLD in mine.message and isinstance(whole, Made)
        fault = None if refused else pardoned(folder, kept_apart(mine, theirs, controls, messages))
        yield Finding("awake", theirs.name, messages, fault, isinstance(whole, Made), refused)


def pardoned(folder: Folder, fault: str | None) -> str | None:
    """lightrm may say that it does not know a class that builds a tokenizer of its own."""
    known = folder.class_name not in MAY_BE_REFUSED
    return fault if fault is None or known or not fault.startswith("refused") else None


def drawn(check: Callable[[DataObject], None], batches: Iterable[int]) -> None:
    """Ten draws of each batch; a batch always draws the same.

    Small batches, since Hypothesis makes most of the later draws of a run by changing little in an earlier one.
    """
    calm = settings(max_examples=10, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    for batch in batches:
        seed(batch)(calm(given(data())(check)))()


def equal_ids(ours: Made | Refused, theirs: Made | Refused, loaded: bool = True) -> str | None:
    """None if the ids are transformers', else what is wrong.

    What transformers cannot load lightrm may understand; what it refuses to render, lightrm refuses too.
    """
    if isinstance(ours, Refused):
        if ours.raw:
            return f"a raw exception: {ours.message}"
        nothing = isinstance(theirs, Refused) or not theirs.ids  # without a token there is nothing to score
        return None if nothing else f"refused: {ours.message}"
    if isinstance(theirs, Refused):
        return f"transformers refuses: {theirs.message}" if loaded else None
    if theirs.text is not None and ours.text != theirs.text:
        return f"another text: {ours.text!r} for {theirs.text!r}"
    return None if ours.ids == theirs.ids else f"other ids: {ours.ids} for {theirs.ids} of {ours.text!r}"


def holds(controls: Mapping[int, str], theirs: Theirs, texts: Sequence[str]) -> bool:
    """Whether what users wrote holds a control token, as they wrote it or as the tokenizer normalizes it."""
    whole = "".join(texts)
    if any(spelling in whole for spelling in controls.values()):
        return True
    steering = theirs.steering(controls)
    return any(not steering.isdisjoint(theirs.ids(text)) for text in texts)


def kept_apart(
    ours: Made | Refused, theirs: Theirs, controls: Mapping[int, str], messages: list[Message]
) -> str | None:
    """None if no control token of ours comes from what users wrote, and all else is transformers'.

    The measure is transformers on the same conversation with a word of no meaning for each spelling: its control tokens
    are the template's own, and what lies between two of them does not depend on the rest.
    """
    whole = theirs.chat(messages)
    other = neutral(theirs, controls, messages, whole.text or "") if isinstance(whole, Made) else None
    if isinstance(ours, Refused) and not ours.raw and other is None:
        return None  # the template looks at what is replaced: lightrm may say that it cannot tell whose a token is
    if isinstance(ours, Refused) or isinstance(whole, Refused):
        return equal_ids(ours, whole)
    if ours.text != whole.text:
        return f"another text: {ours.text!r} for {whole.text!r}"
    return None if other is None else beside(ours, other, theirs, controls)


def beside(ours: Made, other: Made, theirs: Theirs, controls: Mapping[int, str]) -> str | None:
    """None if the control tokens are those of the neutral conversation, and the runs that hold no word of it equal."""
    steering = theirs.steering(controls)
    marks, runs = sections(ours.ids, steering)
    wanted_marks, wanted_runs = sections(other.ids, steering)
    if marks != wanted_marks:
        return f"control tokens {marks}, the template's own are {wanted_marks}, in {ours.ids} of {ours.text!r}"
    text = other.text or ""
    places = zip(other.ids, theirs.offsets(text), strict=True)
    starts = [start for token_id, (start, _) in places if token_id in steering]
    touched = {bisect_right(starts, match.start()) for match in WORD.finditer(text)}
    for k, (run, wanted) in enumerate(zip(runs, wanted_runs, strict=True)):
        if k not in touched and run != wanted:
            return f"other ids beside the caller's spelling: {run} for {wanted} in {ours.text!r}"
    return None


def written(messages: Sequence[Message]) -> list[str]:
    """Every text that users wrote, in a content or in a field beside it."""
    found: list[str] = []

    def keep(said: str) -> str:
        found.append(said)
        return said

    changed(messages, keep)
    return found


def changed(value: Any, change: Callable[[str], str]) -> Any:
    """The same messages, each text in them changed but the names of roles."""
    if isinstance(value, dict):
        return {key: part if key == "role" else changed(part, change) for key, part in value.items()}
    if isinstance(value, list):
        return [changed(part, change) for part in value]
    return change(value) if isinstance(value, str) else value


WORD = re.compile("<zq([0-9]+)qz>")


def neutral(theirs: Theirs, controls: Mapping[int, str], messages: list[Message], text: str) -> Made | None:
    """transformers on the same conversation with a word for each control token that users wrote.

    None if the template looks at what is replaced: with the spellings put back, its text is not `text`.
    """
    spellings = sorted({*controls.values()}, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, spellings)) or "(?!)")
    other = theirs.chat(changed(messages, lambda said: pattern.sub(lambda m: f"<zq{spellings.index(m[0])}qz>", said)))
    if isinstance(other, Refused) or WORD.search(text):
        return None
    back = WORD.sub(lambda match: spellings[int(match[1])], other.text or "")
    return other if back == text else None


def sections(ids: Sequence[int], controls: Collection[int]) -> tuple[list[int], list[list[int]]]:
    """The control tokens in order, and the runs of ids before, between and after them."""
    marks: list[int] = []
    runs: list[list[int]] = [[]]
    for token_id in ids:
        if token_id in controls:
            marks.append(token_id)
            runs.append([])
        else:
            runs[-1].append(token_id)
    return marks, runs
