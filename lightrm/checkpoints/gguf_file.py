"""One GGUF file, llama.cpp's format: metadata, then a table of tensors, then their bytes. Versions 2 and 3.

    magic "GGUF", version u32, number of tensors u64, number of settings u64
    each setting    name, type u32, value
    each tensor     name, number of axes u32, axes u64 (the shortest stride first), kind u32, offset u64
    padding to `general.alignment` (32), from where offsets count

All numbers are little endian. A string is its length, u64, and UTF-8. A list is its type u32, its length u64, and the
values. The whole header is checked before a tensor is read: every length against the bytes that are left, every tensor
against the size of the file.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightrm.checkpoints.safe import opened
from lightrm.errors import CheckpointError, CorruptFileError, UnsupportedModelError
from lightrm.schemes.ggml import KINDS, Blocked, Kind

ENDING = ".gguf"
MAGIC, VERSIONS = b"GGUF", (2, 3)
ALIGNMENT, MOST_AXES, MOST_NAME, MOST_ENTRIES = 32, 4, 2**16, 2**20
CHUNK = 2**20  # bytes of the header that are read at a time
NUMBERS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 10: "<Q", 11: "<q", 12: "<d"}
FLAG, TEXT, LIST = 7, 8, 9


class Header:
    """Reads the header from its start on, and never beyond the end of the file."""

    def __init__(self, path: Path) -> None:
        """Raises CorruptFileError."""
        self.watched = opened(path)
        self.buffer, self.start, self.at = b"", 0, 0  # start: byte of the file at which the buffer begins

    def bad(self, why: str) -> CorruptFileError:
        return CorruptFileError(
            f"{self.watched.path} ({self.watched.size} bytes) is cut short or not GGUF: {why}; copy or download it "
            "again"
        )

    @property
    def place(self) -> int:
        return self.start + self.at

    def take(self, count: int, what: str) -> bytes:
        """Return the next bytes. Raises CorruptFileError if the file ends before."""
        if count > self.watched.size - self.place:
            raise self.bad(f"{what} at byte {self.place} would have {count} bytes")
        if self.at + count > len(self.buffer):
            self.start, kept, self.at = self.place, self.buffer[self.at :], 0
            more = bytearray(min(max(count - len(kept), CHUNK), self.watched.size - self.start - len(kept)))
            self.watched.read(self.start + len(kept), memoryview(more))
            self.buffer = kept + bytes(more)
        found = self.buffer[self.at : self.at + count]
        self.at += count
        return found

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def text(self, what: str) -> str:
        try:
            return self.take(self.number("<Q", what), what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.bad(f"{what} is not UTF-8 ({error.reason})") from error

    def value(self, kind: int, what: str) -> Any:
        """Return a value: a number, a bool, a string, a numpy array of numbers, or a list of strings or bools."""
        if kind in NUMBERS:
            return self.number(NUMBERS[kind], what)
        if kind == FLAG:
            return bool(self.number("B", what))
        if kind == TEXT:
            return self.text(what)
        if kind != LIST:
            raise self.bad(f"{what} is of type {kind}")
        inner, count = self.number("<I", what), self.number("<Q", what)
        if inner in NUMBERS:
            return np.frombuffer(self.take(count * struct.calcsize(NUMBERS[inner]), what), NUMBERS[inner])
        if inner not in (FLAG, TEXT):
            raise self.bad(f"{what} is a list of type {inner}")
        if count > self.watched.size - self.place:
            raise self.bad(f"{what} would have {count} values")
        return [self.value(inner, what) for _ in range(count)]


class GgufFile:
    """settings: the metadata by name. tensors: the shape, kind and place of each tensor, by name."""

    def __init__(self, path: Path) -> None:
        """Raises CorruptFileError, or UnsupportedModelError on another version."""
        header = Header(path)
        self.watched = header.watched
        if header.take(4, "the magic") != MAGIC:
            raise header.bad("it does not begin with GGUF")
        version = header.number("<I", "the version")
        if version not in VERSIONS:
            raise UnsupportedModelError(
                f"{path} is of GGUF version {version}; lightrm reads {' and '.join(map(str, VERSIONS))}, little "
                "endian: convert the model again"
            )
        counts = [header.number("<Q", "the number of entries") for _ in range(2)]
        if max(counts) > MOST_ENTRIES:
            raise header.bad(f"it would have {counts[0]} tensors and {counts[1]} settings")
        self.settings: dict[str, Any] = {}
        for _ in range(counts[1]):
            name = header.text("the name of a setting")
            if name in self.settings or len(name) > MOST_NAME:
                raise header.bad(f"the setting {name[:80]!r} stands there twice, or its name is no name")
            self.settings[name] = header.value(header.number("<I", name[:80]), name[:80])
        self.tensors: dict[str, tuple[tuple[int, ...], Kind, int]] = {}
        for _ in range(counts[0]):
            self.add(header)
        alignment = self.settings.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
            raise header.bad(f"its alignment is {str(alignment)[:40]}")
        self.start = -(-header.place // alignment) * alignment
        self.check(header, alignment)

    def add(self, header: Header) -> None:
        """Read one entry of the table of tensors."""
        name = header.text("the name of a tensor")
        axes = header.number("<I", name[:80])
        if name in self.tensors or axes > MOST_AXES:
            raise header.bad(f"tensor {name[:80]!r} stands there twice, or has {axes} axes")
        shape = tuple(header.number("<Q", name[:80]) for _ in range(axes))[::-1]
        kind, offset = header.number("<I", name[:80]), header.number("<Q", name[:80])
        if kind not in KINDS:
            raise UnsupportedModelError(
                f"{header.watched.path}: tensor {name[:80]!r} is of kind {kind}; lightrm reads "
                f"{', '.join(one.name for one in KINDS.values())}: take a file in one of these"
            )
        if not shape or 0 in shape or shape[-1] % KINDS[kind].weights:
            raise header.bad(f"tensor {name[:80]!r} of kind {KINDS[kind].name} has the shape {shape}")
        self.tensors[name] = shape, KINDS[kind], offset

    def check(self, header: Header, alignment: int) -> None:
        """Raise CorruptFileError if tensors overlap or lie outside the file."""
        end = 0
        for name in sorted(self.tensors, key=lambda name: self.tensors[name][2]):
            offset = self.tensors[name][2]
            if offset < end or offset % alignment:
                raise header.bad(f"tensor {name[:80]!r} begins at {offset}, within another one or unaligned")
            end = offset + self.size(name)
            if self.start + end > self.watched.size:
                raise header.bad(f"tensor {name[:80]!r} ends at byte {self.start + end}")

    def size(self, name: str) -> int:
        """Return the bytes of a tensor."""
        shape, kind, _ = self.tensors[name]
        return math.prod(shape) // kind.weights * kind.bytes

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that a tensor is widened to."""
        return self.tensors[name][1].dtype

    def blocks(self, name: str) -> Blocked:
        """Return a tensor as it is stored, with all axes but the last as rows, in memory of its own. Raises
        CorruptFileError."""
        shape, kind, offset = self.tensors[name]
        buffer = torch.empty(self.size(name), dtype=torch.uint8)
        try:
            self.watched.read(self.start + offset, memoryview(buffer.numpy().data))
        except (OSError, EOFError) as error:
            raise CorruptFileError(f"{self.watched.path}: tensor {name!r} cannot be read: {error}") from error
        return Blocked(buffer.view(math.prod(shape[:-1]), -1), kind)

    def read(self, name: str) -> torch.Tensor:
        """Return a small tensor widened. Raises CorruptFileError."""
        found = self.blocks(name)
        return found.rows(0, found.shape[0]).view(self.shape(name))


def gguf_in(folder: Path) -> Path | None:
    """Return the GGUF file that a path is, or that is the only model in a folder; None if there is none.

    Raises CheckpointError if there are several.
    """
    if not folder.is_dir():
        return folder if folder.suffix == ENDING else None
    files = sorted(folder.glob(f"*{ENDING}"))
    if not files or any(
        path for kind in ("*.safetensors", "*.bin", "adapter_config.json") for path in folder.glob(kind)
    ):
        return None
    if len(files) > 1:
        names = ", ".join(path.name for path in files[:6])
        raise CheckpointError(f"{folder} holds {len(files)} models, {names}: pass the path of one of them")
    return files[0]
