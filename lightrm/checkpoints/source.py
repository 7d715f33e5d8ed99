"""Tensors of a folder, by name, read one at a time: safetensors or pickle shards, with or without an index.

Pickles are opened with `weights_only=True` and memory-mapped; a pickle that asks for more than tensors is refused.
Nothing is read until a tensor is asked for, except the list of names. A tensor is read into memory of its own: pages
of a mapped file would stay resident after it is forgotten, until the whole file is in memory.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors
import torch

from lightrm.errors import CheckpointError, CorruptFileError, TensorMismatchError, UnsafePickleError
from lightrm.schemes.blockwise import Blockwise
from lightrm.schemes.grouped import Grouped
from lightrm.schemes.int8 import Rowwise

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin", "model.bin", "pytorch_model.pt", "model.pt")
PICKLES = (".bin", ".pt", ".pth")
WIDENED_AT_ONCE = 256  # rows
LFS_POINTER = b"version https://git-lfs"
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip


class TensorSource:
    """The tensors of some files. `names` maps each tensor to its file."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.names: dict[str, Path] = {}
        self.opened: dict[Path, Any] = {}
        self.headers: dict[Path, dict[str, tuple[int, dict[str, Any]]]] = {}
        self.places: dict[Path, dict[str, int]] = {}
        for path in files:
            for name in self.open(path):
                self.names[name] = path

    def open(self, path: Path) -> Iterable[str]:
        """Names in one file. Raises CorruptFileError or UnsafePickleError."""
        size = path.stat().st_size
        if size == 0:
            raise CorruptFileError(f"{path} is empty (0 bytes): copy or download it again")
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise CorruptFileError(
                    f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder"
                )
        if path.suffix in PICKLES:
            self.opened[path] = open_pickle(path)
            return list(self.opened[path])
        try:
            self.opened[path] = safetensors.safe_open(path, framework="pt")
        except Exception as error:  # SafetensorError is not an OSError in every version
            raise CorruptFileError(
                f"{path} ({size} bytes) is cut short or not safetensors: {error}; copy or download it again"
            ) from error
        return list(self.opened[path].keys())

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, in the dtype of the file, in memory of its own."""
        path = self.names[name]
        try:
            if path.suffix in PICKLES:
                return self.read_pickled(path, name)
            start, entry = self.header(path)[name]
            dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
            if dtype is None:
                return self.opened[path].get_tensor(name)  # type: ignore[no-any-return]
            first, last = entry["data_offsets"]
            return read_bytes(path, start + first, last - first).view(dtype).view(entry["shape"])
        except (OSError, EOFError, safetensors.SafetensorError) as error:
            raise CorruptFileError(f"{path}: tensor {name!r} cannot be read: {error}") from error

    def mapped(self, name: str) -> torch.Tensor:
        """One tensor of a safetensors file where the file is mapped: its pages are read when they are looked at."""
        tensor: torch.Tensor = self.opened[self.names[name]].get_tensor(name)
        return tensor

    def read_pickled(self, path: Path, name: str) -> torch.Tensor:
        """Through the tensor's place in the file, where this PyTorch tells it; else copied out of the mapped file."""
        tensor: torch.Tensor = self.opened[path][name]
        if path not in self.places:
            self.places[path] = pickle_places(path)
        place = self.places[path].get(name)
        if place is None:
            return tensor.clone()
        storage = read_bytes(path, place, tensor.untyped_storage().nbytes()).view(tensor.dtype)
        return torch.as_strided(storage, tensor.shape, tensor.stride(), tensor.storage_offset())

    def header(self, path: Path) -> dict[str, tuple[int, dict[str, Any]]]:
        """A safetensors file's tensors: where its data starts, and what the header says of the tensor."""
        if path not in self.headers:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                entries = json.loads(file.read(size))
            self.headers[path] = {name: (8 + size, entry) for name, entry in entries.items() if name != "__metadata__"}
        return self.headers[path]

    def shape(self, name: str) -> tuple[int, ...]:
        path = self.names[name]
        if path.suffix in PICKLES:
            return tuple(self.opened[path][name].shape)
        return tuple(self.opened[path].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype | None:
        """Of a tensor in its file; None for one that PyTorch has no name for here."""
        path = self.names[name]
        if path.suffix in PICKLES:
            return self.opened[path][name].dtype  # type: ignore[no-any-return]
        return SAFETENSORS_DTYPES.get(self.header(path)[name][1]["dtype"])

    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.opened)


