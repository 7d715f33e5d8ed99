"""Long jobs: a file of prompts with responses in, the same with scores out; killed at any byte, it goes on from there.

A job keeps a journal beside its output, `OUTPUT.unfinished`: a line that says what scores and how, then one for each
row of the source, in its order: [checksum of the row, scores or null, what was wrong]. A line counts when its newline
is there. When all rows are in it, the output is written from source and journal, whole or not at all, and the journal
is removed. Neither needs memory for more than a window of rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import click

from lightrm.errors import InputError, TemplateError
from lightrm.files import UNFINISHED
from lightrm.native import read_manifest
from lightrm.progress import Advance
from lightrm.records import Added, Row, read_rows, to_line, writer_for
from lightrm.scorer import RewardModel

MOST_ROWS = 1024  # in memory at once
Entry = tuple[list[float] | None, str]  # scores, or None and why
Report = Callable[[str], None]


@dataclass(slots=True)
class Counts:
    """good and bad rows; cut: answers that were too long; resumed: rows that were in the journal already."""

    good: int = 0
    bad: int = 0
    cut: int = 0
    resumed: int = 0


def identity(rm: RewardModel, model: str) -> dict[str, str]:
    """What made a score: the model as it was asked for, a fingerprint of its files, scheme, template."""
    checkpoint = rm.checkpoint
    digest = hashlib.sha256(json.dumps(checkpoint.config.raw, sort_keys=True, default=str).encode())
    for name in sorted(checkpoint.tensors):
        digest.update(f"{name} {checkpoint.shape(name)}".encode())
        if name.startswith("head."):
            digest.update(checkpoint.read(name).float().numpy().tobytes())
    if not checkpoint.tensors:  # a folder of lightrm's own, whose manifest has the sum of every tensor
        digest.update(json.dumps(read_manifest(checkpoint.folder).sums, sort_keys=True).encode())
    template = rm.template.name if rm.template is not None else "none"
    scheme = rm.report.scheme.name
    return {
        "model": model,
        "fingerprint": digest.hexdigest()[:16],
        "scheme": scheme,
        "template": f"{template}, at most {rm.max_length} tokens",
    }


def score_rows(
    rm: RewardModel, rows: Iterator[Row], counts: Counts, report: Report, advance: Advance
) -> Iterator[tuple[Row, Entry]]:
    """Each row with its scores, in order, a window of rows at a time."""
    window: list[tuple[Row, list[list[int]], str]] = []
    tokens = 0
    for row in rows:
        ids, error = encoded(rm, row, counts)
        window.append((row, ids, error))
        tokens += sum(map(len, ids))
        if tokens >= rm.window or len(window) == MOST_ROWS:
            yield from score_window(rm, window, counts, report, advance)
            window, tokens = [], 0
    yield from score_window(rm, window, counts, report, advance)


def encoded(rm: RewardModel, row: Row, counts: Counts) -> tuple[list[list[int]], str]:
    if row.record is None:
        return [], row.error
    try:
        found = [rm.encode_one(row.record["prompt"], response) for response in row.record["responses"]]
    except (InputError, TemplateError) as error:
        return [], str(error)
    counts.cut += sum(e.cut > 0 for e in found)
    return [e.token_ids for e in found], ""


def score_window(
    rm: RewardModel, window: list[tuple[Row, list[list[int]], str]], counts: Counts, report: Report, advance: Advance
) -> Iterator[tuple[Row, Entry]]:
    scores = iter(rm.run([ids for _, rows, _ in window for ids in rows], advance).tolist())
    for row, ids, error in window:
        if error:
            counts.bad += 1
            report(f"line {row.number}: {error}")
        else:
            counts.good += 1
        yield row, (None if error else [next(scores) for _ in ids], error)


def score_stream(
    rm: RewardModel, model: str, rows: Iterator[Row], sink: IO[str], report: Report, advance: Advance
) -> Counts:
    """Rows to a stream as they are scored: nothing to go on from."""
    counts, by = Counts(), identity(rm, model)
    for row, (scores, _) in score_rows(rm, rows, counts, report, advance):
        if scores is not None:
            assert row.record is not None
            sink.write(to_line(row.record | {"scores": scores, "scored_by": by}))
            sink.flush()
    return counts


def score_file(rm: RewardModel, model: str, source: Path, target: Path, report: Report, advance: Advance) -> Counts:
    """Score a file to a file, or go on where a run that stopped has left it.

    Raises InputError if the output is there already, or was begun with another model, scheme, template or source.
    """
    if target.exists():
        raise InputError(f"{target} exists already: remove it, or name another output")
    write = writer_for(source, target)
    counts, by = Counts(), identity(rm, model)
    journal = target.with_name(target.name + UNFINISHED)
    with alone(journal) as file:
        begin(file, by)
        rows = read_rows(source)
        following = go_on(file, rows, counts, source)
        for row, entry in score_rows(rm, following, counts, report, advance):
            file.write(json.dumps([checksum(row), *entry]).encode() + b"\n")
            file.flush()
        os.fsync(file.fileno())
        draft = target.with_name(target.name + ".part")
        with draft.open("wb") as made:
            write(source, made, added(file, by))
            made.flush()
            os.fsync(made.fileno())
        os.replace(draft, target)
    journal.unlink()
    return counts


@contextmanager
def as_file(source: str, target: Path) -> Iterator[Path]:
    """A source that can be read twice: what comes through a pipe is kept beside the output until the job is done."""
    if source != "-":
        yield Path(source)
        return
    kept = target.with_name(target.name + ".input")
    with kept.open("wb") as file:
        shutil.copyfileobj(click.open_file("-", "rb"), file)
    yield kept
    kept.unlink()


@contextmanager
def alone(journal: Path) -> Iterator[IO[bytes]]:
    """The journal, opened by no other run at the same time where the system can tell."""
    with journal.open("r+b" if journal.exists() else "w+b") as file:
        try:
            import fcntl  # noqa: PLC0415

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except OSError as error:
            raise InputError(f"{journal} is being written by another run") from error
        yield file


def begin(file: IO[bytes], by: dict[str, str]) -> None:
    """The journal's first line, checked or written. Raises InputError if it names something else."""
    found = whole_line(file)
    if found is None:
        file.seek(0)
        file.truncate()
        file.write(json.dumps(by).encode() + b"\n")
        file.flush()
    elif found != by:
        other = [f"{name} {found.get(name)!r}, now {value!r}" for name, value in by.items() if found.get(name) != value]
        raise InputError(f"{file.name} was begun with {'; '.join(other)}: remove it, or go on with the same")


