"""What one rendering of a stranger's template may take: steps, seconds, characters, and what all values are worth.

What would make a value too long is refused before it is made, and so is more than one rendering can need of all values
together. A part that a value holds twice counts twice: to compare or to hash such a value takes that long, in one step
that nothing ends.
"""

from __future__ import annotations

import re
import time
from collections.abc import ItemsView, KeysView, Mapping, ValuesView
from contextvars import ContextVar
from typing import Any, NoReturn

import jinja2

MOST_STEPS = 1_000_000  # rounds of loops and calls of one rendering
SECONDS = 5.0  # of one rendering: for steps that are slow
LONGEST = 1 << 24  # characters of a value
ITEM = 16  # characters that an item of a list counts as
WRITTEN = 1 << 26  # characters that all outputs of one rendering have together
MADE = 1 << 28  # characters and items of all values that one rendering makes, whether it drops them or not
LARGEST = 1 << 16  # of a number that is a length
BITS = 4096  # of a number
LENGTHS = frozenset((
    "center", "ljust", "rjust", "zfill", "expandtabs", "indent", "wordwrap", "truncate", "batch", "slice",
    "round", "generate_lorem_ipsum",
))  # fmt: skip
MULTIPLIED = ("replace", "join", "translate", "wordwrap")
SPREAD = ("indent", "expandtabs")  # what they are given comes once a line, or once a tab
WIDE = re.compile(r"%[-+ #0]*(\*|\d*\.\*|\d{6,}|\d*\.\d{6,})|\{[^}]*:[^}]*(\d{6,}|\{)")


class Allowance:
    """What a rendering may still take."""

    def __init__(self) -> None:
        self.steps, self.written, self.made = MOST_STEPS, WRITTEN, MADE
        self.weights: dict[int, tuple[Any, int]] = {}  # by id, with the value: an id may come again
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
    """Numbers that are lengths, and texts that multiply each other."""
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
        check_format(text, values)  # the format alone: what it is given is the caller's text, whatever it looks like


def check_format(text: str, values: Any) -> None:
    """Widths, and values that are named more than once."""
    if WIDE.search(text):
        refuse("a format has a width of its arguments, or of more than five digits")
    check_length(sum(map(int, re.findall(r"[0-9]{1,5}", text))))
    fields = text.count("%") + text.count("{")
    check_length(together(values) * fields if fields else 0)


def check_length(size: int) -> None:
    if size > LONGEST:
        refuse(f"a value of more than {LONGEST} characters or items")


def length(value: Any) -> int:
    """Characters, or items as characters, without what the items hold."""
    if isinstance(value, list | tuple):
        return len(value) * ITEM
    return len(value) if isinstance(value, str | bytes) else 1


def weight(value: Any) -> int:
    """Characters of a value written out, about. A part that is held twice is written twice, and looked at once."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, int):
        return value.bit_length() // 3 + 1
    if not isinstance(value, list | tuple | Mapping | KeysView | ValuesView | ItemsView):
        return 1
    known = ALLOWANCE.get().weights
    if id(value) not in known:  # nothing that a template has is ever changed
        ALLOWANCE.get().step()
        parts = [part for pair in value.items() for part in pair] if isinstance(value, Mapping) else list(value)
        check_length(len(parts) * ITEM)
        known[id(value)] = value, len(parts) * ITEM + sum(map(weight, parts))
    return known[id(value)][1]


def together(values: Any) -> int:
    """The weight of the values of a call."""
    return sum(map(weight, values)) if isinstance(values, list | tuple) else weight(values)


def refuse(message: str) -> NoReturn:
    """`raise_exception`, too."""
    raise jinja2.TemplateError(message)


def made(value: Any) -> Any:
    """Every value that an operation, a call, a filter or a literal makes passes here, as it is."""
    ALLOWANCE.get().make(length(value))
    check_length(weight(value))
    return value


def measured(value: Any) -> Any:
    """Every output of a template passes here, as it is."""
    allowance = ALLOWANCE.get(None)  # None: a constant, while compiling
    if allowance is not None:
        allowance.write(weight(value))
    return value
