"""Long jobs: a file of prompts with responses in, the same with scores out; after a kill at any byte, the job goes on.

A job keeps a `journal` beside its output. When all rows are in the journal, the output is written from source and
journal, whole or not at all, and the journal is removed. Only a window of rows is in memory. A record that cannot be
scored is in the journal with the reason, and never ends the job.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import IO

import click
import torch

from lightrm.data.record_files import read_rows
from lightrm.data.record_forms import answers_of
from lightrm.data.records import Row, to_line
from lightrm.display.progress import AdvanceRows, rows_ignored
from lightrm.errors import InputError, LightRMError, MemoryLimitError, NumericsError
from lightrm.files import to_disk
from lightrm.jobs.answer_numbers import Answer, AnswerNumbers
from lightrm.jobs.identity import identity, summary
from lightrm.jobs.job_outputs import Entry, Number, Tell, ending_of, names_aside, output_for, renamed
from lightrm.jobs.journal import Journal, journal_of
from lightrm.scorer import RewardModel
from lightrm.text.conversation import turns_of

MOST_ROWS = 1024  # in memory at once
STDIN, INPUT, PART = "-", ".input", ".part"  # the endings of what lies beside an output
OF_ONE_RECORD = (MemoryLimitError, NumericsError, torch.OutOfMemoryError, MemoryError)


MakesBar = Callable[[int], AbstractContextManager[AdvanceRows]]


def no_bar(rows: int) -> AbstractContextManager[AdvanceRows]:
    return nullcontext(rows_ignored)


@dataclass(slots=True)
class Counts:
    """good and bad: rows. cut: answers that were too long. resumed: rows that were in the journal already."""

    good: int = 0
    bad: int = 0
    cut: int = 0
    resumed: int = 0


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A row with the sequences of each of its answers, or with what is wrong with it."""

    row: Row
    answers: list[Answer]
    error: str

    @property
    def tokens(self) -> int:
        """Of its answers; the steps of one are parts of the last."""
        return sum(len(sequences[-1]) for sequences in self.answers)


def score_rows(
    numbers: AnswerNumbers, rows: Iterator[Row], counts: Counts, report: Tell, advance_rows: AdvanceRows
) -> Iterator[list[tuple[Row, Entry]]]:
    """Yield rows with their scores, in order, a window of rows at a time."""
    window: list[EncodedRow] = []
    tokens = 0
    for row in rows:
        window.append(encoded(numbers, row, counts))
        tokens += window[-1].tokens
        if tokens >= numbers.rm.engine.window or len(window) == MOST_ROWS:
            yield score_window(numbers, window, counts, report, advance_rows)
            window, tokens = [], 0
    if window:
        yield score_window(numbers, window, counts, report, advance_rows)


def encoded(numbers: AnswerNumbers, row: Row, counts: Counts) -> EncodedRow:
    if row.error:
        return EncodedRow(row, [], row.error)
    try:
        answers = answers_of(row.record, labels=False)
        found, cut = numbers.encode(turns_of(answers.prompt), answers.responses)
    except LightRMError as error:
        return EncodedRow(row, [], str(error))
    except Exception as error:  # raised by a stranger's template or tokenizer: any kind, and only of this record
        return EncodedRow(row, [], f"cannot be made into tokens: {type(error).__name__}: {error}"[:1000])
    counts.cut += cut
    return EncodedRow(row, found, "")


def score_window(
    numbers: AnswerNumbers, window: list[EncodedRow], counts: Counts, report: Tell, advance_rows: AdvanceRows
) -> list[tuple[Row, Entry]]:
    tokens = sum(one.tokens for one in window)
    shown = 0.0

    def advance(done: float) -> None:
        nonlocal shown
        part = min(done / tokens * len(window), len(window) - shown) if tokens else 0.0
        shown += part
        advance_rows(part, done)

    found: list[tuple[Row, Entry]] = []
    good = [one for one in window if not one.error]
    scores = iter(scored(numbers, good, advance))
    for one in window:
        made = next(scores) if not one.error else one.error
        if isinstance(made, str):
            counts.bad += 1
            report(f"{one.row.name}: {made}")
        else:
            counts.good += 1
        entry = (one.row.checksum, None, made) if isinstance(made, str) else (one.row.checksum, made, "")
        found.append((one.row, entry))
    advance_rows(len(window) - shown, 0)
    return found


def scored(
    numbers: AnswerNumbers, rows: list[EncodedRow], advance: Callable[[float], None]
) -> list[list[Number] | str]:
    """Return the numbers of each row, or why there are none. If a window fails, its halves are tried, down to one
    row."""
    sequences = [ids for one in rows for answer in one.answers for ids in answer]
    try:
        scores = iter(numbers.rm.engine.all_scores(sequences, advance, numbers.head).tolist())
    except OF_ONE_RECORD as error:
        if len(rows) == 1:
            return [f"{type(error).__name__}: {error}" if not isinstance(error, LightRMError) else str(error)]
    else:
        return [[numbers.made([next(scores) for _ in answer]) for answer in one.answers] for one in rows]
    half = len(rows) // 2
    return [*scored(numbers, rows[:half], advance), *scored(numbers, rows[half:], advance)]


