"""The tensors of one PyTorch file (.bin, .pt, .pth). It is opened with `weights_only=True` and memory-mapped; a file
that holds more than plain tensors is refused.

Since PyTorch 1.6 such a file is a zip archive, with a CRC-32 of each record. PyTorch ignores them; lightrm checks each
record the first time that it is read. Older files have none. A writer may store 0 instead, which zipfile would call a
bad CRC, so the archive is read here.
"""

from __future__ import annotations

import pickle
import re
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from lightrm.checkpoints.safe import DTYPES, opened
from lightrm.errors import CorruptFileError, UnsafePickleError
from lightrm.files import Watched

BLOCK = 2**22  # bytes whose CRC is taken at once
LOCAL_HEADER, NAME_AT = 30, 26  # of a zip record: its length, and where the lengths of what follows it stand
PLAIN = (torch.Tensor, torch.nn.Parameter)


class PickleFile:
    """tensors: the mapped tensors, by name."""

    def __init__(self, path: Path) -> None:
        """Raises CorruptFileError or UnsafePickleError."""
        self.watched = opened(path)
        self.records = records_of(self.watched)
        self.checked: set[int] = set()
        turned = False  # where the bytes are of the other order, PyTorch turns them
        for place, record in self.records.items():
            if "/data/" not in record.filename:
                self.check(place)
            if record.filename.endswith("/byteorder"):
                turned = self.content(place) != sys.byteorder.encode()
        self.tensors = plain_tensors(path, load(path))
        self.places = places_of(path) if self.records and not turned else {}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype | None:
        return self.tensors[name].dtype

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor in memory of its own, read from its place in the file, or copied from the mapped file if
        this version of PyTorch does not tell the place. Raises CorruptFileError."""
        mapped = self.tensors[name]
        place = self.places.get(name)
        try:
            if place is None:
                for start in self.records:
                    self.check(start)
                self.watched.check()
                return mapped.detach().clone()
            if place not in self.records or self.records[place].file_size != mapped.untyped_storage().nbytes():
                raise EOFError("its record in the archive has another size than the tensor")
            return self.part(place, mapped)
        except (OSError, EOFError) as error:
            raise CorruptFileError(f"{self.watched.path}: tensor {name!r} cannot be read: {error}") from error

    def part(self, place: int, mapped: torch.Tensor) -> torch.Tensor:
        """Return the bytes from a tensor's first number to its last, as a tensor with the file's strides."""
        size = mapped.element_size()
        first = int(mapped.storage_offset()) * size
        span = sum((n - 1) * step for n, step in zip(mapped.shape, mapped.stride(), strict=True)) + 1
        buffer = torch.empty(span * size if mapped.numel() else 0, dtype=torch.uint8)
        self.watched.read(place + first, memoryview(buffer.numpy().data))
        whole = len(buffer) == self.records[place].file_size
        self.check(place, buffer if whole else None)
        return torch.as_strided(buffer.view(mapped.dtype), mapped.shape, mapped.stride())

    def check(self, place: int, content: torch.Tensor | None = None) -> None:
        """Check the record at a place against its CRC. content: the record, if it was read already. A CRC of 0 means
        that the writer left it out. Raises CorruptFileError."""
        record = self.records[place]
        if place in self.checked or not record.CRC:
            return
        found = zlib.crc32(content.numpy().data) if content is not None else self.crc(place, record.file_size)
        if found != record.CRC:
            raise CorruptFileError(
                f"{self.watched.path}: record {record.filename!r} has CRC {found:08x}, the archive says "
                f"{record.CRC:08x}: the file was altered; copy or download it again"
            )
        self.checked.add(place)

    def content(self, place: int) -> bytes:
        buffer = bytearray(self.records[place].file_size)
        self.watched.read(place, memoryview(buffer))
        return bytes(buffer)

    def crc(self, place: int, count: int) -> int:
        found = 0
        buffer = bytearray(min(BLOCK, count))
        for start in range(0, count, BLOCK):
            view = memoryview(buffer)[: min(BLOCK, count - start)]
            self.watched.read(place + start, view)
            found = zlib.crc32(view, found)
        return found


def records_of(watched: Watched) -> dict[int, zipfile.ZipInfo]:
    """Return the records of a zip archive, by the place where their content starts; none for an older file. Raises
    CorruptFileError."""
    path = watched.path
    magic = bytearray(min(4, watched.size))
    watched.read(0, memoryview(magic))
    if magic != b"PK\3\4":
        return {}
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
        found = {}
        for info in infos:
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise ValueError(f"record {info.filename!r} is compressed")
            lengths = bytearray(4)
            watched.read(info.header_offset + NAME_AT, memoryview(lengths))
            name, extra = (int.from_bytes(part, "little") for part in (lengths[:2], lengths[2:]))
            found[info.header_offset + LOCAL_HEADER + name + extra] = info
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, OverflowError) as error:
        raise corrupt(path, error) from error
    for start, info in found.items():
        if start + info.file_size > watched.size:
            raise corrupt(path, ValueError(f"record {info.filename!r} ends behind the end of the file"))
    return found


def load(path: Path) -> Any:
    """Return what PyTorch reads from the file. Raises CorruptFileError or UnsafePickleError."""
    try:
        try:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            # Files from before torch 1.6 are not zip archives and cannot be mapped.
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not names_code(error):
            raise CorruptFileError(f"{path} is cut short or not a PyTorch file: {cause(error)}") from error
        raise UnsafePickleError(
            f"{path} holds more than plain tensors, and loading it would run code from the checkpoint: "
            f"{cause(error)}; ask its author for safetensors"
        ) from error
    except Exception as error:  # a damaged pickle calls what it may call with anything
        raise corrupt(path, error) from error


def plain_tensors(path: Path, state: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a state dict, by name. Raises CorruptFileError unless all are plain tensors named by
    strings."""
    if not isinstance(state, dict):
        raise CorruptFileError(f"{path}: expected a dictionary of tensors, found {type(state).__name__}")
    tensors = named_tensors(state)
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise CorruptFileError(f"{path}: expected tensors under names, found one under {name!r}")
        if (wrong := fault(tensor)) is not None:
            raise CorruptFileError(f"{path}: tensor {name!r} {wrong}; expected a plain one: save it again as such")
    return tensors


