"""Limits for one rendering of a stranger's chat template: steps, seconds, characters, and the size of all values
together.

A value that would become too long is refused before it is made. So is a rendering whose values together exceed what any
rendering can need. If a value holds the same part twice, the part counts twice: comparing or hashing such a value takes
that long, in a single step that cannot be interrupted.
"""

from __future__ import annotations

import re
import time
from collections.abc import ItemsView, KeysView, Mapping, ValuesView
from contextvars import ContextVar
from typing import Any, NoReturn

import jinja2

MOST_STEPS = 1_000_000  # rounds of loops and calls of one rendering
SECONDS = 5.0  # of one rendering, in case steps are slow
LONGEST = 1 << 24  # characters of a value
ITEM = 16  # characters that an item of a list counts as
WRITTEN = 1 << 26  # characters of all outputs of one rendering together
MADE = 1 << 28  # characters and items of all values that one rendering makes, also of those it drops
LARGEST = 1 << 16  # the largest number that may be a length
BITS = 4096  # the most that a number may have
LENGTHS = frozenset((
    "center", "ljust", "rjust", "zfill", "expandtabs", "indent", "wordwrap", "truncate", "batch", "slice",
    "round", "generate_lorem_ipsum",
))  # fmt: skip
MULTIPLIED = ("replace", "join", "translate", "wordwrap")
SPREAD = ("indent", "expandtabs")  # their argument is repeated for each line, or each tab
WIDE = re.compile(r"%[-+ #0]*(\*|\d*\.\*|\d{6,}|\d*\.\d{6,})|\{[^}]*:[^}]*(\d{6,}|\{)")


class Allowance:
    """What a rendering may still use."""

    def __init__(self) -> None:
        self.steps, self.written, self.made = MOST_STEPS, WRITTEN, MADE
        self.weights: dict[int, tuple[Any, int]] = {}  # by id, with the value, since an id may be reused
        self.until = time.monotonic() + SECONDS

    def step(self) -> None:
        self.steps -= 1
        self.tick()

    def tick(self) -> None:
        if self.steps < 0 or time.monotonic() > self.until:
            refuse(f"it does not come to an end within {MOST_STEPS} steps and {SECONDS:g} seconds")

    def write(self, characters: int) -> None:
        self.written -= characters
        if self.written < 0:
            refuse(f"it writes more than {WRITTEN} characters")

    def make(self, size: int) -> None:
        self.made -= size
        if self.made < 0:
            refuse(f"it makes values of more than {MADE} characters and items")


ALLOWANCE: ContextVar[Allowance] = ContextVar("allowance")


def check_call(function: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Check arguments that are lengths, and texts that multiply each other."""
    name = getattr(function, "__name__", "").removeprefix("do_")
    owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)  # Jinja wraps str.format
    values = [owner, *args, *options.values()]
    if name in LENGTHS and any(isinstance(value, int) and value > LARGEST for value in values):
        refuse(f"{name} is given a length above {LARGEST}")
    if name in MULTIPLIED or name in SPREAD:
        sizes = sorted(length(value) for value in values if isinstance(value, str | bytes | list | tuple))
        if name in SPREAD:
            sizes = sorted([*sizes, *(value for value in values if isinstance(value, int))])
        check_length(sizes[-1] * sizes[-2] if len(sizes) > 1 and sizes[-1] > 1 << 12 else 0)
    if name == "join":
        check_length(together(values))
    if name in ("format", "format_map"):
        text = owner if isinstance(owner, str) else next((value for value in args if isinstance(value, str)), "")
        check_format(text, values)  # only the format: its arguments are the caller's text


def check_format(text: str, values: Any) -> None:
    """Check widths in a format string, and values that it names more than once."""
    if WIDE.search(text):
        refuse("a format has a width of its arguments, or of more than five digits")
    check_length(sum(map(int, re.findall(r"[0-9]{1,5}", text))))
    fields = text.count("%") + text.count("{")
    check_length(together(values) * fields if fields else 0)


def check_length(size: int) -> None:
    if size > LONGEST:
        refuse(f"a value of more than {LONGEST} characters or items")


def length(value: Any) -> int:
    """Return the number of characters of a value. An item counts as ITEM characters, whatever it holds."""
    if isinstance(value, list | tuple):
        return len(value) * ITEM
    return len(value) if isinstance(value, str | bytes) else 1


def weight(value: Any) -> int:
    """Return about how many characters a value has when it is written out, with parts that occur twice counted
    twice."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, int):
        return value.bit_length() // 3 + 1
    if not isinstance(value, list | tuple | Mapping | KeysView | ValuesView | ItemsView):
        return 1
    known = ALLOWANCE.get().weights
    if id(value) not in known:  # values in a template never change
        ALLOWANCE.get().step()
        parts = [part for pair in value.items() for part in pair] if isinstance(value, Mapping) else list(value)
        check_length(len(parts) * ITEM)
        known[id(value)] = value, len(parts) * ITEM + sum(map(weight, parts))
    return known[id(value)][1]


def together(values: Any) -> int:
    """Return the weight of all arguments of a call."""
    return sum(map(weight, values)) if isinstance(values, list | tuple) else weight(values)


def refuse(message: str) -> NoReturn:
    """Raise TemplateError with a message. Templates call it as `raise_exception`."""
    raise jinja2.TemplateError(message)


def made(value: Any) -> Any:
    """Count a value that an operation, call, filter or literal made, and return it unchanged."""
    ALLOWANCE.get().make(length(value))
    check_length(weight(value))
    return value


def measured(value: Any) -> Any:
    """Count an output of a template, and return it unchanged."""
    allowance = ALLOWANCE.get(None)  # None while a template is compiled, for its constants
    if allowance is not None:
        allowance.write(weight(value))
    return value
