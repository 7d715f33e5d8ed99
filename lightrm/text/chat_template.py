"""The checkpoint's own chat template: Jinja text written by a stranger, run in a sandbox as transformers runs it.

The template sees the conversation unchanged. Where a text of the caller spells a special token, the template is
rendered a second time with stand-ins of the same length in these places: where they come out is what the caller wrote.

Templates that ask for today's date get DATE on any day, or scores would change over night.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2

from lightrm.errors import TemplateError
from lightrm.text.guard import Span
from lightrm.text.sandbox import render, template_of
from lightrm.text.templates import Cut, Ending, Rendered, Turn

DATE = datetime(2024, 7, 26)  # what Llama 3's own template writes where it is told no date
CLOCK = "strftime_now"
STAND_INS = [chr(code) for code in range(0x10600, 0x10737)]  # Linear A: letters that print, and have no case
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # one field under three names


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """source: the Jinja text, which brings its own BOS. context: the tokenizer's special tokens by name."""

    source: str
    context: Mapping[str, str]
    ending: Ending = "none"
    name: str = "chat"
    cut: Cut = "prompt start"
    max_length: int | None = None
    whole: bool = False

    @property
    def dated(self) -> bool:
        """Whether the text asks for a date."""
        return CLOCK in self.source

    def __str__(self) -> str:
        return f"{self.name}, dated {DATE:%d %b %Y}" if self.dated else self.name

    def render(self, turns: Sequence[Turn], responses: Sequence[str], specials: re.Pattern[str]) -> list[Rendered]:
        """Return the text of a conversation with each answer, and where the caller spelled special tokens in it.

        Each answer is rendered with the whole conversation, for a template may do anything with it; that takes about
        a fiftieth of the time that the tokenizer needs. Raises TemplateError where the template refuses the
        conversation, fails, or does not come to an end.
        """
        prompt = [plain(turn) for turn in turns]
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

    def written(self, messages: Sequence[dict[str, Any]], text: str, specials: re.Pattern[str]) -> tuple[Span, ...]:
        """Spans of `text` that spell what the caller spelled. Raises TemplateError where that cannot be told."""
        seen = {*text, *self.source, *"".join(strings(messages))}
        stand_in = next((character for character in STAND_INS if character not in seen), None)
        if stand_in is None:
            raise TemplateError(
                "the conversation holds every letter of Linear A, and one that it does not hold is needed"
            )
        other = self.text(
            [with_strings(m, lambda s: specials.sub(lambda f: stand_in * len(f[0]), s)) for m in messages]
        )
        spans = tuple(match.span() for match in re.finditer(f"{stand_in}+", other))
        if len(other) == len(text) and all(a in (b, stand_in) for a, b in zip(other, text, strict=True)):
            return spans
        # The template looks at what the caller spelled: it may have taken all of it away.
        if Counter(specials.findall(text)) == Counter(specials.findall(other)):
            return ()
        held = sorted({found for written in strings(messages) for found in specials.findall(written)})
        raise TemplateError(
            f"the chat template looks for {', '.join(map(repr, held))} in the text, and whether the ones it writes are "
            "its own or the caller's cannot be told: remove them from the text, or load with parse_specials=True"
        )


def plain(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A message as transformers hands it on: no field that is None, a model's reasoning under each of its names."""
    message = {name: value for name, value in turn.items() if value is not None}
    thought = next((message[name] for name in THOUGHTS if name in message), None)
    return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


def strings(value: Any) -> list[str]:
    """Every text in a message's values but its role, which is one of a few."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [found for name, part in value.items() if name != "role" for found in strings(part)]
    if isinstance(value, list | tuple):
        return [found for part in value for found in strings(part)]
    return []


def with_strings(value: Any, change: Callable[[str], str]) -> Any:
    """The same value with each text of `strings` changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {name: part if name == "role" else with_strings(part, change) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [with_strings(part, change) for part in value]
    return value


@lru_cache(maxsize=8)
def compiled(source: str) -> jinja2.Template:
    """Compiled once: a batch renders thousands of conversations. Raises TemplateError if it does not compile."""
    return template_of(source, {CLOCK: DATE.strftime})


def chat_template(source: str, context: Mapping[str, str]) -> ChatTemplate:
    """Raises TemplateError if the Jinja text does not compile."""
    compiled(source)
    return ChatTemplate(source, context)
