"""What lightrm and transformers make of the same folder and the same conversation, side by side.

`Ours` is the one place that calls lightrm's text side, `Theirs` the one that calls transformers.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightrm.errors import LightRMError
from lightrm.templates import find_template
from lightrm.tokens import Encoded, Tokens, read_tokens
from tests.chat_draws import Message
from tests.tokenizer_draws import PLAIN

ENDLESS = 10**6


@dataclass(frozen=True, slots=True)
class Refused:
    """A refusal, and whether it is one that a caller can catch by lightrm's root error."""

    message: str
    raw: bool = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Refused) and not (self.raw or other.raw)


@dataclass(frozen=True, slots=True)
class Made:
    """The ids, and the text that they were made of (of lightrm: as it tells the caller)."""

    ids: list[int]
    text: str


def refusal(error: Exception) -> Refused:
    return Refused(f"{type(error).__name__}: {error}", raw=not isinstance(error, LightRMError))


class Ours:
    """lightrm's text side of one folder."""

    def __init__(self, folder: Path, parse_specials: bool) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.tokens: Tokens | Refused
        try:
            self.tokens = read_tokens(folder, parse_specials=parse_specials, fallback=config)
        except Exception as error:
            self.tokens = refusal(error)

    def chat(self, messages: Sequence[Message]) -> Made | Refused:
        """A conversation whose last turn is the answer that is scored."""
        return self.encode("chat", messages[:-1], messages[-1]["content"])

    def plain(self, text: str) -> Made | Refused:
        return self.encode("plain", [{"role": "user", "content": text}], "")

    def encode(self, template: str, turns: Sequence[Message], response: str) -> Made | Refused:
        if isinstance(self.tokens, Refused):
            return self.tokens
        try:
            form = self.tokens.own_template() if template == "chat" else find_template(template)
            made: Encoded = self.tokens.encode(form, turns, response, ENDLESS, strict=False)
        except Exception as error:
            return refusal(error)
        return Made(made.token_ids, made.text)


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
            except Exception as error:
                self.tokenizer = Refused(f"{type(error).__name__}: {error}")

    def chat(self, messages: Sequence[Message]) -> Made | Refused:
        if isinstance(self.tokenizer, Refused):
            return self.tokenizer
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
            ids = self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        except Exception as error:
            return Refused(f"{type(error).__name__}: {error}")
        return Made(ids, text)

    def plain(self, text: str) -> Made | Refused:
        if isinstance(self.tokenizer, Refused):
            return self.tokenizer
        try:
            return Made(self.tokenizer(text)["input_ids"], text)
        except Exception as error:
            return Refused(f"{type(error).__name__}: {error}")

    def controls(self) -> dict[int, str]:
        """Added tokens that steer a model: the special ones, and those that look like a mark."""
        if isinstance(self.tokenizer, Refused):
            return {}
        added = self.tokenizer.added_tokens_decoder
        return {i: token.content for i, token in added.items() if token.special or token.content not in PLAIN}

    def holds_control(self, text: str) -> bool:
        """Whether a text by itself, as one wrote it or as the tokenizer normalizes it, holds a control token."""
        controls = self.controls()
        if any(spelling in text for spelling in controls.values()):
            return True
        return not set(controls).isdisjoint(self.tokenizer.encode(text, add_special_tokens=False))


def sections(ids: Sequence[int], controls: Sequence[int]) -> tuple[list[int], list[list[int]]]:
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
