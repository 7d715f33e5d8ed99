"""Reading what zstd compressed: by Python's own module from 3.14 on, else by the package `zstandard`."""

from __future__ import annotations

from importlib import import_module
from io import BufferedReader, RawIOBase
from typing import IO, Any

from lightrm.errors import InputError

ZSTD = b"\x28\xb5\x2f\xfd"
CHUNK = 2**18  # compressed bytes that are read at once


class DamagedError(Exception):
    """What was read is not what zstd wrote."""


def unzstd(file: IO[bytes], what: str) -> IO[bytes]:
    """Return the bytes that zstd compressed, in one frame or several. what: the name of the file.

    Raises InputError if nothing here can read them. Reading raises DamagedError, also where the data ends too soon.
    """
    return BufferedReader(Unzstd(file, reader_of(what)), CHUNK)


class Unzstd(RawIOBase):
    """Own code, since the stream readers of `zstandard` take a file that is cut short for a whole one."""

    def __init__(self, file: IO[bytes], module: Any) -> None:
        self.file, self.module = file, module
        self.frame: Any = None  # None between two frames
        self.rest, self.made = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.made:
            given = self.rest or self.file.read(CHUNK)
            self.rest = b""
            if not given:
                if self.frame is not None:
                    raise DamagedError("it ends within a frame of zstd")
                return 0
            self.made = memoryview(self.plain(given))
        count = min(len(buffer), len(self.made))
        buffer[:count], self.made = self.made[:count], self.made[count:]
        return count

    def plain(self, given: bytes) -> bytes:
        if self.frame is None:
            self.frame = new_frame(self.module)
        try:
            made: bytes = self.frame.decompress(given)
        except self.module.ZstdError as error:
            raise DamagedError(str(error)) from error
        if self.frame.eof:
            self.rest, self.frame = self.frame.unused_data, None
        return made


def new_frame(module: Any) -> Any:
    return module.ZstdDecompressor().decompressobj() if module.__name__ == "zstandard" else module.ZstdDecompressor()


def reader_of(what: str) -> Any:
    for name in ("compression.zstd", "zstandard"):
        try:
            return import_module(name)
        except ImportError:
            continue
    raise InputError(
        f"{what} is compressed by zstd: pip install 'lightrm[zstd]' to read it here (Python 3.14 needs nothing), or "
        "unpack it first"
    )
