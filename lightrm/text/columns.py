"""Lists as callers have them: what counts as one, and its items in order.

A list may be a tuple, a generator, a numpy array, a column of pandas, polars, pyarrow or `datasets`: anything that
yields its items in order. None of those libraries is imported; what they have in common is asked of the type, since a
pandas column takes its index for attributes. A text, a mapping, a set and a table are no lists of texts, though Python
would iterate over each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from lightrm.errors import InputError

TABLES = ("column_names", "columns")  # what pandas, polars, pyarrow and datasets call the columns of a table
NAMED = 5  # columns in a message


def items(value: Any, expected: str, one: str = "") -> list[Any]:
    """Return the items of anything that yields them in order. one: what to write instead of a single text.

    Raises InputError, whose message begins with `expected`, for a single text, a mapping, a set or a table.
    """
    value = bare(value)
    if isinstance(value, str | bytes) and one:
        raise InputError(f"{expected}, found one string: {one}")
    if (names := columns_of_table(value)) is not None:
        raise InputError(f"{expected}, found {type(value).__name__}, a table{names}: pass one of its columns")
    if isinstance(value, str | bytes | Mapping | Set) or getattr(value, "ndim", 1) == 0:
        raise InputError(f"{expected}, found {kind(value)}")
    if has(value, "to_pylist"):  # pyarrow, whose own items are not strings
        return list(value.to_pylist())
    if not isinstance(value, Iterable):
        raise InputError(f"{expected}, found {kind(value)}")
    try:
        found = iter(value)
    except TypeError as error:  # a column that is on another machine or card
        raise InputError(f"{expected}, found {type(value).__name__}, whose items cannot be read: {error}") from error
    return [bare(item) for item in found]


def bare(value: Any) -> Any:
    """Return what a scalar of pyarrow holds; anything else as it is."""
    return value.as_py() if has(value, "as_py") else value


def has(value: Any, method: str) -> bool:
    return callable(getattr(type(value), method, None))


def columns_of_table(value: Any) -> str | None:
    """Return the names of a table's columns as part of a message; None for anything but a table."""
    name = next((name for name in TABLES if hasattr(type(value), name)), None)
    if name is None or isinstance(value, Mapping):
        return None
    if has(value, "collect"):  # its columns are known only when it is computed
        return ""
    found = getattr(value, name)  # None of a stream whose first record was not read yet
    names = [] if found is None else [str(column) for column in found]
    more = ", ..." if len(names) > NAMED else ""
    return f" with the columns {', '.join(map(repr, names[:NAMED]))}{more}" if names else ""


def single_column(value: Any, found: Sequence[Any], expected: str) -> Sequence[Any]:
    """Return the items of a list of texts. Raises InputError, which names the shape, on an array of several
    dimensions, unless it holds turns."""
    shape = getattr(value, "shape", ())
    if getattr(value, "ndim", 1) > 1 and not all(isinstance(part, Mapping) for row in found for part in row):
        sizes = " x ".join(map(str, shape))
        raise InputError(f"{expected}, found an array of {sizes}: pass one column, such as array[:, 0]")
    return found


def plain(value: Any) -> Any:
    """Return what a turn holds beside its text as the lists and dictionaries that a template expects."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    value = bare(value)
    if has(value, "tolist"):  # numpy
        value = value.tolist()
    elif has(value, "to_list"):  # polars
        value = value.to_list()
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def kind(value: object) -> str:
    """Return a value's type and its beginning, in one line."""
    shown = repr(value) if isinstance(value, str | bytes) else " ".join(repr(value).split())
    return "None" if value is None else f"{type(value).__name__} {shown:.60}"
