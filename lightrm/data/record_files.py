"""The rows of a file of records of any kind: JSONL, a JSON array, CSV or Parquet, gzipped or not.

The first bytes tell the kind: Parquet begins with a mark, a table with a line that names fields. A file with the ending
.json that begins with a bracket is one array. Readers of whole tables (datasets, polars, pyarrow.csv) infer one schema
and stop at the first bad row; here each bad row is numbered and the others are read, in bounded memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from lightrm.data.records import BOM, Row, array_rows, json_rows, lines_of, unzipped
from lightrm.data.tabular import PARQUET, csv_rows, delimiter_of, parquet_rows
from lightrm.errors import InputError

TABS = (".tsv", ".tab")
START = 2**16  # bytes


def read_rows(path: Path) -> Iterator[Row]:
    """Yield every row that is not blank. Raises InputError if the file is of no known kind, or damaged."""
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    if is_parquet(path):
        return parquet_rows(path)
    endings = [ending.lower() for ending in path.suffixes[-2:]]
    if ".json" in endings and first_character(path) == b"[":
        return array_rows(path)
    tabs = any(ending in TABS for ending in endings)
    return line_rows(lines_of(path), "\t" if tabs else "," if ".csv" in endings else None)


def line_rows(lines: Iterable[bytes], delimiter: str | None = None) -> Iterator[Row]:
    """Yield rows of JSONL; of a table if a delimiter is given, or if the first line names known fields."""
    following = iter(lines)
    first = next(following, b"").removeprefix(BOM)
    delimiter = delimiter or delimiter_of(first)
    whole = chain([first], following)
    return json_rows(whole) if delimiter is None else csv_rows(whole, delimiter)


def is_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(PARQUET)) == PARQUET


def first_character(path: Path) -> bytes:
    with unzipped(path) as file:
        return file.read(START).removeprefix(BOM).lstrip()[:1]
