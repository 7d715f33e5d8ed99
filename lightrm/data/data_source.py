"""What a caller named as data: files that are read one after the other, which columns count, and how many records."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from lightrm.data.hub_data import HUB, hub_files
from lightrm.data.record_columns import Columns
from lightrm.data.record_files import is_parquet, read_rows
from lightrm.data.record_forms import Answers
from lightrm.data.records import Row
from lightrm.data.tabular import parquet_batches, parquet_file
from lightrm.errors import InputError

STDIN, PIPED = Path("-"), "standard input"
ALL = Columns()


@dataclass(frozen=True, slots=True)
class DataSource:
    """files: what is read; `STDIN` alone is standard input. name: as messages and reports call it. limit: the number of
    records to read, from the first on; None reads all. commit: of a data set on the hub, else "".
    """

    files: tuple[Path, ...]
    name: str
    columns: Columns = ALL
    limit: int | None = None
    commit: str = ""

    def __str__(self) -> str:
        return self.name

    @property
    def piped(self) -> bool:
        return self.files == (STDIN,)

    def rows(self) -> Iterator[Row]:
        """Yield the rows that are to be used. Raises InputError as `read_rows`."""
        return islice(self.every_row(), self.limit)

    def every_row(self) -> Iterator[Row]:
        for path in self.files:
            for row in self.checked(read_rows(path, self.columns.names), path.name):
                yield replace(row, file=self.called(path))

    def checked(self, rows: Iterator[Row], file: str) -> Iterator[Row]:
        """Yield rows. Raises InputError if they are those of a table that lacks a chosen column. file: its name."""
        for k, row in enumerate(rows):
            if k == 0 and row.unit == "row" and not row.error:
                self.columns.check(row.record, file)
            yield row

    def called(self, path: Path) -> str:
        """Return what messages call a file; nothing for what came through a pipe."""
        return "" if self.name == PIPED else path.name

    def answers(self, record: Any, labels: bool = True) -> Answers:
        return self.columns.answers(record, labels)

    @property
    def parquet(self) -> bool:
        """Whether the files are Parquet. Raises InputError if some are and others are not."""
        found = {is_parquet(path) for path in self.files}
        if len(found) > 1:
            raise InputError(f"{self.name} holds Parquet and other files: name those of one kind")
        return found == {True}

    @property
    def schema(self) -> Any:
        """The columns of the Parquet files. Raises InputError if the files have different ones."""
        first, *others = ((path, parquet_file(path).schema_arrow) for path in self.files)
        for path, schema in others:
            if not schema.equals(first[1]):
                raise InputError(
                    f"{path.name} has other columns than {first[0].name}: {sorted(schema.names)} and "
                    f"{sorted(first[1].names)}, or other types of them"
                )
        return first[1]

    def batches(self) -> Iterator[tuple[Any, list[Row]]]:
        """Yield the record batches of the Parquet files, with those of their rows that are to be used."""
        left = self.limit
        for path in self.files:
            for batch, found in parquet_batches(path):
                rows = [replace(row, file=self.called(path)) for row in found[:left]]
                if not rows:
                    return
                left = None if left is None else left - len(rows)
                yield batch.slice(0, len(rows)), rows

    @property
    def identity(self) -> dict[str, str]:
        """What the rows of a job depend on beside the bytes of its source."""
        return {
            "prompt column": str(self.columns.prompt),
            "response columns": ", ".join(self.columns.responses) or "None",
            "limit": str(self.limit),
            **({"data": f"{self.name} at {self.commit}"} if self.commit else {}),
        }


def source_of(
    data: str | os.PathLike[str] | DataSource,
    *,
    config: str | None = None,
    split: str | None = None,
    columns: Columns = ALL,
    limit: int | None = None,
) -> DataSource:
    """Return a file, what an address "hf://datasets/owner/name/..." stands for, or a source as it is.

    config, split: of a data set on the hub. Raises InputError if they are given for a file, or as `hub_files`.
    """
    if isinstance(data, DataSource):
        return data
    text = os.fspath(data)
    if text.startswith(HUB):
        found = hub_files(text, config, split)
        return DataSource(found.files, found.name, columns, limit, found.commit)
    if config is not None or split is not None:
        raise InputError(f"config and split are for a data set on the hub; {text} is a file")
    return DataSource((Path(text),), PIPED if text == str(STDIN) else Path(text).name, columns, limit)
