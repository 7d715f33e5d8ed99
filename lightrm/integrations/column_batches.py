"""Batches of columns, in the three forms of Ray Data: a dictionary of numpy arrays, a pandas data frame, a pyarrow
table. Reads columns and adds some; knows nothing of scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lightrm.data.tabular import pyarrow
from lightrm.errors import InputError
from lightrm.text.columns import kind

Numbers = Sequence[float | None] | Sequence[list[float] | None]


def names_of(batch: object) -> list[str]:
    """Return the names of a batch's columns. Raises InputError on anything that is no batch."""
    found: object = None
    if isinstance(batch, Mapping):
        found = batch
    elif hasattr(batch, "append_column"):
        found = batch.column_names  # type: ignore[attr-defined]
    elif hasattr(batch, "assign"):
        found = getattr(batch, "columns", None)
    if not isinstance(found, Iterable):
        raise InputError(
            f"a batch must be a dictionary of arrays, a pandas data frame or a pyarrow table, found {kind(batch)}"
        )
    return [str(name) for name in found]


def column(batch: Any, name: str) -> list[Any]:
    """Return the items of one column."""
    found = batch[name]
    return list(found.to_pylist() if hasattr(found, "to_pylist") else found)


def with_numbers(batch: Any, name: str, numbers: Numbers, lists: bool) -> Any:
    """Return the batch with a column of numbers, float32, or of lists of numbers; None is a list that is missing."""
    if hasattr(batch, "append_column"):
        arrow = pyarrow()
        form = arrow.list_(arrow.float32()) if lists else arrow.float32()
        return batch.append_column(name, arrow.array(numbers, form))
    values = as_objects(numbers) if lists else np.asarray(numbers, np.float32)
    return with_array(batch, name, values)


def with_texts(batch: Any, name: str, texts: Sequence[str | None]) -> Any:
    """Return the batch with a column of texts."""
    if hasattr(batch, "append_column"):
        arrow = pyarrow()
        return batch.append_column(name, arrow.array(texts, arrow.string()))
    return with_array(batch, name, as_objects(texts))


def with_array(batch: Any, name: str, values: np.ndarray) -> Any:
    if not isinstance(batch, Mapping):
        return batch.assign(**{name: values})
    return {**{key: storable(found) for key, found in batch.items()}, name: values}


def as_objects(values: Sequence[object]) -> np.ndarray:
    """Return a one-dimensional array of Python objects, also where they are lists of one length."""
    found = np.empty(len(values), dtype=object)
    for k, value in enumerate(values):
        found[k] = value
    return found


def storable(values: Any) -> Any:
    """Return a column of arrays of texts or turns as one of lists. Ray hands lists over as such arrays, and cannot make
    lists of them again: it would store pickles."""
    if not isinstance(values, np.ndarray) or values.dtype != object:
        return values
    if not any(isinstance(value, np.ndarray) and value.dtype == object for value in values):
        return values
    return as_objects([value.tolist() if isinstance(value, np.ndarray) else value for value in values])
