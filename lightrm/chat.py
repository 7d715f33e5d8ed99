"""The checkpoint's own chat template: Jinja text written by a stranger, run in a sandbox.

The rendered string mixes the template's special tokens with what users wrote. To keep them apart, special tokens
inside contents are broken with a filler character before rendering; whatever special token is still whole
afterwards came from the template.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lightrm.errors import TemplateError
from lightrm.templates import Cut, Joined, Piece, Special, Text, Turn
from lightrm.vocabulary import specials_pattern

FILLERS = [chr(code) for code in range(0xE000, 0xF8FF)]  # private use: no vocabulary has them in a special token


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """`source`: the Jinja text. `specials`: spellings that count as special tokens. The text brings its own BOS."""

    source: str
    specials: frozenset[str]
    bos_token: str
    eos_token: str
    parse_specials: bool = False
    name: str = "chat"
    cut: Cut = "prompt start"
    joined: Joined = "all"
    max_length: int | None = None
    bos: bool | None = False

    def render(self, turns: Sequence[Turn], response: str) -> tuple[list[Piece], list[Piece]]:
        """All pieces of the conversation; the template alone knows where the answer begins, so none is set apart."""
        pattern = specials_pattern(self.specials)
        contents = [turn["content"] for turn in turns] + [response]
        filler = next((c for c in FILLERS if not any(c in content for content in contents)), None)
        if filler is None:
            raise TemplateError(
                "the conversation uses every private-use character; the chat template needs one of them"
            )

        def broken(content: str) -> str:
            if pattern is None or self.parse_specials:
                return content
            return pattern.sub(lambda match: match[0][0] + filler + match[0][1:], content)

        messages = [{**turn, "content": broken(turn["content"])} for turn in turns]
        messages.append({"role": "assistant", "content": broken(response)})
        try:
            text = compiled(self.source).render(
                messages=messages, bos_token=self.bos_token, eos_token=self.eos_token, add_generation_prompt=False
            )
        except jinja2.TemplateError as error:
            raise TemplateError(f"the checkpoint's chat template refuses this conversation: {error}") from error
        parts = pattern.split(text) if pattern is not None else [text]
        return [
            Special(part) if part in self.specials else Text(part.replace(filler, "")) for part in parts if part
        ], []


@lru_cache(maxsize=8)
def compiled(source: str) -> jinja2.Template:
    """Compiled once: a batch renders thousands of conversations."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def to_json(value: object, indent: int | None = None) -> str:
    """Jinja's own filter escapes HTML; chat templates mean plain JSON."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def chat_template(
    source: str, specials: Iterable[str], bos_token: str, eos_token: str, parse_specials: bool
) -> ChatTemplate:
    """Raises TemplateError if the Jinja text does not compile."""
    try:
        compiled(source)
    except jinja2.TemplateError as error:
        raise TemplateError(f"the checkpoint's chat template is not valid Jinja: {error}") from error
    return ChatTemplate(source, frozenset(s for s in specials if s), bos_token, eos_token, parse_specials)
