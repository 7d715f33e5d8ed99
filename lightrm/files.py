"""Files: written whole or not at all, read as JSON from strangers, and watched while they are in use.

The content of a file is on the disk before its name is: even after a crash of the machine, a file of that name is
whole.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import sys
import threading
import weakref
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lightrm.errors import CorruptFileError, InputError, LightRMError

UNFINISHED = ".unfinished"  # ends the name of what is being written
LARGEST_JSON = 2**28  # bytes; the largest tokenizer.json that people publish has 2^25
DEEPEST_JSON = 64  # lists and objects inside each other; what people publish has some eight
MOST_DIGITS = 300  # of a whole number: it shall fit a float
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def cache_folder() -> Path:
    """Return the folder of what is kept between runs: LIGHTRM_CACHE, or lightrm's folder of the user's cache."""
    named = os.environ.get("LIGHTRM_CACHE")
    if named:
        return Path(named)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", "~/AppData/Local")
    else:
        base = "~/Library/Caches" if sys.platform == "darwin" else os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "lightrm"


def write_text(path: Path, text: str) -> None:
    """Write beside the target, then rename: a file of this name is always whole."""
    unfinished = path.with_name(path.name + UNFINISHED)
    unfinished.write_text(text, encoding="utf-8")
    to_disk(unfinished)
    os.replace(unfinished, path)
    to_disk(path.parent)


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False))


def to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk. Windows cannot open folders for this."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def locked(file: IO[bytes], path: Path) -> None:
    """Lock an open file until it is closed, where the file system has locks. Raises InputError, which names `path`, if
    another run has it."""
    try:
        import fcntl  # noqa: PLC0415  Windows has none

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            raise InputError(f"{path} is being written by another run") from error
        # a file system without locks


def read_json(path: Path, error: type[LightRMError]) -> dict[str, Any]:
    """Return the object in a JSON file that a stranger wrote. Raises `error`, which names the file, as `parse_json`
    does."""
    try:
        size = path.stat().st_size
        if size > LARGEST_JSON:
            raise error(f"{path} has {size} bytes, more than any JSON file of a model: is it what its name says?")
        content = path.read_bytes()
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror or cause}") from cause
    return parse_json(content, str(path), error)


def parse_json(content: bytes, where: str, error: type[LightRMError]) -> dict[str, Any]:
    """Return a JSON object that every program reads alike: UTF-8, no key twice, no NaN or infinity, no number that
    overflows a float, no lone surrogate, not nested deeper than DEEPEST_JSON. Python's json accepts all of these.

    Raises `error`, whose message begins with `where`.
    """
    try:
        text = content.decode("utf-8")
        value = json.loads(
            text, object_pairs_hook=object_of, parse_int=whole, parse_float=finite, parse_constant=constant
        )
        if SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise error(f"{where} cannot be read as JSON: it is nested far too deep") from None
    except ValueError as cause:
        raise error(f"{where} cannot be read as JSON: {cause}") from cause
    if not isinstance(value, dict):
        raise error(f"{where}: expected a JSON object, found {type(value).__name__}")
    if (found := depth(value)) > DEEPEST_JSON:
        raise error(f"{where} is nested {found} deep, expected at most {DEEPEST_JSON}")
    return value


@dataclass(frozen=True, slots=True)
class NoNumber:
    """Stands for a number that is not allowed, until the object around it can name its key."""

    why: str


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:80]!r} stands in one object twice")
    for name, value in pairs:
        parts = [value]
        while parts:
            part = parts.pop()
            if isinstance(part, NoNumber):
                raise ValueError(f"field {name[:80]!r} holds {part.why}")
            if isinstance(part, list):
                parts += [inner for inner in part if isinstance(inner, NoNumber | list)]
    return made


def whole(digits: str) -> int | NoNumber:
    return int(digits) if len(digits) <= MOST_DIGITS else NoNumber(f"a number of {len(digits)} digits")


def finite(digits: str) -> float | NoNumber:
    value = float(digits)
    return value if math.isfinite(value) else NoNumber(f"{digits[:80]}, which is larger than a float can be")


def constant(name: str) -> NoNumber:
    return NoNumber(f"{name}, which is not a number of JSON")


def depth(value: dict[str, Any]) -> int:
    levels, level = 0, list[Any]((value,))
    while level:
        levels += 1
        inner = (part for outer in level for part in (outer.values() if isinstance(outer, dict) else outer))
        level = [part for part in inner if isinstance(part, dict | list)]
    return levels


class Watched:
    """A file that stays open while it is in use, and that nobody should change meanwhile.

    If the file is replaced (a new one renamed to its name), the old content is still read. If it is overwritten in
    place, its size or time of change shows it. A file that is cut short while it is mapped would end the process with
    SIGBUS, so whoever maps it calls `check` before each use (a microsecond). A cut between the check and the use still
    ends the process; only a copy of the file could prevent that.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self.path, self.turn = path, threading.Lock()
        self.handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self.handle)
        self.size, self.changed = self.state()

    def state(self) -> tuple[int, int]:
        found = os.fstat(self.handle)
        return found.st_size, found.st_mtime_ns

    def check(self) -> None:
        """Raise CorruptFileError if the file is not what it was when it was opened."""
        size, changed = self.state()
        if (size, changed) != (self.size, self.changed):
            what = f"it had {self.size} bytes and has {size}" if size != self.size else "it was written to"
            raise CorruptFileError(f"{self.path} was changed while its model is in use ({what}): load the model again")

    def read(self, start: int, view: memoryview) -> None:
        """Fill a buffer from byte `start` on. Raises EOFError if the file ends too soon, CorruptFileError as
        `check`."""
        self.check()
        filled = 0
        while filled < len(view):
            got = self.some(start + filled, view[filled:])
            if not got:
                raise EOFError(f"{len(view)} bytes were expected at {start}, the file has {filled}")
            filled += got

    def some(self, start: int, view: memoryview) -> int:
        """Read at a given place: a forked child shares the file's current position with its parent."""
        if hasattr(os, "preadv"):
            return os.preadv(self.handle, [view], start)
        with self.turn:
            os.lseek(self.handle, start, os.SEEK_SET)
            part = os.read(self.handle, len(view))
        view[: len(part)] = part
        return len(part)
