"""One row of a file of records, and the rows of JSON: one for each line, or for each item of one array.

A row holds a record, or what is wrong with it. `record_forms` says what a record means.
"""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import IO, Any

from lightrm.data.zstd_files import ZSTD, DamagedError, unzstd
from lightrm.errors import InputError

GZIP, BOM = b"\x1f\x8b", codecs.BOM_UTF8
FOREIGN = {
    b"BZh": "compressed by bzip2", b"\xfd7zXZ": "compressed by xz",
    b"PK\x03\x04": "a zip file", codecs.BOM_UTF16_LE: "text in UTF-16", codecs.BOM_UTF16_BE: "text in UTF-16",
}  # fmt: skip
MOST_DEEP = 100  # lists and objects inside each other; what people publish has some five
CHUNK = 2**20  # characters of a JSON array in memory, at first
Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """number: of its line, row or item, from 1. raw: bytes that identify it. record: None if `error` says why. file:
    the name of its file, as far as a message needs one."""

    number: int
    raw: bytes
    record: Any
    error: str = ""
    unit: str = "line"
    file: str = ""

    @property
    def place(self) -> str:
        return f"{self.unit} {self.number}"

    @property
    def name(self) -> str:
        return f"{self.file}, {self.place}" if self.file else self.place

    @property
    def checksum(self) -> int:
        return zlib.crc32(self.raw)

    def after(self, digest: int) -> int:
        """Return the digest of all rows so far, this one included. digest: of the rows before it."""
        return zlib.crc32(self.checksum.to_bytes(4, "little"), digest)


@contextmanager
def unzipped(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for its bytes, unzipped if gzip or zstd compressed them. Errors as `plain_bytes`."""
    with path.open("rb") as file, plain_bytes(file, str(path)) as plain:
        yield plain


@contextmanager
def plain_bytes(file: IO[bytes], what: str) -> Iterator[IO[bytes]]:
    """Unzip a stream if gzip or zstd compressed it. what: its name.

    Raises InputError on a known form that is not supported, and on a damaged stream.
    """
    peeked = file if isinstance(file, BufferedReader) else BufferedReader(file)  # type: ignore[type-var]
    start = peeked.peek(8)
    for mark, form in FOREIGN.items():
        if start.startswith(mark):
            raise InputError(
                f"{what} is {form}: expected JSONL, JSON or CSV in UTF-8, also by gzip or zstd, or Parquet"
            )
    try:
        if start.startswith(GZIP):
            yield gzip.GzipFile(fileobj=peeked)  # type: ignore[misc]
        else:
            yield unzstd(peeked, what) if start.startswith(ZSTD) else peeked
    except (EOFError, gzip.BadGzipFile, zlib.error, DamagedError) as error:
        raise InputError(f"{what} is cut short or damaged: {error}") from error


def lines_of(path: Path) -> Iterator[bytes]:
    with unzipped(path) as file:
        yield from file


def json_rows(lines: Iterable[bytes]) -> Iterator[Row]:
    """Yield a row for each line that is not blank."""
    for number, line in enumerate(lines, 1):
        raw = line.removeprefix(BOM).strip()
        if raw:
            yield json_row(number, raw, "line")


def json_row(number: int, raw: bytes, unit: str) -> Row:
    try:
        return Row(number, raw, parsed(raw), unit=unit)
    except InputError as error:
        return Row(number, raw, None, str(error), unit)


def parsed(raw: bytes) -> Any:
    """Return a JSON value. Bytes that are not UTF-8 become lone surrogates, which whoever uses the field refuses.

    Raises InputError.
    """
    try:
        value = json.loads(raw.decode("utf-8", "surrogateescape"))
    except RecursionError:
        raise InputError(f"nested more than {MOST_DEEP} deep") from None
    except ValueError as error:
        raise InputError(f"not JSON: {error}") from error
    if raw.count(b"[") + raw.count(b"{") > MOST_DEEP and deeper(value, MOST_DEEP):
        raise InputError(f"nested more than {MOST_DEEP} deep")
    return value


def deeper(value: Any, most: int) -> bool:
    """Whether more than `most` lists and objects are nested in each other."""
    level = [value]
    for _ in range(most + 1):
        held = (outer.values() if isinstance(outer, Mapping) else outer for outer in level if holds(outer))
        level = [part for parts in held for part in parts]
    return bool(level)


def holds(value: Any) -> bool:
    return isinstance(value, Mapping | list)


def array_rows(path: Path) -> Iterator[Row]:
    """Yield the items of one JSON array, with only some of them in memory. Raises InputError if it is not an array.

    Own code, since a row keeps its exact bytes for its checksum, which parsers of JSON streams do not give.
    """
    decoder, number, size = json.JSONDecoder(), 1, CHUNK
    with unzipped(path) as file:
        reader = TextIOWrapper(file, "utf-8-sig", "surrogateescape")
        text = reader.read(size).lstrip()
        at = 1
        while True:
            while at < len(text) and text[at] in " \t\r\n,":
                at += 1
            if text[at : at + 1] == "]":
                return
            end = at
            with suppress(ValueError, RecursionError):
                end = decoder.raw_decode(text, at)[1]
            if end in (at, len(text)):  # perhaps incomplete
                more = reader.read(size)
                if not more:
                    raise InputError(
                        f"{path}: item {number} is no JSON, or nested too deep, or the array is not closed"
                    )
                text, at, size = text[at:] + more, 0, 2 * size
                continue
            yield json_row(number, text[at:end].encode("utf-8", "surrogateescape"), "item")
            at, number, size = end, number + 1, CHUNK


def to_line(record: Mapping[str, Any]) -> str:
    """Return a record as a line of readable JSON; escaped if one of its fields holds bytes that are not text."""
    line = json.dumps(record, ensure_ascii=False, default=str)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        line = json.dumps(record, default=str)
    return line + "\n"