class PackedSource(TensorSource):
    """Another source seen through a quantized format: each packed layer X of `stored` appears as one `X.weight`.

    holds: the scheme that keeps the file's own values.
    """

    holds: str

    def __init__(self, stored: TensorSource) -> None:
        self.stored = stored
        self.opened = stored.opened
        self.names = dict(stored.names)

    def packed(self, name: str) -> Grouped | Blockwise | Rowwise | None:
        """A layer's own values under the name of its weight; None for any other tensor."""
        raise NotImplementedError

    def packed_shape(self, name: str) -> tuple[int, int] | None:
        raise NotImplementedError

    def read(self, name: str) -> torch.Tensor:
        """A packed weight widened to (O, I), in the dtype that its format gives it; any other tensor as it is."""
        part = self.packed(name)
        if part is None:
            return self.stored.read(name)
        widened = torch.empty(part.shape, dtype=part.dtype)
        for start in range(0, part.shape[0], WIDENED_AT_ONCE):
            end = min(start + WIDENED_AT_ONCE, part.shape[0])
            widened[start:end] = part.rows(start, end)
        return widened

    def shape(self, name: str) -> tuple[int, ...]:
        return self.packed_shape(name) or self.stored.shape(name)


def open_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        try:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            # Files from before torch 1.6 are not zip archives and cannot be mapped.
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not names_code(error):
            raise CorruptFileError(f"{path} is cut short or not a PyTorch file: {cause(error)}") from error
        raise UnsafePickleError(
            f"{path} holds more than plain tensors, and loading it would run code from the checkpoint: "
            f"{cause(error)}; ask its author for safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise CorruptFileError(
            f"{path} ({path.stat().st_size} bytes) is cut short or not a PyTorch file: {cause(error)}; "
            "copy or download it again"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise CorruptFileError(f"{path}: expected a dictionary of tensors, found {type(state).__name__}")
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def pickle_places(path: Path) -> dict[str, int]:
    """Where each tensor's storage starts in a zip-format file; empty where this PyTorch does not tell."""
    try:
        state = torch.load(path, map_location="meta", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError):
        return {}
    state = state["state_dict"] if isinstance(state.get("state_dict"), dict) else state
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    places = {name: getattr(t.untyped_storage(), "_checkpoint_offset", None) for name, t in tensors.items()}
    return {name: place for name, place in places.items() if place is not None}


def read_bytes(path: Path, start: int, count: int) -> torch.Tensor:
    """uint8 (count,), read straight into its own memory. Raises EOFError if the file ends too soon."""
    buffer = torch.empty(count, dtype=torch.uint8)
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        view, filled = memoryview(buffer.numpy().data), 0
        while filled < count:
            got = file.readinto(view[filled:])
            if not got:
                raise EOFError(f"{count} bytes were expected at {start}, the file has {filled}")
            filled += got
    return buffer


def names_code(error: Exception) -> bool:
    """torch reports an unknown class and a stream that is no pickle by one error: tell them apart."""
    return any(word in str(error) for word in ("Unsupported global", "Unsupported class", "GLOBAL"))


def cause(error: Exception) -> str:
    """The informative part of torch's message, without its advice to load the file unsafely."""
    text = str(error).strip()
    found = re.search(r"WeightsUnpickler error: (.+)", text) or re.search(r"(GLOBAL .+?) was not", text)
    return found[1][:200] if found else text.split("\n")[0][:200]


def main_files(folder: Path) -> list[Path]:
    """The weight files of a model: what an index names, or the one unsharded file.

    Raises TensorMismatchError if a shard that the index names is missing, CheckpointError if there is no file.
    """
    for name in INDEXES:
        path = folder / name
        if not path.is_file():
            continue
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            shards = [folder / file for file in dict.fromkeys(weight_map.values())]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptFileError(f"{path} is not a weight index: {error!r}") from error
        outside = [s for s in shards if folder.resolve() not in (s.parent.resolve(), *s.parent.resolve().parents)]
        if outside:
            raise CorruptFileError(f"{path} names files outside its folder: {outside[0].name}")
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            raise TensorMismatchError(
                f"{path.name} names {len(shards)} shards, missing are {', '.join(missing)}: finish the download"
            )
        return shards
    for name in SINGLES:
        if (folder / name).is_file():
            return [folder / name]
    loose = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    loose = [path for path in loose if not path.name.startswith(("value_head", "adapter"))]
    if loose:
        return loose
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing"
    raise CheckpointError(f"{folder} holds no weights: expected {', '.join((*INDEXES, *SINGLES[:2]))}; found {found}")


def check_index(folder: Path, source: TensorSource) -> None:
    """Raises TensorMismatchError if the index names a tensor that its shard does not hold."""
    for name in INDEXES:
        path = folder / name
        if path.is_file():
            promised = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            absent = [tensor for tensor in promised if tensor not in source.names]
            if absent:
                raise TensorMismatchError(
                    f"{path.name} promises {len(absent)} tensors that no shard holds, first {absent[0]!r}: "
                    "a shard is cut short or from another model"
                )
            return
