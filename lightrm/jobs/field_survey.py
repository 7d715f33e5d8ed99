"""Which fields the records of a source have, and of which types.

All records are looked at before the first one is scored, so that a format which cannot hold them is refused early. Own
code, since pyarrow silently drops a field that the first record of a batch lacks, rounds large whole numbers, and names
neither field nor row in its errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lightrm.data.data_source import DataSource
from lightrm.errors import InputError

EXACT = 2**53  # a float holds every whole number up to here
INT64, UINT64 = 2**63, 2**64
WORDS = {"bool": "true or false", "int": "a number", "float": "a number", "str": "text", "list": "a list"}


@dataclass(slots=True)
class Field:
    """A field of the records.

    kinds: types of its values, each with the first row that has it.
    low, high: range of its whole numbers.
    item: what its lists hold. inner: the fields of its objects.
    broken: the first row with a text that is not valid Unicode.
    """

    kinds: dict[str, str] = field(default_factory=dict)
    low: int = 0
    high: int = 0
    item: Field | None = None
    inner: dict[str, Field] = field(default_factory=dict)
    broken: str = ""

    def see(self, value: Any, row: str) -> None:
        kind = "null" if value is None else "object" if isinstance(value, dict) else type(value).__name__
        self.kinds.setdefault(kind, row)
        if kind == "int":
            self.low, self.high = min(self.low, value), max(self.high, value)
        elif kind == "str" and not self.broken and not is_text(value):
            self.broken = row
        elif kind == "list":
            self.item = self.item or Field()
            for part in value:
                self.item.see(part, row)
        elif kind == "object":
            for name, part in value.items():
                if not is_text(name):
                    self.broken = self.broken or row
                self.inner.setdefault(name, Field()).see(part, row)

    @property
    def kind(self) -> str:
        """The type that holds all of its values. Raises InputError if there is none."""
        found = {kind: row for kind, row in self.kinds.items() if kind != "null"}
        if found.keys() == {"int", "float"}:
            if max(-self.low, self.high) > EXACT:
                raise InputError(f"{found['int']} has whole numbers that no float holds, {found['float']} has floats")
            return "float"
        if len(found) > 1:
            (one, first), (other, second) = list(found.items())[:2]
            raise InputError(f"{WORDS.get(one, 'an object')} in {first}, {WORDS.get(other, 'an object')} in {second}")
        if self.low < -INT64 or self.high >= (UINT64 if self.low == 0 else INT64):
            raise InputError(f"a number of more than 64 bits, first in {found['int']} or later")
        return next(iter(found), "null")

    def arrow(self, arrow: Any, path: str) -> Any:
        """Return the type of a Parquet column. Raises InputError, which names the field, if there is none."""
        try:
            kind = self.kind
        except InputError as error:
            raise InputError(f'"{path}": {error}') from error
        if kind == "list":
            assert self.item is not None
            return arrow.list_(self.item.arrow(arrow, f"{path}[]"))
        if kind == "object":
            if not self.inner:
                raise InputError(f'"{path}": an object without fields, in {self.kinds["object"]}')
            return arrow.struct([(name, part.arrow(arrow, f"{path}.{name}")) for name, part in self.inner.items()])
        whole = arrow.uint64() if self.high >= INT64 else arrow.int64()
        plain = {"null": arrow.null(), "bool": arrow.bool_(), "float": arrow.float64(), "str": arrow.string()}
        return plain.get(kind, whole)

    def no_text(self, path: str) -> Iterator[str]:
        """Yield the places where a text is not valid Unicode."""
        if self.broken:
            yield f'"{path}" in {self.broken}'
        if self.item is not None:
            yield from self.item.no_text(f"{path}[]")
        for name, part in self.inner.items():
            yield from part.no_text(f"{path}.{name}")


@dataclass(slots=True)
class Survey:
    """rows: number of rows in the source. digest: of all of them in order. fields: of the records that can be
    scored."""

    rows: int = 0
    digest: int = 0
    fields: dict[str, Field] = field(default_factory=dict)


def survey_of(source: DataSource, closely: bool) -> Survey:
    """Look at all rows. closely: also record the types of fields."""
    found, several = Survey(), len(source.files) > 1
    for row in source.rows():
        found.rows += 1
        found.digest = row.after(found.digest)
        if row.error or not usable(row.record, source):
            continue
        for name, value in row.record.items():
            seen = found.fields.setdefault(name, Field())
            if closely:
                seen.see(value, row.name if several else row.place)
    return found


def usable(record: Any, source: DataSource) -> bool:
    try:
        source.answers(record, labels=False)
    except InputError:
        return False
    return True


def is_text(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
