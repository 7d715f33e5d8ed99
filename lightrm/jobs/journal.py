"""The journal of a job: what was scored so far, beside the output, in `OUTPUT.unfinished`.

A line that says what scores and how, then one for each row of the source, in its order: [checksum of the row, scores
or null, what was wrong]; at last one that says what the output will be. Before each line stands its own checksum,
which goes on from the one of the line before, so that a line that is damaged, lost, doubled or of another journal
shows. What is torn at the end, by a process or a machine that stopped, is cut off and scored again.

The journal is the lock too: whoever has it open is the only one who touches what lies beside the output.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lightrm.checksums import file_sum
from lightrm.data.records import Row
from lightrm.errors import InputError
from lightrm.files import UNFINISHED, to_disk
from lightrm.jobs.job_outputs import Entry, Tell

HEADER, OUTPUT = "lightrm journal", "output"
FORMAT = 2  # 1 had no checksums
OPENING = f'{{"{HEADER}": '.encode()  # of the header, after its checksum
DIGITS = 8  # of a checksum, and a space
HEX = b"0123456789abcdef"


@contextmanager
def journal_of(target: Path) -> Iterator[Journal]:
    """The journal beside an output, opened by no other run at the same time where the system can tell.

    Raises InputError if another run has it, or the file of this name is no journal.
    """
    path = target.with_name(target.name + UNFINISHED)
    finished = False
    while not finished:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b") as file:
            lock(file, path)
            if not path.exists() or os.fstat(file.fileno()).st_ino != path.stat().st_ino:
                continue  # whoever had it is done with it, and has removed it
            finished = True
            journal = Journal(path, file)
            try:
                yield journal
            finally:
                file.flush()
                useless = journal.done or not os.fstat(file.fileno()).st_size
                if useless and os.name != "nt":
                    path.unlink(missing_ok=True)
        if useless:  # Windows removes no open file
            path.unlink(missing_ok=True)


def lock(file: IO[bytes], path: Path) -> None:
    try:
        import fcntl  # noqa: PLC0415  Windows has none

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            raise InputError(f"{path} is being written by another run") from error
        # a file system that knows no locks


class Journal:
    """An open journal. header: what the run that began it scored with; None if nothing is in it yet. done: set when it
    is to be removed."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self.file = path, file
        self.done = False
        self.sum = self.number = 0  # of the last line that was read or written
        self.header = self.read_header()
        self.rows_at = self.place()

    def read_header(self) -> dict[str, str] | None:
        """Raises InputError if the file is something else."""
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
        """The next line, or None where it is missing, torn or damaged; the file stands before it then."""
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
        """Lines, on the disk when this returns."""
        for value in values:
            text = json.dumps(value).encode()
            self.sum, self.number = zlib.crc32(text, self.sum), self.number + 1
            self.file.write(f"{self.sum:08x} ".encode() + text + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def begin(self, by: dict[str, str]) -> None:
        """Write the header, or check it. Raises InputError that names what differs."""
        if self.header is None:
            self.write([{HEADER: FORMAT, "by": by}])
            to_disk(self.path.parent)
            self.header, self.rows_at = by, self.place()
        elif self.header != by:
            names, had = dict.fromkeys((*by, *self.header)), self.header
            other = [f"{n} {had.get(n)!r}, now {by.get(n)!r}" for n in names if had.get(n) != by.get(n)]
            raise InputError(f"{self.path} was begun with {'; '.join(other)}: remove it, or go on with the same")

    def entries(self) -> Iterator[Entry]:
        """All rows in it, from the first one; the file then stands before what is no row."""
        self.go(self.rows_at)
        while True:
            here, entry = self.place(), self.line()
            if not isinstance(entry, list):
                self.go(here)
                return
            yield entry[0], entry[1], entry[2]

    def foretells(self, target: Path) -> bool:
        """Whether its last line says that the output is what lies there: a run stopped before it had cleaned up."""
        for _ in self.entries():
            pass
        said = self.line()
        return isinstance(said, dict) and said.get(OUTPUT) == file_sum(target) and not self.file.read(1)

    def foretell(self, draft: Path) -> None:
        """The last line: what the output will be."""
        self.write([{OUTPUT: file_sum(draft)}])

    def rest(self, rows: Iterator[Row], source: Path, had: Callable[[Row, Entry], None], tell: Tell) -> Iterator[Row]:
        """The rows that are not in it yet; of the others `had` is told. What is torn at its end is cut off.

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
                raise InputError(f"{row.name} of {source} is not what it was when {self.path} was begun")
            had(row, entry)
        else:
            if next(entries, None) is not None:
                raise InputError(f"{source} is shorter than when {self.path} was begun")
            self.cut(tell)
        yield from rows

    def cut(self, tell: Tell) -> None:
        """Off with what is no row: the line that says what the output will be, one that is torn, or damaged ones."""
        place = self.place()
        self.file.readline()
        if self.file.read(1):
            tell(f"{self.path}: line {place[2] + 1} is damaged; what it and the lines after it said is scored again")
        self.go(place)
        self.file.truncate()