def whole_line(file: IO[bytes]) -> Any:
    """The next line as JSON; None where it is missing, torn or no JSON, and the file stands before it."""
    at = file.tell()
    line = file.readline()
    with suppress(ValueError):
        if line.endswith(b"\n"):
            return json.loads(line)
    file.seek(at)
    return None


def go_on(file: IO[bytes], rows: Iterator[Row], counts: Counts, source: Path) -> Iterator[Row]:
    """The rows that the journal does not have yet; what is torn at its end is cut off.

    Raises InputError if a row in the journal is not the source's.
    """
    for row in rows:
        entry = whole_line(file)
        if entry is None:
            file.truncate()
            yield row
            break
        if entry[0] != checksum(row):
            raise InputError(f"line {row.number} of {source} is not what it was when {file.name} was begun")
        counts.resumed += 1
        counts.good += entry[1] is not None
        counts.bad += entry[1] is None
    else:
        if file.read(1):
            raise InputError(f"{source} is shorter than when {file.name} was begun")
        return
    yield from rows


def checksum(row: Row) -> int:
    return zlib.crc32(row.raw)


def added(file: IO[bytes], by: dict[str, str]) -> Iterator[Added]:
    """What the journal says of each row."""
    file.seek(0)
    file.readline()
    for line in file:
        _, scores, _ = json.loads(line)
        yield None if scores is None else {"scores": scores, "scored_by": by}
