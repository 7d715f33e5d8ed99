"""What a calibration has finished, kept in `FOLDER.calibration.unfinished` beside its target, so that it can go on.

    draft.json                     what it is of: checkpoint, scheme, texts, versions
    layer-00007.safetensors        a finished layer, as the model will hold it
    streams-00008.bin              both residual streams as layer 8 reads them, pack by pack
    layer-00007.json               written last: checksums of these two files, and what the report says of the layer

The streams before a layer are removed when the layer is finished. A layer counts if its record is there; a record whose
files do not match it ends the run with an error. Nothing of this is ever loaded as a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from lightrm.checkpoints.safe import SafeFile
from lightrm.checkpoints.stored import write_safetensors
from lightrm.checksums import SEAL, file_sum, sealed
from lightrm.errors import CorruptFileError, InputError
from lightrm.files import UNFINISHED, locked, read_json, to_disk, write_json

FORMAT = 1
HEADER = "draft.json"
QUANTIZED, EXACT = 0, 1  # the two streams


def draft_of(target: Path) -> Path:
    """Return where the draft of a folder is."""
    return target.with_name(f"{target.name}.calibration{UNFINISHED}")


class Streams:
    """Two residual streams in memory, pack by pack."""

    def __init__(self, sides: Sequence[Sequence[torch.Tensor]]) -> None:
        """sides: (T, D) of each pack, of the quantized and of the exact stream."""
        self.sides = [list(packs) for packs in sides]

    def get(self, side: int, k: int) -> torch.Tensor:
        return self.sides[side][k]

    def put(self, side: int, k: int, x_TD: torch.Tensor) -> None:
        self.sides[side][k] = x_TD


@dataclass(frozen=True, slots=True)
class Place:
    """Where a pack of a stream is in the file."""

    at: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class KeptStreams(Streams):
    """The same in files: the streams before a layer stay as they were until the layer is finished."""

    def __init__(self, folder: Path, layer: int, packs: Sequence[int], width: int, dtype: torch.dtype) -> None:
        """packs: tokens of each. dtype: of the quantized stream; the exact one is float32."""
        self.folder, self.layer = folder, layer
        self.places: dict[tuple[int, int], Place] = {}
        at = 0
        for side, kind in ((QUANTIZED, dtype), (EXACT, torch.float32)):
            for k, tokens in enumerate(packs):
                self.places[side, k] = Place(at, (tokens, width), kind)
                at += tokens * width * kind.itemsize
        self.bytes = at
        self.after: set[tuple[int, int]] = set()  # what the layer has written already

    def path(self, layer: int) -> Path:
        return self.folder / f"streams-{layer:05d}.bin"

    def get(self, side: int, k: int) -> torch.Tensor:
        place = self.places[side, k]
        path = self.path(self.layer + ((side, k) in self.after))
        count = place.shape[0] * place.shape[1] * place.dtype.itemsize
        held = np.fromfile(path, np.uint8, count, offset=place.at)
        if held.size != count:
            raise CorruptFileError(f"{path} was cut short while it was in use: start again")
        return torch.from_numpy(held).view(place.dtype).view(place.shape)

    def put(self, side: int, k: int, x_TD: torch.Tensor) -> None:
        place, path = self.places[side, k], self.path(self.layer + 1)
        with open(path, "r+b" if self.after else "wb") as file:
            file.seek(place.at)
            file.write(x_TD.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        self.after.add((side, k))

    def advance(self) -> None:
        """Go to the next layer: what was written is what it reads."""
        self.path(self.layer).unlink(missing_ok=True)
        self.layer, self.after = self.layer + 1, set()


class Draft:
    """An open draft, which no other run can have open if the file system supports locks. finished: layers that are."""

    def __init__(self, folder: Path, of: Mapping[str, str]) -> None:
        """of: all that the result depends on. Raises InputError, which names what differs, if the draft that is there
        is of something else; CorruptFileError if it is damaged."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.file: IO[bytes] = open(folder / "lock", "ab")  # noqa: SIM115  as long as the draft is
        try:
            locked(self.file, folder)
            self.begin({"format": str(FORMAT), **of})
        except Exception:
            self.file.close()
            raise
        self.finished = 0
        while self.record(self.finished).exists():
            self.finished += 1

    def begin(self, of: Mapping[str, str]) -> None:
        """Write the header, or check it."""
        header = self.folder / HEADER
        if not header.exists():
            write_json(header, sealed({"of": dict(of)}))
            return
        had = self.read(header)["of"]
        names = [name for name in {**of, **had} if had.get(name) != of.get(name)]
        other = [f"{name} {had.get(name)!r}, now {of.get(name)!r}" for name in names]
        if other:
            raise InputError(f"{self.folder} was begun with {'; '.join(other)}: remove it, or go on with the same")

    def record(self, i: int) -> Path:
        return self.folder / f"layer-{i:05d}.json"

    def read(self, path: Path) -> dict[str, Any]:
        raw = read_json(path, CorruptFileError)
        if raw.get(SEAL) != sealed(raw)[SEAL]:
            raise CorruptFileError(f"{path} was altered: remove {self.folder} and start again")
        return raw

    def streams(self, packs: Sequence[int], width: int, dtype: torch.dtype) -> KeptStreams:
        """Return the streams before the first layer that is not finished; empty if none is. Raises CorruptFileError."""
        found = KeptStreams(self.folder, self.finished, packs, width, dtype)
        if self.finished:
            self.check(found.path(self.finished), self.read(self.record(self.finished - 1))["streams"])
        else:
            found.layer = -1
        return found

    def check(self, path: Path, expected: str) -> None:
        if not path.is_file() or file_sum(path) != expected:
            raise CorruptFileError(f"{path} is missing or was altered: remove {self.folder} and start again")

    def keep(self, i: int, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any], streams: KeptStreams) -> None:
        """Keep a finished layer and the streams after it. All is on the disk when this returns."""
        weights, after = self.weights(i), streams.path(i + 1)
        write_safetensors(weights, tensors)
        to_disk(after)
        to_disk(self.folder)
        kept = {"weights": file_sum(weights), "streams": file_sum(after), "facts": dict(facts)}
        write_json(self.record(i), sealed(kept))
        self.finished = i + 1
        streams.advance()

    def weights(self, i: int) -> Path:
        return self.folder / f"layer-{i:05d}.safetensors"

    def layer(self, i: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the tensors of a finished layer, and what was kept with them. Raises CorruptFileError."""
        kept = self.read(self.record(i))
        self.check(self.weights(i), kept["weights"])
        file = SafeFile(self.weights(i))
        return {name: file.read(name) for name in file.tensors}, kept["facts"]

    def close(self) -> None:
        """Let another run have it."""
        self.file.close()


def remove(folder: Path) -> None:
    """Remove a draft: records first and the header last, so that what is left never seems to be of another."""
    for path in sorted(folder.iterdir(), key=lambda path: (path.name == HEADER, path.suffix != ".json")):
        path.unlink()
    folder.rmdir()
