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
from dataclasses import dataclass, replace
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import IO, Any

import click
import torch

from lightrm.data.data_source import ALL, DataSource, source_of
from lightrm.data.record_columns import Columns
from lightrm.data.record_forms import Answers
from lightrm.data.records import Row, to_line
from lightrm.display.progress import AdvanceRows, rows_ignored
from lightrm.errors import InputError, LightRMError, MemoryLimitError, NumericsError
from lightrm.files import to_disk
from lightrm.jobs.answer_numbers import Answer, AnswerNumbers
from lightrm.jobs.identity import identity, summary
from lightrm.jobs.job_outputs import Entry, Number, Output, Tell, ending_of, names_aside, output_for, renamed
from lightrm.jobs.journal import Journal, journal_of
from lightrm.scorer import RewardModel
from lightrm.text.conversation import turns_of

MOST_ROWS = 1024  # in memory at once
INPUT, PART = ".input", ".part"  # the endings of what lies beside an output
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


@dataclass(frozen=True, slots=True)
class Scorer:
    """A model that scores rows. read: returns a record's prompt and answers."""

    numbers: AnswerNumbers
    read: Callable[[Any], Answers]


def score_rows(
    scorer: Scorer, rows: Iterator[Row], counts: Counts, report: Tell, advance_rows: AdvanceRows
) -> Iterator[list[tuple[Row, Entry]]]:
    """Yield rows with their scores, in order, a window of rows at a time."""
    window: list[EncodedRow] = []
    tokens = 0
    for row in rows:
        window.append(encoded(scorer, row, counts))
        tokens += window[-1].tokens
        if tokens >= scorer.numbers.rm.engine.window or len(window) == MOST_ROWS:
            yield score_window(scorer.numbers, window, counts, report, advance_rows)
            window, tokens = [], 0
    if window:
        yield score_window(scorer.numbers, window, counts, report, advance_rows)


def encoded(scorer: Scorer, row: Row, counts: Counts) -> EncodedRow:
    if row.error:
        return EncodedRow(row, [], row.error)
    try:
        found: list[Answer] = []
        cut = 0
        for prompt, responses in scorer.read(row.record).asked:
            made, too_long = scorer.numbers.encode(turns_of(prompt), responses)
            found, cut = [*found, *made], cut + too_long
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
    columns: Columns = ALL,
) -> Counts:
    """Write rows to a stream as they are scored. Such a run cannot be resumed. columns: those with prompt and
    answers."""
    numbers = AnswerNumbers(rm)
    scorer = Scorer(numbers, lambda record: columns.answers(record, labels=False))
    counts, by = Counts(), summary(identity(rm, model))
    said: set[str] = set()
    for window in score_rows(scorer, rows, counts, report, advance_rows):
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
    source: str | Path | DataSource,
    target: Path,
    report: Tell,
    make_bar: MakesBar = no_bar,
) -> Counts:
    """Score a file, "-" for standard input, or another source of data, to a file; or go on where a run stopped.

    make_bar: number of rows -> a progress bar. Raises InputError if the output exists already, cannot hold the fields
    of the source, or was begun with another model or source, or with other options.
    """
    numbers, data = AnswerNumbers(rm), source_of(source)
    ending_of(target)
    by = identity(rm, model)
    begun = by | data.identity
    with journal_of(target) as journal:
        finished = target.exists()
        if finished and not journal.foretells(target):
            raise exists(target)
        with as_file(data, target, journal) as held:
            counts = Counts()
            same = recount(journal, held, begun, counts, report) if finished else True
            if not finished:
                journal.check(begun)
                work(numbers, journal, held, target, begun, summary(by), counts, report, make_bar)
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
def as_file(source: DataSource, target: Path, journal: Journal) -> Iterator[DataSource]:
    """Yield a source that can be read twice: standard input is kept beside the output until the job is done.

    Raises InputError if standard input had another text when the job was begun.
    """
    if not source.piped:
        yield source
        return
    kept, draft = beside(target, INPUT), beside(target, INPUT + PART)
    with draft.open("wb") as file:
        shutil.copyfileobj(click.open_file("-", "rb"), file)
    if kept.exists() and journal.header is not None and not target.exists() and not begins(draft, kept):
        draft.unlink()
        raise InputError(
            f"what came through the pipe is not what {journal.path} was begun with, which is in {kept}: send the same, "
            "or remove both"
        )
    to_disk(draft)
    os.replace(draft, kept)
    yield replace(source, files=(kept,))
    kept.unlink()


def begins(path: Path, other: Path) -> bool:
    """Whether a file begins with all bytes of another one."""
    with path.open("rb") as here, other.open("rb") as there:
        while block := there.read(2**20):
            if here.read(len(block)) != block:
                return False
    return True


def recount(journal: Journal, source: DataSource, by: dict[str, str], counts: Counts, report: Tell) -> bool:
    """Count the rows of a job whose output is written already. Returns False if that was another job."""
    if journal.header != by:
        return False
    for row, entry in zip_longest(source.rows(), journal.entries()):
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
    source: DataSource,
    target: Path,
    begun: dict[str, str],
    by: dict[str, str],
    counts: Counts,
    report: Tell,
    make_bar: MakesBar,
) -> None:
    """Score the rows that are not in the journal, and write the output. begun: with what. by: what each row stores."""
    output = output_for(source, target, report, numbers.added)
    scorer = Scorer(numbers, lambda record: source.answers(record, labels=False))
    journal.begin(begun)
    with make_bar(output.survey.rows) as advance_rows:
        rest = journal.rest(source.rows(), source, lambda row, entry: had(row, entry, counts, report), report)
        first = list(islice(rest, 1))
        advance_rows(counts.resumed, 0)
        for window in score_rows(scorer, chain(first, rest), counts, report, advance_rows):
            journal.write(entry for _, entry in window)
    write_output(output, target, journal.entries(), by, journal.foretell)


def write_output(
    output: Output,
    target: Path,
    entries: Iterator[Entry],
    by: dict[str, str],
    before: Callable[[Path], None] = lambda draft: None,
) -> None:
    """Write an output whole or not at all. before: called with the draft that is about to be named."""
    draft = beside(target, PART)
    try:
        with draft.open("wb") as made:
            output.write(made, entries, by)
        to_disk(draft)
        before(draft)
        os.replace(draft, target)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    to_disk(target.parent)
