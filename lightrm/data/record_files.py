"""The rows of a file of records of any kind: JSONL, a JSON array, CSV, TSV or Parquet, all but Parquet also compressed
by gzip or zstd.

The first bytes tell the kind: Parquet begins with a mark, a table with a line that names fields. A file with the ending
.json that begins with a bracket is one array. Readers of whole tables (datasets, polars, pyarrow.csv) infer one schema
and stop at the first bad row; here each bad row is numbered and the others are read, in bounded memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO

from lightrm.data.records import BOM, Row, array_rows, json_rows, lines_of, plain_bytes, unzipped
from lightrm.data.tabular import PARQUET, csv_rows, delimiter_of, parquet_rows
from lightrm.errors import InputError

TABS = (".tsv", ".tab")
START = 2**16  # bytes


def read_rows(path: Path, names: Collection[str] = ()) -> Iterator[Row]:
    """Yield every row that is not blank. names: of fields that the caller expects, by which a table is known.

    Raises InputError if the file is of no known kind, or damaged.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    if is_parquet(path):
        return parquet_rows(path)
    endings = endings_of(path.name)
    if ".json" in endings and first_character(path) == b"[":
        return array_rows(path)
    tabs = any(ending in TABS for ending in endings)
    return line_rows(lines_of(path), "\t" if tabs else "," if ".csv" in endings else None, names)


def endings_of(name: str) -> list[str]:
    """Return the endings of a file's name that say what it holds, such as [".jsonl", ".gz"]."""
    return [ending.lower() for ending in Path(name).suffixes[-2:]]


def stream_rows(file: IO[bytes], what: str, names: Collection[str] = ()) -> Iterator[Row]:
    """As `read_rows`, of a stream that can be read once. Raises InputError on Parquet, which must be a file."""
    with plain_bytes(file, what) as plain:
        lines = iter(plain)
        first = next(lines, b"")
        if first.startswith(PARQUET):
            raise InputError(f"{what} is Parquet, which is read from its end: pass the file itself, or write with -o")
        yield from line_rows(chain([first], lines), None, names)


def line_rows(lines: Iterable[bytes], delimiter: str | None = None, names: Collection[str] = ()) -> Iterator[Row]:
    """Yield rows of JSONL; of a table if a delimiter is given, or if the first line names known fields."""
    following = iter(lines)
    first = next(following, b"").removeprefix(BOM)
    delimiter = delimiter or delimiter_of(first, names)
    whole = chain([first], following)
    return json_rows(whole) if delimiter is None else csv_rows(whole, delimiter)


def is_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(PARQUET)) == PARQUET


def first_character(path: Path) -> bytes:
    with unzipped(path) as file:
        return file.read(START).removeprefix(BOM).lstrip()[:1]
