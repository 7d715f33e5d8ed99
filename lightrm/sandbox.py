"""Jinja for strangers' chat templates: what transformers gives them, no way out, and an end in time.

A sandbox keeps a template from Python's insides. It does not keep it from running for ever or from filling the memory.
So loops, calls and filters are counted here, what would make a value too long is refused before it is made, and so
is more than one rendering can need of all values together. A part that a value holds twice counts twice: to compare or
to hash such a value takes that long, in one step that nothing ends.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from contextvars import ContextVar
from functools import wraps
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from lightrm.errors import TemplateError

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
# Filters that hand their values on; all others may write them out as text.
PICKING = frozenset((
    "length", "count", "first", "last", "list", "default", "d", "map", "select", "reject", "selectattr", "rejectattr",
    "items", "reverse", "batch", "slice", "random",
))  # fmt: skip
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


class Counted:
    """The items of a loop, each a step."""

    def __init__(self, items: Iterable[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        allowance = ALLOWANCE.get()
        for item in self.items:
            allowance.step()
            yield item

    def __len__(self) -> int:
        return len(self.items)  # type: ignore[arg-type]  # what has none raises, as it does without this


class Counting(NodeTransformer):
    """Loops over counted items; `a ~ b` checked as `a + b` is, slices, and what lists of values hold. A template cannot
    write these names."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "counted items", [], [], None, None)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(nodes.List(node.nodes), "joined texts", [], [], None, None, lineno=node.lineno)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return checked_value(node) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        named = isinstance(node, nodes.Tuple) and node.ctx != "load"  # the names that a loop or a set gives
        return node if named or constant(node) else checked_value(node)

    visit_Tuple = visit_Dict = visit_List


def checked_value(node: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, "made value", [], [], None, None, lineno=node.lineno)


def constant(node: nodes.Expr) -> bool:
    try:
        node.as_const()
    except Exception:  # nodes.Impossible, or what the expression raises
        return False
    return True


class Generation(Extension):
    """{% generation %}: marks what a model wrote, for training. It renders its body."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("body"), [], [], body).set_lineno(line)

    def body(self, caller: Macro) -> str:
        return str(caller())


class Fields(Namespace):
    """`namespace` without names that begin with an underscore."""

    def __init__(*args: Any, **fields: Any) -> None:  # a field may be called self
        values = dict(*args[1:], **fields)
        for name in values:
            check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        check_name(name)
        super().__setitem__(name, value)


class Dictionary:
    """`dict`: called, or `fromkeys`, and nothing else of the class."""

    def __call__(self, *args: Any, **fields: Any) -> dict[Any, Any]:
        return dict(*args, **fields)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")


class Sandbox(ImmutableSandboxedEnvironment):
    """Counts calls, and checks what an operation or a call would make."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, str | bytes) and operator == "%":
            check_format(str(left), right)
        elif operator == "+":
            check_length(length(left) + length(right))
        elif isinstance(left, int) and isinstance(right, int):
            size = left.bit_length() * max(1, right) if operator == "**" else left.bit_length() + right.bit_length()
            if operator != "%" and size > BITS:
                refuse("a number is too large")
        elif operator == "*":
            check_length(length(left) * length(right) * abs(left if isinstance(left, int) else 1)
                         * abs(right if isinstance(right, int) else 1))  # fmt: skip
        return made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __function: Any, *args: Any, **options: Any) -> Any:  # noqa: N805
        ALLOWANCE.get().step()
        check_call(__function, args, options)
        check_length(together((*args, *options.values())))  # a macro has them as one tuple
        return made(super().call(__context, __function, *args, **options))


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


def to_json(
    value: object, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
    sort_keys: bool = False,
) -> str:  # fmt: skip
    """Jinja's own filter escapes HTML; chat templates mean plain JSON."""
    if isinstance(indent, int) and indent > LARGEST:
        refuse(f"tojson is given an indent above {LARGEST}")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )  # fmt: skip
    check_length(weight(value))
    parts: list[str] = []
    size = 0
    for part in encoder.iterencode(value):  # bit by bit: an indent comes once a line, and more in what is nested
        ALLOWANCE.get().tick()
        size += len(part)
        check_length(size)
        parts.append(part)
    ALLOWANCE.get().make(size)
    return "".join(parts)


def joined(values: list[Any]) -> str:
    check_length(weight(values))
    text = "".join(map(str, values))
    ALLOWANCE.get().make(len(text))
    return text


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


def checked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is a step, and whose arguments are checked first."""

    @wraps(function)
    def called(*args: Any, **options: Any) -> Any:
        ALLOWANCE.get().step()
        if name == "join":  # what is made one by one is not measured before
            args = tuple(list(map(made, value)) if isinstance(value, Iterator) else value for value in args)
        check_call(function, args, options)
        if name not in PICKING:
            check_length(together((*args, *options.values())))
        return made(function(*args, **options))

    return called


def template_of(source: str, names: Mapping[str, Any]) -> jinja2.Template:
    """A template with transformers' names and those given. Raises TemplateError if the text is no Jinja."""
    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], finalize=measured
    )  # fmt: skip
    filters = {name: checked(name, function) for name, function in environment.filters.items()}
    own = {"tojson": to_json, "counted items": Counted, "joined texts": joined, "made value": made}
    environment.filters = filters | own
    environment.globals.update({"raise_exception": refuse, "dict": Dictionary(), "namespace": Fields, **names})
    try:
        code = environment.compile(Counting().visit(environment.parse(source)))
        return jinja2.Template.from_code(environment, code, environment.make_globals(None))
    except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError, MemoryError) as error:
        raise TemplateError(
            f"the checkpoint's chat template is not valid Jinja: {error or type(error).__name__}"
        ) from error


def render(template: jinja2.Template, context: Mapping[str, Any]) -> str:
    """Raises TemplateError, whatever the template raises."""
    before = ALLOWANCE.set(Allowance())
    try:
        return template.render(context)
    except Exception as error:  # a stranger's code: any kind
        kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
        raise TemplateError(f"the checkpoint's chat template refuses this conversation: {kind}{error}") from error
    finally:
        ALLOWANCE.reset(before)
