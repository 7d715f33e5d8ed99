"""A config.json with typed access to its fields, within bounds. An error names the bad field.

`families` makes an Architecture of it; `config_fields` says which other fields it may have, and at which values.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lightrm.errors import ConfigError
from lightrm.files import read_json

LARGEST = 2**31 - 1  # of a count: no published model is near it, and what follows from it stays a number


class Config:
    """A config.json with typed access to its fields. raw: the whole object."""

    def __init__(self, raw: dict[str, Any], path: Path) -> None:
        self.raw, self.path = raw, path

    def number(self, name: str, default: float | None = None, positive: bool = False) -> float:
        """Return a number. Raises ConfigError unless it is finite, and above 0 if `positive`."""
        value = self.raw.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{self.path}: field {name!r} must be a number, found {shown(value)}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number) or (positive and number <= 0):
            kind = "a finite number above 0" if positive else "a finite number"
            raise ConfigError(f"{self.path}: field {name!r} must be {kind}, found {shown(value)}")
        return number

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.raw.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ConfigError(f"{self.path}: field {name!r} must be a positive whole number, found {shown(value)}")
        if value > LARGEST:
            raise ConfigError(f"{self.path}: field {name!r} is {shown(value)}, more than any model has: is it damaged?")
        return value

    def token_id(self, name: str) -> int | None:
        """Return a token id, None if there is none; old conversions write -1 for that."""
        value = self.raw.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ConfigError(f"{self.path}: field {name!r} must be a token id or null, found {shown(value)}")
        return value if value is not None and value >= 0 else None

    def flag(self, name: str) -> bool:
        """Return true or false; a missing field is false."""
        value = self.raw.get(name)
        value = False if value is None else value
        if not isinstance(value, bool):
            raise ConfigError(f"{self.path}: field {name!r} must be true or false, found {shown(value)}")
        return value

    def text(self, name: str) -> str:
        value = self.raw.get(name)
        if not isinstance(value, str):
            raise ConfigError(f"{self.path}: field {name!r} must be a string, found {shown(value)}")
        return value

    def entries(self, name: str) -> dict[str, Any]:
        """Return an object, an empty one if the field is missing."""
        value = self.raw.get(name)
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{self.path}: field {name!r} must be an object, found {shown(value)}")
        return value or {}

    def has(self, name: str) -> bool:
        return self.raw.get(name) is not None

    @property
    def classes(self) -> str:
        """The `architectures` entry as one string."""
        names = self.raw.get("architectures") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"{self.path}: field 'architectures' must be a list of class names, found {shown(names)}")
        return " ".join(names)


def shown(value: object) -> str:
    """Return a value for a message, shortened: it may be a number of a thousand digits."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def read_config(folder: Path, name: str = "config.json") -> Config:
    """Read a config. Raises ConfigError if the file is missing, not JSON, or not an object."""
    path = folder / name
    if not path.is_file():
        raise ConfigError(f"{folder} has no {name}: a checkpoint folder needs one beside its weights")
    return Config(read_json(path, ConfigError), path)
