"""What a job writes: the source's rows with scores added, as JSONL, CSV or Parquet, by the ending of the output.

Every field is kept. A field of the source with the name of an added one gets another name. If the format cannot hold a
field, that is said before the first row is scored. Before a row is written, it is compared with the row that was
scored.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import IO, Any

from lightrm.data.data_source import DataSource
from lightrm.data.records import Record, Row, to_line
from lightrm.data.tabular import BATCH, pyarrow
from lightrm.errors import InputError
from lightrm.jobs.field_survey import Field, Survey, survey_of

ENDINGS = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")
BY = ("model", "fingerprint", "scheme", "template")
Tell = Callable[[str], None]
Number = float | list[float] | list[list[float]] | dict[str, float]  # what is written of one answer
Entry = tuple[int, list[Number] | None, str]  # a row's checksum; its answers' numbers, or None and why


@dataclass(frozen=True, slots=True)
class Added:
    """The field that is added beside "scored_by". names: of the attributes, if that is what it holds."""

    name: str
    names: tuple[str, ...] = ()

    def type(self, arrow: Any) -> Any:
        """Return the type of its column in a Parquet file."""
        number = arrow.float32()
        if self.name == "steps":
            return arrow.list_(arrow.list_(number))
        return arrow.list_(arrow.struct([(name, number) for name in self.names]) if self.names else number)


SCORES = Added("scores")


@dataclass(frozen=True, slots=True)
class Output:
    """aside: new names of the source's fields that have the name of an added one. schema: of a Parquet file that is
    made from another kind of file. added: the field with the scores."""

    source: DataSource
    ending: str
    survey: Survey
    aside: dict[str, str]
    schema: Any = None
    added: Added = SCORES

    def write(self, file: IO[bytes], entries: Iterator[Entry], by: dict[str, str]) -> None:
        """Write all rows. Raises InputError if the source is not what was scored."""
        if self.schema is None and self.ending == ".parquet":
            self.write_columns(file, entries, by)
        elif self.ending == ".parquet":
            self.write_records(file, self.completed(entries, by))
        else:
            with zipped(file) if self.ending.endswith(".gz") else as_it_is(file) as bare:
                write = self.write_cells if self.ending.startswith(".csv") else self.write_lines
                write(bare, self.completed(entries, by))

    def completed(self, entries: Iterator[Entry], by: dict[str, str]) -> Iterator[Record]:
        for row, scores in self.paired(self.source.rows(), entries):
            if scores is not None:
                yield renamed(row.record, self.aside) | {self.added.name: scores, "scored_by": by}

    def paired(self, rows: Iterator[Row], entries: Iterator[Entry]) -> Iterator[tuple[Row, list[Number] | None]]:
        """Yield each row with its scores."""
        changed = InputError(
            f"{self.source} was changed while it was scored: nothing was written, and what was scored is kept; put it "
            "back as it was, and run the same command again"
        )
        digest = 0
        for row in rows:
            checksum, scores, _ = next(entries, (None, None, ""))
            if checksum != row.checksum:
                raise changed
            digest = row.after(digest)
            yield row, scores
        if digest != self.survey.digest or next(entries, None) is not None:
            raise changed

    def write_lines(self, file: IO[bytes], records: Iterator[Record]) -> None:
        for record in records:
            file.write(to_line(record).encode("utf-8"))

    def write_cells(self, file: IO[bytes], records: Iterator[Record]) -> None:
        text = TextIOWrapper(file, "utf-8", newline="")
        names = [self.aside.get(name, name) for name in self.survey.fields]
        table = csv.DictWriter(text, [*names, self.added.name, "scored_by"])
        table.writeheader()
        for record in records:
            table.writerow({name: cell_of(value) for name, value in record.items()})
        text.detach()

    def write_records(self, file: IO[bytes], records: Iterator[Record]) -> None:
        arrow = pyarrow()
        with arrow.parquet.ParquetWriter(file, self.schema) as writer:
            while rows := list(islice(records, BATCH)):
                writer.write_table(arrow.Table.from_pylist(rows, schema=self.schema))

    def write_columns(self, file: IO[bytes], entries: Iterator[Entry], by: dict[str, str]) -> None:
        """Write Parquet from Parquet: the columns keep their types."""
        arrow = pyarrow()
        rows_of = self.source.batches()
        schema = self.source.schema
        names = [self.aside.get(name, name) for name in schema.names]
        fields = [part.with_name(name) for part, name in zip(schema, names, strict=True)]
        schema = arrow.schema([*fields, *added_fields(arrow, self.added)], schema.metadata)
        batches: list[tuple[Any, int]] = []

        def rows() -> Iterator[Row]:
            for batch, found in rows_of:
                batches.append((batch, len(found)))
                yield from found

        with arrow.parquet.ParquetWriter(file, schema) as writer:
            paired = self.paired(rows(), entries)
            for first in paired:
                batch, count = batches.pop()
                scores = [found for _, found in (first, *islice(paired, count - 1))]
                kept = arrow.RecordBatch.from_arrays(batch.columns, names=names).filter(
                    arrow.array([one is not None for one in scores])
                )
                made = [one for one in scores if one is not None]
                added = [arrow.array(made, schema.field(self.added.name).type)]
                added.append(arrow.array([by] * len(made), schema.field("scored_by").type))
                writer.write_table(arrow.Table.from_arrays([*kept.columns, *added], schema=schema))


def output_for(source: DataSource, target: Path, tell: Tell, added: Added = SCORES) -> Output:
    """Return how a source is written to a target. Raises InputError, which names the fields, if the target cannot hold
    them."""
    ending = ending_of(target)
    arrow = pyarrow() if ending == ".parquet" else None
    columns = source.parquet
    closely = not columns and not ending.startswith(".jsonl")
    survey = survey_of(source, closely)
    if columns:
        schema = source.schema
        survey.fields = {name: Field() for name in schema.names}
        held = [f'"{part.name}" ({part.type})' for part in schema if "binary" in str(part.type)]
        if held and arrow is None:
            raise InputError(f"{ending} holds text, not {', '.join(held)}: write .parquet instead")
    aside = names_aside(list(survey.fields), added)
    for name, other in aside.items():
        tell(f'the source has a field "{name}" of its own: it is written as "{other}"')
    strays = [where for name, part in survey.fields.items() for where in part.no_text(name)]
    if strays:
        raise InputError(f"{ending} holds text, not the bytes of {', '.join(strays[:3])}: write .jsonl instead")
    made = None
    if arrow is not None and not columns:
        made = arrow.schema([*columns_of(survey, aside, arrow), *added_fields(arrow, added)])
    return Output(source, ending, survey, aside, made, added)


def ending_of(target: Path) -> str:
    """Return the ending of an output. Raises InputError if it is not known."""
    name = target.name.lower()
    found = next((ending for ending in ENDINGS if name.endswith(ending) and name != ending), None)
    if found is None:
        raise InputError(f"{target}: an output ends in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}")
    return found


def columns_of(survey: Survey, aside: dict[str, str], arrow: Any) -> list[tuple[str, Any]]:
    """Return the columns of a Parquet file. Raises InputError, which names all fields that no column can hold."""
    found, wrong = [], []
    for name, part in survey.fields.items():
        try:
            found.append((aside.get(name, name), part.arrow(arrow, name)))
        except InputError as error:
            wrong.append(str(error))
    if wrong:
        raise InputError(f"these records have no common columns ({'; '.join(wrong)}): write .jsonl instead")
    return found


def added_fields(arrow: Any, added: Added) -> list[Any]:
    by = arrow.struct([(name, arrow.string()) for name in BY])
    return [arrow.field(added.name, added.type(arrow)), arrow.field("scored_by", by)]


def names_aside(names: list[str], added: Added = SCORES) -> dict[str, str]:
    """Return new names for fields that have the name of an added one."""
    aside = {}
    for name in (added.name, "scored_by"):
        if name in names:
            other = f"source_{name}"
            while other in names:
                other = f"source_{other}"
            aside[name] = other
    return aside


def renamed(record: Record, aside: dict[str, str]) -> Record:
    return {aside.get(name, name): value for name, value in record.items()}


def cell_of(value: Any) -> str:
    """Return the CSV cell of a value: a text as it is, None as nothing, anything else as JSON."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, default=str)


@contextmanager
def zipped(file: IO[bytes]) -> Iterator[IO[bytes]]:
    """Compress to gzip without a time stamp, so that the same content gives the same bytes."""
    with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as bare:
        yield bare  # type: ignore[misc]


@contextmanager
def as_it_is(file: IO[bytes]) -> Iterator[IO[bytes]]:
    yield file
