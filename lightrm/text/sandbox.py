"""Jinja for strangers' chat templates: what transformers offers them, no access to Python, and an end in time.

Jinja's sandbox keeps a template from reaching Python's internals. It does not stop a template that runs forever or
fills the memory. So loops, calls and filters are counted here, and each value that is made is measured: see
`allowance`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from lightrm.errors import TemplateError
from lightrm.text.allowance import (
    ALLOWANCE,
    BITS,
    LARGEST,
    Allowance,
    check_call,
    check_format,
    check_length,
    length,
    made,
    measured,
    refuse,
    together,
    weight,
)

# Filters that return the values themselves; all others may turn them into text.
PICKING = frozenset((
    "length", "count", "first", "last", "list", "default", "d", "map", "select", "reject", "selectattr", "rejectattr",
    "items", "reverse", "batch", "slice", "random",
))  # fmt: skip


class Counted:
    """The items of a loop; each counts as a step."""

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
    """Rewrites a template: loops run over counted items, `a ~ b` is checked as `a + b` is, and slices and literals are
    measured. A template cannot write the names that this uses."""

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
        named = isinstance(node, nodes.Tuple) and node.ctx != "load"  # the targets of a loop or a set
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
    """{% generation %}, which marks for training what a model wrote. It renders its body."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("body"), [], [], body).set_lineno(line)

    def body(self, caller: Macro) -> str:
        return str(caller())


class Fields(Namespace):
    """`namespace`, without names that begin with an underscore."""

    def __init__(*args: Any, **fields: Any) -> None:  # a field may be named self
        values = dict(*args[1:], **fields)
        for name in values:
            check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        check_name(name)
        super().__setitem__(name, value)


class Dictionary:
    """`dict`: the call and `fromkeys`, and nothing else of the class."""

    def __call__(self, *args: Any, **fields: Any) -> dict[Any, Any]:
        return dict(*args, **fields)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")


class Sandbox(ImmutableSandboxedEnvironment):
    """A sandbox that counts calls, and checks what an operation or a call would make."""

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
        check_length(together((*args, *options.values())))  # a macro gets them as one tuple
        return made(super().call(__context, __function, *args, **options))


def to_json(
    value: object, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
    sort_keys: bool = False,
) -> str:  # fmt: skip
    """`tojson` without the escapes for HTML of Jinja's own filter: chat templates expect plain JSON."""
    if isinstance(indent, int) and indent > LARGEST:
        refuse(f"tojson is given an indent above {LARGEST}")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )  # fmt: skip
    check_length(weight(value))
    parts: list[str] = []
    size = 0
    for part in encoder.iterencode(value):  # piece by piece: indents can make the text much longer
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


def checked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter: a use counts as a step, and its arguments are checked first."""

    @wraps(function)
    def called(*args: Any, **options: Any) -> Any:
        ALLOWANCE.get().step()
        if name == "join":  # a generator's items were not measured yet
            args = tuple(list(map(made, value)) if isinstance(value, Iterator) else value for value in args)
        check_call(function, args, options)
        if name not in PICKING:
            check_length(together((*args, *options.values())))
        return made(function(*args, **options))

    return called


def template_of(source: str, names: Mapping[str, Any]) -> jinja2.Template:
    """Compile a template with transformers' names and the given ones. Raises TemplateError if the text is not valid
    Jinja."""
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
    """Render a template. Raises TemplateError, whatever the template raises."""
    before = ALLOWANCE.set(Allowance())
    try:
        return template.render(context)
    except Exception as error:  # a stranger's code may raise anything
        kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
        raise TemplateError(f"the checkpoint's chat template refuses this conversation: {kind}{error}") from error
    finally:
        ALLOWANCE.reset(before)
