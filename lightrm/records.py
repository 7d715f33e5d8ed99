"""Files of prompts with responses, read and written a little at a time: JSONL, gzipped or not, and Parquet.

A record is a dictionary with "prompt", a string or a list of turns, and "responses", a list of strings; whatever else
it holds is kept. Parquet needs pyarrow, an extra.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import IO, Any

from lightrm.conversation import responses_of
from lightrm.errors import InputError

GZIP, PARQUET, BOM = b"\x1f\x8b", b"PAR1", b"\xef\xbb\xbf"
BATCH = 256  # rows of Parquet in memory at once
Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """number: of its line or row, from 1; raw: what identifies it; record: None where error says why."""

    number: int
    raw: bytes
    record: Record | None
    error: str = ""


def read_rows(path: Path) -> Iterator[Row]:
    """Every row of a file that is not blank. Raises InputError if the file is of no kind that is read."""
    if is_parquet(path):
        return parquet_rows(path)
    return json_rows(lines_of(path))


def is_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(PARQUET)) == PARQUET


def lines_of(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        zipped = file.read(len(GZIP)) == GZIP
    with gzip.open(path) if zipped else path.open("rb") as lines:
        try:
            yield from lines
        except (EOFError, gzip.BadGzipFile, OSError) as error:
            raise InputError(f"{path} is cut short or damaged: {error}") from error


def json_rows(lines: Iterable[bytes]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        raw = line.removeprefix(BOM).strip()
        if not raw:
            continue
        try:
            yield Row(number, raw, parse(raw.decode("utf-8", "surrogateescape")))
        except InputError as error:
            yield Row(number, raw, None, str(error))


def parse(line: str) -> Record:
    """One line. Raises InputError if it is not an object with prompt and responses."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"not JSON: {error}") from error
    return checked(record)


def checked(record: Any) -> Record:
    """Raises InputError."""
    if not isinstance(record, dict) or "prompt" not in record:
        raise InputError('expected an object with "prompt" and "responses"')
    record["responses"] = responses_of(record.get("responses"))  # type: ignore[arg-type]
    return record


def parquet_rows(path: Path) -> Iterator[Row]:
    number = 0
    for batch in parquet_batches(path):
        for record in batch.to_pylist():
            number += 1
            raw = json.dumps([record.get("prompt"), record.get("responses")], default=str).encode()
            try:
                yield Row(number, raw, checked(record))
            except InputError as error:
                yield Row(number, raw, None, str(error))


def parquet_batches(path: Path) -> Iterator[Any]:
    arrow = pyarrow()
    try:
        yield from arrow.parquet.ParquetFile(path).iter_batches(batch_size=BATCH)
    except (arrow.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is cut short or damaged: {error}") from error


def pyarrow() -> Any:
    """Raises InputError if it is not installed."""
    try:
        import_module("pyarrow.parquet")
    except ImportError as error:
        raise InputError("Parquet files need pyarrow: pip install 'lightrm[parquet]', or use JSONL") from error
    return import_module("pyarrow")


def to_line(record: Mapping[str, Any]) -> str:
    """Readable JSON; escaped where another field of the record holds bytes that are no text."""
    line = json.dumps(record, ensure_ascii=False, default=str)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        line = json.dumps(record, default=str)
    return line + "\n"


Added = dict[str, Any] | None  # fields that a row gets; None where it is left out


# Writes those rows of a source that the fields, one dictionary or None for each row in order, do not leave out.
Writer = Callable[[Path, IO[bytes], Iterator[Added]], None]


def writer_for(source: Path, target: Path) -> Writer:
    if target.suffix != ".parquet":
        return write_json
    pyarrow()
    return parquet_to_parquet if is_parquet(source) else json_to_parquet


def completed(source: Path, added: Iterator[Added]) -> Iterator[Record]:
    for row, fields in zip(read_rows(source), added, strict=True):
        if fields is not None:
            assert row.record is not None
            yield row.record | fields


def write_json(source: Path, target: IO[bytes], added: Iterator[Added]) -> None:
    for record in completed(source, added):
        target.write(to_line(record).encode("utf-8"))


def json_to_parquet(source: Path, target: IO[bytes], added: Iterator[Added]) -> None:
    """Raises InputError where a later record does not have the columns and types of the first ones."""
    arrow, records, writer = pyarrow(), completed(source, added), None
    while rows := list(islice(records, BATCH)):
        try:
            table = arrow.Table.from_pylist(rows, schema=None if writer is None else writer.schema)
        except (arrow.ArrowInvalid, arrow.ArrowTypeError) as error:
            raise InputError(f"these records have no common columns ({error}): write .jsonl instead") from error
        writer = writer or arrow.parquet.ParquetWriter(target, table.schema)
        writer.write_table(table)
    (writer or arrow.parquet.ParquetWriter(target, arrow.schema([]))).close()


def parquet_to_parquet(source: Path, target: IO[bytes], added: Iterator[Added]) -> None:
    """Columns keep their types."""
    arrow, writer = pyarrow(), None
    for batch in parquet_batches(source):
        fields = list(islice(added, len(batch)))
        table = arrow.Table.from_batches([batch]).filter(arrow.array([f is not None for f in fields]))
        kept = [f for f in fields if f is not None]
        for name in ("scores", "scored_by"):
            if name in table.column_names:
                table = table.drop_columns([name])
        scores = arrow.array([f["scores"] for f in kept], arrow.list_(arrow.float32()))
        table = table.append_column("scores", scores)
        names = arrow.struct([(name, arrow.string()) for name in ("model", "fingerprint", "scheme", "template")])
        table = table.append_column("scored_by", arrow.array([f["scored_by"] for f in kept], names))
        writer = writer or arrow.parquet.ParquetWriter(target, table.schema)
        writer.write_table(table)
    if writer is None:
        raise InputError(f"{source} holds no rows")
    writer.close()
