"""Progress bars for terminals and notebooks, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import ProgressColumn, Task


REMEMBERED = 3600.0  # seconds of the past from which the time left follows; a step of 30 would be forgotten at once


class Advance(Protocol):
    """Called with the number of tokens, or of other things, that were just done."""

    def __call__(self, done: float, /) -> None: ...


def ignored(done: float, /) -> None:
    """Show nothing."""


class AdvanceRows(Protocol):
    """Called with the rows (or part of a row) and the tokens that were just done."""

    def __call__(self, rows: float, tokens: float, /) -> None: ...


def rows_ignored(rows: float, tokens: float, /) -> None:
    """Show nothing."""


def console() -> Console:
    """Return standard error; in a notebook the cell, if it can show moving bars."""
    from rich.console import Console

    return Console(stderr=True, force_jupyter=None if find_spec("ipywidgets") else False)


def on_terminal(quiet: bool = False) -> bool:
    """Whether to show a bar that is for readers only: standard error is a terminal, and --quiet was not given."""
    return not quiet and sys.stderr.isatty()


@contextmanager
def token_progress(total: int | None, shown: bool) -> Iterator[Advance]:
    """Show a bar over `total` tokens, with the share done and the time left; without these if total is None."""
    if not shown:
        yield ignored
        return
    from rich.progress import Progress

    def tokens_done(task: Task) -> str:
        return f"{done_of(task)} tokens"

    def speed(task: Task) -> str:
        return f"{task.completed / task.elapsed:,.0f} tokens/s" if task.elapsed else ""

    with Progress(*columns("scoring", total, saying(tokens_done), saying(speed)), console=console()) as bar:
        task = bar.add_task("", total=total)
        yield lambda tokens: bar.advance(task, tokens)


@contextmanager
def row_progress(total: int | None, shown: bool) -> Iterator[AdvanceRows]:
    """Show a bar over `total` rows (None if unknown), with tokens per second."""
    if not shown:
        yield rows_ignored
        return
    from rich.progress import Progress

    def rows_done(task: Task) -> str:
        speed = f", {task.fields['tokens'] / task.elapsed:,.0f} tokens/s" if task.elapsed else ""
        return f"{done_of(task)} records{speed}"

    done = 0.0
    with Progress(*columns("scoring", total, saying(rows_done)), console=console()) as bar:
        task = bar.add_task("", total=total, tokens=0)

        def advance_rows(rows: float, tokens: float, /) -> None:
            nonlocal done
            done += tokens
            bar.update(task, advance=rows, tokens=done)

        yield advance_rows


@contextmanager
def item_progress(total: int, what: str, shown: bool = True) -> Iterator[Advance]:
    """Show a bar over `total` things, for work that takes minutes. It disappears when they are done."""
    if not shown:
        yield ignored
        return
    from rich.progress import MofNCompleteColumn, Progress

    shows = columns(what, total, MofNCompleteColumn())
    with Progress(*shows, console=console(), transient=True, speed_estimate_period=REMEMBERED) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.advance(task, done)


def columns(what: str, total: int | None, *between: ProgressColumn) -> list[ProgressColumn]:
    """Return the columns of a bar: its name, the bar, the share, `between`, the time left. Share and time need a
    total."""
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    first = [TextColumn(what, markup=False), BarColumn()]
    if total is None:
        return [*first, *between, TimeElapsedColumn()]
    return [*first, TaskProgressColumn(), *between, TimeRemainingColumn()]


def saying(words: Callable[[Task], str]) -> ProgressColumn:
    """Return a column whose text a function makes from the state of the work."""
    from rich.progress import ProgressColumn
    from rich.text import Text

    class Said(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(words(task))

    return Said()


def done_of(task: Task) -> str:
    return f"{task.completed:,.0f}" + ("" if task.total is None else f" of {task.total:,.0f}")