def score_stream(
    rm: RewardModel,
    model: str,
    rows: Iterator[Row],
    sink: IO[str],
    report: Tell,
    advance_rows: AdvanceRows = rows_ignored,
) -> Counts:
    """Write rows to a stream as they are scored. Such a run cannot be resumed."""
    numbers = AnswerNumbers(rm)
    counts, by = Counts(), summary(identity(rm, model))
    said: set[str] = set()
    for window in score_rows(numbers, rows, counts, report, advance_rows):
        for row, (_, scores, _) in window:
            if scores is not None:
                aside = names_aside(list(row.record), numbers.added)
                for name in aside.keys() - said:
                    report(f'{row.name} has a field "{name}" of its own: it is written as "{aside[name]}"')
                said |= aside.keys()
                sink.write(to_line(renamed(row.record, aside) | {numbers.added.name: scores, "scored_by": by}))
        sink.flush()
    return counts


def score_file(
    rm: RewardModel,
    model: str,
    source: str | Path,
    target: Path,
    report: Tell,
    make_bar: MakesBar = no_bar,
) -> Counts:
    """Score a file, or "-" for standard input, to a file; or go on where a run stopped.

    make_bar: number of rows -> a progress bar. Raises InputError if the output exists already, cannot hold the fields
    of the source, or was begun with another model or source.
    """
    numbers = AnswerNumbers(rm)
    ending_of(target)
    by = identity(rm, model)
    with journal_of(target) as journal:
        finished = target.exists()
        if finished and not journal.foretells(target):
            raise exists(target)
        with as_file(source, target, journal) as path:
            counts = Counts()
            same = recount(journal, path, by, counts, report) if finished else True
            if not finished:
                work(numbers, journal, path, target, by, counts, report, make_bar)
        beside(target, PART).unlink(missing_ok=True)
        journal.done = True
    to_disk(target.parent)
    if not same:
        raise exists(target)
    return counts


def exists(target: Path) -> InputError:
    return InputError(f"{target} exists already: remove it, or name another output")


def beside(target: Path, ending: str) -> Path:
    return target.with_name(target.name + ending)


@contextmanager
def as_file(source: str | Path, target: Path, journal: Journal) -> Iterator[Path]:
    """Yield a source that can be read twice: standard input is kept beside the output until the job is done.

    Raises InputError if standard input had another text when the job was begun.
    """
    if source != STDIN:
        yield Path(source)
        return
    kept, draft = beside(target, INPUT), beside(target, INPUT + PART)
    with draft.open("wb") as file:
        shutil.copyfileobj(click.open_file(STDIN, "rb"), file)
    if kept.exists() and journal.header is not None and not target.exists() and not begins(draft, kept):
        draft.unlink()
        raise InputError(
            f"what came through the pipe is not what {journal.path} was begun with, which is in {kept}: send the same, "
            "or remove both"
        )
    to_disk(draft)
    os.replace(draft, kept)
    yield kept
    kept.unlink()


def begins(path: Path, other: Path) -> bool:
    """Whether a file begins with all bytes of another one."""
    with path.open("rb") as here, other.open("rb") as there:
        while block := there.read(2**20):
            if here.read(len(block)) != block:
                return False
    return True


def recount(journal: Journal, path: Path, by: dict[str, str], counts: Counts, report: Tell) -> bool:
    """Count the rows of a job whose output is written already. Returns False if that was another job."""
    if journal.header != by:
        return False
    for row, entry in zip_longest(read_rows(path), journal.entries()):
        if row is None or entry is None or row.checksum != entry[0]:
            return False
        had(row, entry, counts, report)
    return True


def had(row: Row, entry: Entry, counts: Counts, report: Tell) -> None:
    """Count a row that an earlier run has scored or refused."""
    counts.resumed += 1
    counts.good += entry[1] is not None
    counts.bad += entry[1] is None
    if entry[1] is None:
        report(f"{row.name}: {entry[2]} (an earlier run)")


def work(
    numbers: AnswerNumbers,
    journal: Journal,
    path: Path,
    target: Path,
    by: dict[str, str],
    counts: Counts,
    report: Tell,
    make_bar: MakesBar,
) -> None:
    """Score the rows that are not in the journal, and write the output."""
    output = output_for(path, target, report, numbers.added)
    journal.begin(by)
    with make_bar(output.survey.rows) as advance_rows:
        rest = journal.rest(read_rows(path), path, lambda row, entry: had(row, entry, counts, report), report)
        first = list(islice(rest, 1))
        advance_rows(counts.resumed, 0)
        for window in score_rows(numbers, chain(first, rest), counts, report, advance_rows):
            journal.write(entry for _, entry in window)
    draft = beside(target, PART)
    try:
        with draft.open("wb") as made:
            output.write(made, journal.entries(), summary(by))
        to_disk(draft)
        journal.foretell(draft)
        os.replace(draft, target)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    to_disk(target.parent)
