"""The journal of a job: what was scored so far, beside the output, in `OUTPUT.unfinished`.

Its lines are: a header that says what scores and how; one for each row of the source, in order: [checksum of the row,
scores or null, what was wrong]; at last one with the checksum of the output. Each line begins with a checksum that
continues the one of the line before, so that a damaged, lost, doubled or foreign line shows. What a stopped process or
machine left incomplete at the end is cut off and scored again.

A plain file and not SQLite: rows are only read in order, together with the source, and the chain of checksums finds
lost rows, which a database would not miss. The file is also the lock: only the run that has it open touches the files
beside the output.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lightrm.checksums import file_sum
from lightrm.data.data_source import DataSource
from lightrm.data.records import Row
from lightrm.errors import InputError
from lightrm.files import UNFINISHED, locked, to_disk
from lightrm.jobs.job_outputs import Entry, Tell

HEADER, OUTPUT = "lightrm journal", "output"
FORMAT = 2  # 1 had no checksums
OPENING = f'{{"{HEADER}": '.encode()  # of the header, after its checksum
DIGITS = 8  # of a checksum, and a space
HEX = b"0123456789abcdef"


@contextmanager
def journal_of(target: Path) -> Iterator[Journal]:
    """Open the journal beside an output. No other run can have it open, if the file system supports locks.

    Raises InputError if another run has it, or if the file of this name is not a journal.
    """
    path = target.with_name(target.name + UNFINISHED)
    finished = False
    while not finished:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b") as file:
            locked(file, path)
            if not path.exists() or os.fstat(file.fileno()).st_ino != path.stat().st_ino:
                continue  # the run that had it has finished and removed it
            finished = True
            journal = Journal(path, file)
            try:
                yield journal
            finally:
                file.flush()
                useless = journal.done or not os.fstat(file.fileno()).st_size
                if useless and os.name != "nt":
                    path.unlink(missing_ok=True)
        if useless:  # Windows cannot remove an open file
            path.unlink(missing_ok=True)


class Journal:
    """An open journal. header: what the run that began it scored with, None if it is empty. done: set when it is to be
    removed."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self.file = path, file
        self.done = False
        self.sum = self.number = 0  # of the last line that was read or written
        self.header = self.read_header()
        self.rows_at = self.place()

    def read_header(self) -> dict[str, str] | None:
        """Return the header. Raises InputError if the file is something else."""
        found = self.line()
        if isinstance(found, dict) and found.get(HEADER) == FORMAT:
            return dict(found["by"])
        self.file.seek(0)
        first, _, rest = self.file.read(4096).partition(b"\n")
        began = first.rstrip(b"\0")
        torn = not rest and not began[:DIGITS].strip(HEX) and OPENING.startswith(began[DIGITS + 1 :][: len(OPENING)])
        if not torn:
            raise InputError(f"{self.path} is no journal that this version of lightrm can go on with: move it away")
        self.go((0, 0, 0))
        self.file.truncate()
        return None

    def place(self) -> tuple[int, int, int]:
        return self.file.tell(), self.sum, self.number

    def go(self, place: tuple[int, int, int]) -> None:
        at, self.sum, self.number = place
        self.file.seek(at)

    def line(self) -> Any:
        """Return the next line, or None if it is missing, incomplete or damaged; the file then stands before it."""
        here = self.place()
        line = self.file.readline()
        said, text = line[: DIGITS + 1], line[DIGITS + 1 : -1]
        found = zlib.crc32(text, self.sum)
        if not line.endswith(b"\n") or said != f"{found:08x} ".encode():
            self.go(here)
            return None
        self.sum, self.number = found, self.number + 1
        return json.loads(text)

    def write(self, values: Iterable[Any]) -> None:
        """Append lines. They are on the disk when this returns."""
        for value in values:
            text = json.dumps(value).encode()
            self.sum, self.number = zlib.crc32(text, self.sum), self.number + 1
            self.file.write(f"{self.sum:08x} ".encode() + text + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def begin(self, by: dict[str, str]) -> None:
        """Write the header, or check it."""
        self.check(by)
        if self.header is None:
            self.write([{HEADER: FORMAT, "by": by}])
            to_disk(self.path.parent)
            self.header, self.rows_at = by, self.place()

    def check(self, by: dict[str, str]) -> None:
        """Raise InputError, which names what differs, if the job was begun with something else."""
        if self.header is not None and self.header != by:
            names, had = dict.fromkeys((*by, *self.header)), self.header
            other = [f"{n} {had.get(n)!r}, now {by.get(n)!r}" for n in names if had.get(n) != by.get(n)]
            raise InputError(f"{self.path} was begun with {'; '.join(other)}: remove it, or go on with the same")

    def entries(self) -> Iterator[Entry]:
        """Yield all rows, from the first one. Afterwards the file stands before the first line that is not a row."""
        self.go(self.rows_at)
        while True:
            here, entry = self.place(), self.line()
            if not isinstance(entry, list):
                self.go(here)
                return
            yield entry[0], entry[1], entry[2]

    def foretells(self, target: Path) -> bool:
        """Whether the last line holds the checksum of this output: a run stopped after it wrote the output."""
        for _ in self.entries():
            pass
        said = self.line()
        return isinstance(said, dict) and said.get(OUTPUT) == file_sum(target) and not self.file.read(1)

    def foretell(self, draft: Path) -> None:
        """Append the last line: the checksum of the output that is about to be named."""
        self.write([{OUTPUT: file_sum(draft)}])

    def rest(
        self, rows: Iterator[Row], source: DataSource, had: Callable[[Row, Entry], None], tell: Tell
    ) -> Iterator[Row]:
        """Yield the rows that are not in the journal yet, and call `had` with the others. Cuts off an incomplete end.

        Raises InputError if a row in the journal is not the source's.
        """
        entries = self.entries()
        for row in rows:
            entry = next(entries, None)
            if entry is None:
                self.cut(tell)
                yield row
                break
            if entry[0] != row.checksum:
                raise InputError(f"{row.place} of {row.file or source} is not what it was when {self.path} was begun")
            had(row, entry)
        else:
            if next(entries, None) is not None:
                raise InputError(f"{source} is shorter than when {self.path} was begun")
            self.cut(tell)
        yield from rows

    def cut(self, tell: Tell) -> None:
        """Cut off what is not a row: the line about the output, an incomplete line, or damaged ones."""
        place = self.place()
        self.file.readline()
        if self.file.read(1):
            tell(f"{self.path}: line {place[2] + 1} is damaged; what it and the lines after it said is scored again")
        self.go(place)
        self.file.truncate()
