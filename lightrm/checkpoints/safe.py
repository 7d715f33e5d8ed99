"""The tensors of one safetensors file. The whole header is checked before a tensor is read.

A file is: the header's length as 8 bytes, little endian; the header, a JSON object; the tensors' bytes. For each tensor
the header gives dtype, shape, and the first and last byte; together they fill the rest of the file without gaps.

The safetensors library maps the file for a quantized folder. To load layer by layer, lightrm reads it itself: pages of
a mapped file stay in memory, and a file that is changed or cut short while it is mapped must not end the process. The
library's own check of a header also accepts a name twice, and its errors name no tensor.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import safetensors
import torch

from lightrm.errors import CorruptFileError, UnsupportedModelError
from lightrm.files import Watched, parse_json

LENGTH = 8  # bytes that hold the header's own
LARGEST_HEADER = 100_000_000  # bytes, as in the format's own library
MOST_AXES = 8
LFS_POINTER = b"version https://git-lfs"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class SafeFile:
    """tensors: the header's entry of each tensor, by name. notes: the header's metadata."""

    def __init__(self, path: Path) -> None:
        """Raises CorruptFileError."""
        self.watched = opened(path)
        self.start, self.tensors, self.notes = read_header(self.watched)
        self.mapping: Any = None

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name]["shape"])

    def dtype(self, name: str) -> torch.dtype | None:
        """Return the dtype of a tensor; None if PyTorch has no such dtype here."""
        return DTYPES.get(self.tensors[name]["dtype"])

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor in memory of its own. Raises CorruptFileError, or UnsupportedModelError on an unknown
        dtype."""
        entry = self.tensors[name]
        if entry["dtype"] not in DTYPES:
            raise UnsupportedModelError(
                f"{self.watched.path}: tensor {name!r} is of dtype {entry['dtype']}, lightrm reads {', '.join(DTYPES)}"
            )
        first, last = entry["data_offsets"]
        buffer = torch.empty(last - first, dtype=torch.uint8)
        try:
            self.watched.read(self.start + first, memoryview(buffer.numpy().data))
        except (OSError, EOFError) as error:
            raise CorruptFileError(f"{self.watched.path}: tensor {name!r} cannot be read: {error}") from error
        return buffer.view(DTYPES[entry["dtype"]]).view(entry["shape"])

    def mapped(self, name: str) -> torch.Tensor:
        """Return one tensor as a part of the mapped file, whose pages are read when they are used. See `files.Watched`.

        Raises CorruptFileError if the file was changed or replaced since it was opened.
        """
        self.watched.check()
        if self.mapping is None:
            try:
                self.mapping = safetensors.safe_open(self.watched.path, framework="pt")
                same = os.path.samestat(os.stat(self.watched.path), os.fstat(self.watched.handle))
            except Exception as error:  # SafetensorError is not an OSError in every version
                raise CorruptFileError(f"{self.watched.path} cannot be mapped: {error}") from error
            if not same:
                raise CorruptFileError(f"{self.watched.path} was replaced while it was loaded: load the model again")
        tensor: torch.Tensor = self.mapping.get_tensor(name)
        return tensor

    def header(self) -> torch.Tensor:
        """Return the bytes before the tensors, uint8."""
        buffer = torch.empty(self.start, dtype=torch.uint8)
        self.watched.read(0, memoryview(buffer.numpy().data))
        return buffer


def opened(path: Path) -> Watched:
    """Open a file. Raises CorruptFileError if it cannot be opened, is empty, or is only a Git LFS pointer."""
    try:
        watched = Watched(path)
        start = bytearray(min(watched.size, len(LFS_POINTER)))
        watched.read(0, memoryview(start))
    except (OSError, EOFError) as error:
        raise CorruptFileError(f"{path} cannot be read: {error}") from error
    if not watched.size:
        raise CorruptFileError(f"{path} is empty (0 bytes): copy or download it again")
    if start == LFS_POINTER:
        raise CorruptFileError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder")
    return watched


def read_header(watched: Watched) -> tuple[int, dict[str, dict[str, Any]], dict[str, Any]]:
    """Return where the tensors' bytes start, the entry of each tensor, and the metadata. Raises CorruptFileError."""

    def bad(why: str) -> CorruptFileError:
        return CorruptFileError(
            f"{watched.path} ({watched.size} bytes) is cut short or not safetensors: {why}; copy or download it again"
        )

    length = bytearray(LENGTH)
    if watched.size < LENGTH:
        raise bad("it has no header")
    watched.read(0, memoryview(length))
    count = int.from_bytes(length, "little")
    start = LENGTH + count
    if count > LARGEST_HEADER or start > watched.size:
        raise bad(f"its header would have {count} bytes")
    header = bytearray(count)
    watched.read(LENGTH, memoryview(header))
    entries = parse_json(bytes(header), f"{watched.path} is cut short or not safetensors: its header", CorruptFileError)
    notes = entries.pop("__metadata__", {})
    if not isinstance(notes, dict):
        raise bad(f"its __metadata__ is {str(notes)[:40]!r}")
    for name, entry in entries.items():
        if (wrong := fault(entry)) is not None:
            raise bad(f"tensor {name[:200]!r} {wrong}")
    order = sorted(entries, key=lambda name: entries[name]["data_offsets"])
    ends = [0, *(entries[name]["data_offsets"][1] for name in order)]
    for end, name in zip(ends, order, strict=False):
        if entries[name]["data_offsets"][0] != end:
            raise bad(f"tensor {name[:200]!r} does not begin at byte {end}, where the one before it ends")
    if start + ends[-1] != watched.size:
        raise bad(f"its tensors end at byte {start + ends[-1]}")
    return start, entries, notes


def fault(entry: Any) -> str | None:
    """Return what is wrong with the entry of a tensor; None if nothing is."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return "has no dtype"
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or any(type(n) is not int or n < 0 for n in numbers):
            return "has no shape or no place"
    assert isinstance(shape, list)
    assert isinstance(offsets, list)
    if len(offsets) != 2 or offsets[0] > offsets[1] or len(shape) > MOST_AXES:
        return f"has the shape {str(shape)[:80]} and the place {str(offsets)[:80]}"
    if (dtype := DTYPES.get(entry["dtype"])) is None:
        return None
    size = dtype.itemsize * math.prod(shape)
    if offsets[1] - offsets[0] != size:
        return f"of shape {str(shape)[:80]} has {size} bytes, its place {offsets[1] - offsets[0]}"
    return None
