"""Tensors of a folder by name, read one at a time: safetensors or pickle shards, with or without an index.

Only names are read until a tensor is asked for. A tensor is read into memory of its own: the pages of a mapped file
would stay in memory after the tensor is dropped, until the whole file is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from lightrm.checkpoints.gguf_file import GgufFile
from lightrm.checkpoints.outline_files import OutlineFile, is_outline
from lightrm.checkpoints.pickles import PickleFile
from lightrm.checkpoints.safe import SafeFile
from lightrm.errors import CheckpointError, CorruptFileError, TensorMismatchError
from lightrm.files import read_json
from lightrm.schemes.blockwise import Blockwise
from lightrm.schemes.grouped import Grouped
from lightrm.schemes.int8 import Rowwise

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin", "model.bin", "pytorch_model.pt", "model.pt")
PICKLES = (".bin", ".pt", ".pth")
WIDENED_AT_ONCE = 256  # rows


class Quantized(Protocol):
    """Quantized values of a weight that know how they are dequantized."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def rows(self, start: int, end: int) -> torch.Tensor:
        """Return output channels start .. end dequantized, (end - start, I), in `dtype`."""


class TensorSource:
    """The tensors of some files. names: of each tensor -> its file."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Raises CorruptFileError, UnsafePickleError, or TensorMismatchError if two files hold a tensor."""
        self.names: dict[str, Path] = {}
        self.opened: dict[Path, SafeFile | PickleFile | GgufFile | OutlineFile] = {}
        for path in files:
            self.opened[path] = open_file(path)
            for name in self.opened[path].tensors:
                if name in self.names and not self.same(name, path):
                    raise TensorMismatchError(
                        f"{path} and {self.names[name].name} both hold tensor {name!r}, with other values: which of "
                        "them belongs to the model?"
                    )
                self.names[name] = path

    def same(self, name: str, path: Path) -> bool:
        one, two = self.opened[self.names[name]], self.opened[path]
        return one.shape(name) == two.shape(name) and torch.equal(one.read(name), two.read(name))

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor on the CPU, in the dtype of the file, in memory of its own. Raises CorruptFileError."""
        return self.opened[self.names[name]].read(name)

    def rows(self, name: str, which: Sequence[int]) -> torch.Tensor:
        """Return some rows of one tensor; of a safetensors file, only their bytes are read."""
        file = self.opened[self.names[name]]
        index = torch.tensor(which)
        return file.mapped(name)[index] if isinstance(file, SafeFile) else self.read(name)[index]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.opened[self.names[name]].shape(name)

    def dtype(self, name: str) -> torch.dtype | None:
        """Return the dtype of a tensor in its file; None if PyTorch has no such dtype here."""
        return self.opened[self.names[name]].dtype(name)

    def bytes(self) -> int:
        return sum(
            file.size if isinstance(file, OutlineFile) else file.watched.size for file in self.opened.values()
        )  # fmt: skip

    @property
    def shaped(self) -> bool:
        """Whether the shapes are known: not of pickles on the hub."""
        return all(file.shaped for file in self.opened.values() if isinstance(file, OutlineFile))


def open_file(path: Path) -> SafeFile | PickleFile | OutlineFile:
    if is_outline(path):
        return OutlineFile(path)
    return PickleFile(path) if path.suffix in PICKLES else SafeFile(path)


class PackedSource(TensorSource):
    """Another source read through a quantized format: each packed layer X of `stored` appears as one `X.weight`.

    holds: the scheme that keeps the file's own values; None if there is none, and they are only widened.
    """

    holds: str | None

    def __init__(self, stored: TensorSource) -> None:
        self.stored = stored
        self.opened = stored.opened
        self.names = dict(stored.names)

    def packed(self, name: str) -> Grouped | Blockwise | Rowwise | None:
        """Return the quantized values of a weight in a form that kernels run; None for any other tensor."""
        raise NotImplementedError

    def quantized(self, name: str) -> Quantized | None:
        """Return the quantized values of a weight in a form that can be widened; None for any other tensor."""
        return self.packed(name)

    def packed_shape(self, name: str) -> tuple[int, int] | None:
        raise NotImplementedError

    def read(self, name: str) -> torch.Tensor:
        """Return a packed weight dequantized to (O, I), in the dtype that its format gives it; any other tensor as it
        is."""
        part = self.quantized(name)
        if part is None:
            return self.stored.read(name)
        widened = torch.empty(part.shape, dtype=part.dtype)
        for start in range(0, part.shape[0], WIDENED_AT_ONCE):
            end = min(start + WIDENED_AT_ONCE, part.shape[0])
            widened[start:end] = part.rows(start, end)
        return widened

    def rows(self, name: str, which: Sequence[int]) -> torch.Tensor:
        """As `TensorSource.rows`; a packed weight is dequantized whole."""
        if self.quantized(name) is None:
            return self.stored.rows(name, which)
        return self.read(name)[torch.tensor(which)]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.packed_shape(name) or self.stored.shape(name)


def main_files(folder: Path) -> list[Path]:
    """Return the weight files of a model: those that an index names, else the one unsharded file, else all that look
    like shards.

    Raises TensorMismatchError if a shard that the index names is missing, CorruptFileError if the index names files
    that cannot be its shards, CheckpointError if there is no file.
    """
    for name in INDEXES:
        path = folder / name
        if not path.is_file():
            continue
        shards = [folder / file for file in dict.fromkeys(weight_map(path).values())]
        try:
            outside = [s for s in shards if folder.resolve() not in (s.parent.resolve(), *s.parent.resolve().parents)]
            missing = [shard.name for shard in shards if not shard.is_file()]
        except (OSError, ValueError) as error:  # a name that is none: too long, or with a zero byte
            raise CorruptFileError(f"{path} names a file that cannot be: {error}") from error
        if outside:
            raise CorruptFileError(f"{path} names files outside its folder: {outside[0].name}")
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


def weight_map(index: Path) -> dict[str, str]:
    """Return the file of each tensor. Raises CorruptFileError."""
    found = read_json(index, CorruptFileError).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise CorruptFileError(f"{index} is not a weight index: expected a weight_map of tensors to file names")
    return found


def check_index(folder: Path, source: TensorSource) -> None:
    """Raise TensorMismatchError if the index names a tensor that its shard does not hold."""
    for name in INDEXES:
        path = folder / name
        if path.is_file():
            absent = [tensor for tensor in weight_map(path) if tensor not in source.names]
            if absent:
                raise TensorMismatchError(
                    f"{path.name} promises {len(absent)} tensors that no shard holds, first {absent[0]!r}: "
                    "a shard is cut short or from another model"
                )
            return