def fault(tensor: torch.Tensor) -> str | None:
    """Return why a tensor is not a plain one whose numbers all lie in the file; None if it is."""
    if type(tensor) not in PLAIN or tensor.is_nested:
        return f"is a {type(tensor).__name__}"
    if tensor.layout != torch.strided:
        return f"is {str(tensor.layout).removeprefix('torch.')}"
    if tensor.device.type != "cpu":
        return f"is on the device {tensor.device}"
    if tensor.is_quantized or tensor.dtype not in DTYPES.values() or tensor.is_neg():
        return f"is of dtype {tensor.dtype}"
    if tensor.numel() > tensor.untyped_storage().nbytes() // tensor.element_size():
        return f"of shape {tuple(tensor.shape)} has more numbers than are in the file"
    return None


def places_of(path: Path) -> dict[str, int]:
    """Return where each tensor's storage starts in a zip archive; nothing if this version of PyTorch does not tell."""
    try:
        tensors = named_tensors(torch.load(path, map_location="meta", weights_only=True))
    except (RuntimeError, pickle.UnpicklingError):
        return {}
    places = {name: getattr(t.untyped_storage(), "_checkpoint_offset", None) for name, t in tensors.items()}
    return {name: place for name, place in places.items() if place is not None}


def named_tensors(state: dict[Any, Any]) -> dict[str, torch.Tensor]:
    """Return the items of a state dict, also of one that a trainer put into another dictionary."""
    state = state["state_dict"] if isinstance(state.get("state_dict"), dict) else state
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def corrupt(path: Path, error: Exception) -> CorruptFileError:
    return CorruptFileError(
        f"{path} ({path.stat().st_size} bytes) is cut short or not a PyTorch file: {cause(error)}; "
        "copy or download it again"
    )


def names_code(error: Exception) -> bool:
    """Whether an error means that the file names an unknown class. torch reports a broken pickle by the same error
    type."""
    return any(word in str(error) for word in ("Unsupported global", "Unsupported class", "GLOBAL"))


def cause(error: Exception) -> str:
    """Return the informative part of torch's message, without its advice to load the file unsafely."""
    text = str(error).strip() or type(error).__name__
    found = re.search(r"WeightsUnpickler error: (.+)", text) or re.search(r"(GLOBAL .+?) was not", text)
    return found[1][:200] if found else text.split("\n")[0][:200]
