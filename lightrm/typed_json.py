"""A dataclass from a JSON file that anyone may have written: each field is there, and of its declared type.

JSON has no NaN and no infinity: null stands for NaN in a float, or for what the field's metadata says under NULL. Own
code: pydantic does the same, but needs a setting in each of a dozen records and 10 MB; msgspec accepts unknown fields.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from lightrm.errors import InputError

NULL = "null"  # in a field's metadata: what null stands for in its floats
INFINITE = {NULL: math.inf}
MOST = 2**63  # a whole number in a file of ours is smaller
Made = TypeVar("Made")


def read_object(path: Path, what: str) -> dict[str, Any]:
    """Return the JSON object in a file. Raises InputError, which says what the file should be."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: nested too large a number
        raise InputError(f"{path} is not {what}: {first_line(error)}") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path} is not {what}: it holds {kind(raw)}, not an object")
    return raw


def made(cls: type[Made], raw: Any, at: str = "it") -> Made:
    """Return a dataclass from the JSON of its `dataclasses.asdict`. at: what to call it in a message.

    Raises InputError, which names the field, or what the class itself raises.
    """
    if not isinstance(raw, Mapping):
        raise InputError(f"{at} must be an object, found {kind(raw)}")
    types_of = get_type_hints(cls)
    known: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]  # only called with dataclasses
        if field.name not in raw:
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise InputError(f"{at} lacks {field.name!r}")
            continue
        null = field.metadata.get(NULL, math.nan)
        known[field.name] = value_of(types_of[field.name], raw[field.name], f"{at}.{field.name}", null)
    if unknown := sorted(map(str, raw.keys() - {field.name for field in dataclasses.fields(cls)})):  # type: ignore[arg-type]
        raise InputError(f"{at} has an unknown field: {unknown[0][:40]!r}")
    return cls(**known)


def value_of(wanted: Any, raw: Any, at: str, null: float) -> Any:
    origin, inner = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        (some,) = (part for part in inner if part is not type(None))
        return None if raw is None else value_of(some, raw, at, null)
    if origin in (np.ndarray, tuple):
        return values_of(wanted, raw, at, null)
    if origin in (dict, Mapping):
        if not isinstance(raw, Mapping):
            raise InputError(f"{at} must be an object, found {kind(raw)}")
        return {key_of(inner[0], k, at): value_of(inner[1], v, f"{at}.{k[:40]}", null) for k, v in raw.items()}
    if dataclasses.is_dataclass(wanted) and isinstance(wanted, type):
        return made(wanted, raw, at)
    return number_of(raw, at, null) if wanted is float else plain(wanted, raw, at)


def values_of(wanted: Any, raw: Any, at: str, null: float) -> Any:
    """Return a tuple, or an array of floats."""
    inner = get_args(wanted)
    if not isinstance(raw, list):
        raise InputError(f"{at} must be a list, found {kind(raw)}")
    if get_origin(wanted) is np.ndarray:
        return np.asarray([number_of(value, f"{at}[{i}]", null) for i, value in enumerate(raw)], np.float64)
    each = [inner[0]] * len(raw) if inner[-1] is Ellipsis else list(inner)
    if len(raw) != len(each):
        raise InputError(f"{at} must hold {len(each)} values, found {len(raw)}")
    return tuple(value_of(one, v, f"{at}[{i}]", null) for i, (one, v) in enumerate(zip(each, raw, strict=True)))


def plain(wanted: Any, raw: Any, at: str) -> Any:
    """Return a text, a whole number, or true or false."""
    if not isinstance(raw, wanted) or isinstance(raw, bool) != (wanted is bool):
        raise InputError(f"{at} must be {wanted.__name__}, found {kind(raw)}")
    if isinstance(raw, int) and abs(raw) >= MOST:
        raise InputError(f"{at} is too large a number")
    return raw


def number_of(raw: Any, at: str, null: float) -> float:
    if raw is None:
        return null
    if isinstance(raw, bool) or not isinstance(raw, int | float):
        raise InputError(f"{at} must be a number, found {kind(raw)}")
    if (isinstance(raw, int) and abs(raw) >= MOST) or not math.isfinite(raw):
        raise InputError(f"{at} is too large a number")
    return float(raw)


def key_of(wanted: Any, key: str, at: str) -> Any:
    if wanted is not int:
        return key
    if not (key.isascii() and key.isdigit() and len(key) < 19):
        raise InputError(f"{at} has the key {key[:40]!r}, which must be a whole number")
    return int(key)


def kind(raw: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(raw), "a number")


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
