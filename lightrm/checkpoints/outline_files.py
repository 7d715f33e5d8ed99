"""A weight file of which only the names are here: what `lightrm inspect` has of a model on the hub.

An outline stands where the weight file would, under its name. It is a JSON object:

    {"lightrm outline": {"size": bytes of the weight file, "tensors": {name: entry of the safetensors header}}}

Of a pickle only the index is read, which says no shapes: there the entries are empty.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightrm.checkpoints.safe import DTYPES, fault
from lightrm.errors import CheckpointError, CorruptFileError
from lightrm.files import read_json, write_text

MARK = "lightrm outline"
START = f'{{"{MARK}"'.encode()


class OutlineFile:
    """tensors: the header's entry of each tensor, by name. size: of the weight file, in bytes."""

    def __init__(self, path: Path) -> None:
        """Raises CorruptFileError."""
        self.path = path
        held = read_json(path, CorruptFileError)[MARK]
        self.size: int = held["size"]
        self.tensors: dict[str, dict[str, Any]] = held["tensors"]

    @property
    def shaped(self) -> bool:
        """Whether shapes and dtypes are known."""
        return all(self.tensors.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises CheckpointError if it is not known."""
        if not self.tensors[name]:
            raise CheckpointError(f"{self.path.name} is a pickle, and its index says no shapes: {CURE}")
        return tuple(self.tensors[name]["shape"])

    def dtype(self, name: str) -> torch.dtype | None:
        return DTYPES.get(self.tensors[name].get("dtype", ""))

    def read(self, name: str) -> torch.Tensor:
        """Raise CheckpointError: there are no values."""
        raise CheckpointError(f"only the header of {self.path.name} was fetched, and {name!r} stands behind it: {CURE}")


CURE = "`lightrm inspect --weights` fetches the weights, too"


def is_outline(path: Path) -> bool:
    """Whether a file is an outline. One that cannot be opened is none."""
    try:
        with path.open("rb") as file:
            return file.read(len(START)) == START
    except OSError:
        return False


def write_outline(path: Path, size: int, tensors: Mapping[str, Mapping[str, Any]]) -> None:
    """Write an outline. Raises CorruptFileError if an entry is not one of a safetensors header."""
    for name, entry in tensors.items():
        if entry and (wrong := fault(entry)) is not None:
            raise CorruptFileError(f"{path.name}: tensor {name[:200]!r} {wrong}")
    write_text(path, json.dumps({MARK: {"size": size, "tensors": tensors}}))
