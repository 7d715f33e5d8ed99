"""Tables of records, read in small batches: CSV, whose cells may hold JSON lists, and Parquet through pyarrow."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from lightrm.data.record_forms import FIELDS, NUMBERS
from lightrm.data.records import Row
from lightrm.errors import InputError

PARQUET = b"PAR1"
BATCH = 256  # rows of Parquet in memory at once
MOST_FIELD = 2**24  # characters of one CSV cell


def delimiter_of(line: bytes, names: Collection[str] = ()) -> str | None:
    """Return the delimiter of a table's first line; None if the line names no field that records have. names: of fields
    that these records have."""
    text = line.decode("utf-8", "replace").strip()
    for delimiter in () if text.startswith(("{", "[")) else (",", "\t"):
        if FIELDS.union(names) & {name.strip().strip('"') for name in text.split(delimiter)}:
            return delimiter
    return None


def csv_rows(lines: Iterable[bytes], delimiter: str) -> Iterator[Row]:
    """Yield a row for each record below the header. Raises InputError if the header names a field twice, or if it is
    not CSV."""
    csv.field_size_limit(MOST_FIELD)
    texts = (line.decode("utf-8", "surrogateescape") for line in lines)
    reader = csv.reader(texts, delimiter=delimiter)
    try:
        header = next(reader, [])
        twice = {name for name in header if header.count(name) > 1}
        if twice:
            raise InputError(f"the header names {sorted(twice)[0]!r} twice: rename one of them")
        for number, cells in enumerate((cells for cells in reader if cells), 1):
            raw = json.dumps(cells).encode()
            if len(cells) == len(header):
                record = {name: value_of(name, cell) for name, cell in zip(header, cells, strict=True)}
                yield Row(number, raw, record, unit="row")
            else:
                error = f"{len(cells)} cells under a header of {len(header)}"
                yield Row(number, raw, None, error, "row")
    except csv.Error as error:
        raise InputError(f"not CSV at line {reader.line_num}: {error}") from error


def value_of(name: str, cell: str) -> Any:
    """Return a cell's value. A JSON list of texts or turns is read as such, and one of numbers if the field holds
    numbers."""
    if not (cell.startswith("[") and cell.endswith("]")):
        return cell
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    numbers = (int, float) if name in NUMBERS else ()
    kinds = ((str,), (dict,), numbers)
    return value if value and any(all(isinstance(part, kind) for part in value) for kind in kinds) else cell


def parquet_rows(path: Path) -> Iterator[Row]:
    for _, rows in parquet_batches(path):
        yield from rows


def parquet_batches(path: Path) -> Iterator[tuple[Any, list[Row]]]:
    """Yield the record batches of a file, with their rows. Raises InputError if the file is damaged."""
    arrow, number = pyarrow(), 0
    with parquet_file(path) as file:
        try:
            for batch in file.iter_batches(batch_size=BATCH):
                records = readable(batch, arrow).to_pylist()
                yield batch, [Row(number + k, raw_of(one), one, unit="row") for k, one in enumerate(records, 1)]
                number += len(records)
        except (arrow.ArrowException, OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read, row {number + 1} or soon after: {error}") from error


def parquet_file(path: Path) -> Any:
    """Open a file. Raises InputError if it is damaged, or if two of its columns have the same name."""
    arrow = pyarrow()
    try:
        file = arrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
    except (arrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is cut short or damaged: {error}") from error
    if len(set(names)) < len(names):
        raise InputError(f"{path} has two columns of one name: rename one of them")
    return file


def readable(batch: Any, arrow: Any) -> Any:
    """Return a batch with nanosecond times as texts: Python's own times are too coarse for them."""
    columns = [
        column.cast(arrow.string()) if arrow.types.is_temporal(column.type) and "[ns" in str(column.type) else column
        for column in batch.columns
    ]
    return arrow.RecordBatch.from_arrays(columns, names=batch.schema.names)


def raw_of(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, default=str, sort_keys=True).encode()


def pyarrow() -> Any:
    """Import pyarrow. Raises InputError if it is not installed."""
    try:
        import_module("pyarrow.parquet")
    except ImportError as error:
        raise InputError("Parquet files need pyarrow: pip install 'lightrm[parquet]', or use JSONL") from error
    return import_module("pyarrow")
