"""The checkpoint's own chat template: Jinja text written by a stranger, run in a sandbox as transformers runs it.

The template sees the conversation unchanged. If the caller's text spells a special token, the template is rendered a
second time with stand-ins of the same length in place of these spellings. Where stand-ins appear in the second
rendering, the first one holds the caller's text.

A template that asks for today's date always gets DATE; otherwise scores would change from day to day.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import count
from typing import Any

import jinja2

from lightrm.errors import TemplateError
from lightrm.text.guard import Span
from lightrm.text.sandbox import render, template_of
from lightrm.text.templates import Cut, Ending, Rendered, Turn, said

DATE = datetime(2024, 7, 26)  # the date that Llama 3's own template uses by default
CLOCK = "strftime_now"
STAND_INS = [chr(code) for code in range(0x10600, 0x10737)]  # Linear A: printable letters without case
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # three names of one field


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """source: the Jinja text, which writes BOS itself. context: the tokenizer's special tokens by name."""

    source: str
    context: Mapping[str, str]
    ending: Ending = "none"
    name: str = "chat"
    cut: Cut = "prompt start"
    max_length: int | None = None
    whole: bool = False

    @property
    def dated(self) -> bool:
        """Whether the template asks for a date."""
        return CLOCK in self.source

    def __str__(self) -> str:
        return f"{self.name}, dated {DATE:%d %b %Y}" if self.dated else self.name

    def render(self, turns: Sequence[Turn], responses: Sequence[str], specials: re.Pattern[str]) -> list[Rendered]:
        """Return the text of a conversation with each answer, and where the caller spelled special tokens in it.

        Each answer is rendered with the whole conversation, since a template may treat an answer in any way. That takes
        about a fiftieth of the time that the tokenizer needs. Raises TemplateError if the template refuses the
        conversation, fails, or does not end.
        """
        prompt = self.as_read([plain(turn) for turn in turns])
        spells = any(specials.search(written) for written in strings(prompt))
        found = []
        for response in responses:
            messages = [*prompt, {"role": "assistant", "content": response}]
            text = self.text(messages)
            written = self.written(messages, text, specials) if spells or specials.search(response) else ()
            found.append(Rendered(text, written))
        return found

    def text(self, messages: Sequence[Mapping[str, Any]]) -> str:
        context = {"tools": None, "documents": None, "add_generation_prompt": False, **self.context}
        return render(compiled(self.source), {"messages": messages, **context})

    def as_read(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the messages, with a list of text parts as one string where the template does not write the parts.

        A template that knows nothing of lists refuses one, leaves it out, or writes it as Python does. A rendering with
        a mark in place of each text shows what it does.
        """
        if not any(isinstance(message.get("content"), list) for message in messages):
            return messages
        stand_in = self.unseen(messages)
        marks = (f"{stand_in}1{k}2{stand_in}" for k in count())  # not the same backwards
        marked = [
            {**message, "content": Shown(message["content"], marks)}
            if isinstance(message.get("content"), list)
            else message
            for message in messages
        ]
        try:
            text = self.text([*marked, {"role": "assistant", "content": "x"}])
        except TemplateError:
            text = None
        return [
            message if message is other or reads(text, other["content"]) else {**message, "content": said(message)}
            for message, other in zip(messages, marked, strict=True)
        ]

    def written(self, messages: Sequence[dict[str, Any]], text: str, specials: re.Pattern[str]) -> tuple[Span, ...]:
        """Return the spans of `text` in which the caller spelled special tokens. Raises TemplateError if they cannot be
        found."""
        stand_in = self.unseen(messages, text)
        other = self.text(
            [with_strings(m, lambda s: specials.sub(lambda f: stand_in * len(f[0]), s)) for m in messages]
        )
        spans = tuple(match.span() for match in re.finditer(f"{stand_in}+", other))
        if len(other) == len(text) and all(a in (b, stand_in) for a, b in zip(other, text, strict=True)):
            return spans
        # The template depends on what the caller spelled. If it removed all of it, no span is the caller's.
        if Counter(specials.findall(text)) == Counter(specials.findall(other)):
            return ()
        held = sorted({found for written in strings(messages) for found in specials.findall(written)})
        raise TemplateError(
            f"the chat template looks for {', '.join(map(repr, held))} in the text, and whether the ones it writes are "
            "its own or the caller's cannot be told: remove them from the text, or load with parse_specials=True"
        )

    def unseen(self, messages: Sequence[Mapping[str, Any]], text: str = "") -> str:
        """Return a letter that neither the conversation nor the template nor `text` holds. Raises TemplateError."""
        seen = {*text, *self.source, *"".join(strings(messages)), *"".join(self.context.values())}
        stand_in = next((character for character in STAND_INS if character not in seen), None)
        if stand_in is None:
            raise TemplateError(
                "the conversation holds every letter of Linear A, and one that it does not hold is needed"
            )
        return stand_in


class Shown(list[dict[str, Any]]):
    """Text parts with a mark in place of each text. mark: what Python writes for the list, or for a part of it."""

    def __init__(self, parts: Sequence[Mapping[str, Any]], marks: Iterator[str]) -> None:
        self.mark = next(marks)
        super().__init__(ShownPart({**part, "text": next(marks)}, self.mark) for part in parts)

    def __repr__(self) -> str:
        return self.mark


class ShownPart(dict[str, Any]):
    def __init__(self, part: Mapping[str, Any], mark: str) -> None:
        self.mark = mark
        super().__init__(part)

    def __repr__(self) -> str:
        return self.mark


def reads(text: str | None, parts: Shown) -> bool:
    """Whether a text, if there is one, holds the text of each part, and no list or part as Python writes it."""
    return text is not None and parts.mark not in text and all(part["text"] in text for part in parts)


def plain(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as transformers gives it to a template: without fields that are None, and with a model's
    reasoning under each of its three names."""
    message = {name: value for name, value in turn.items() if value is not None}
    thought = next((message[name] for name in THOUGHTS if name in message), None)
    return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


def strings(value: Any) -> list[str]:
    """Return every text in the values of a message, except its role."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [found for name, part in value.items() if name != "role" for found in strings(part)]
    if isinstance(value, list | tuple):
        return [found for part in value for found in strings(part)]
    return []


def with_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Return the same value with each text that `strings` finds changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {name: part if name == "role" else with_strings(part, change) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [with_strings(part, change) for part in value]
    return value


@lru_cache(maxsize=8)
def compiled(source: str) -> jinja2.Template:
    """Compile a template, once: a batch renders thousands of conversations. Raises TemplateError if it does not
    compile."""
    return template_of(source, {CLOCK: DATE.strftime})


def chat_template(source: str, context: Mapping[str, str]) -> ChatTemplate:
    """Raises TemplateError if the Jinja text does not compile."""
    compiled(source)
    return ChatTemplate(source, context)
