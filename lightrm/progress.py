"""Progress bars for terminals and notebooks, on standard error: tokens a second, or things done of all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console


class Advance(Protocol):
    """Called with the number of tokens, or of things, just done."""

    def __call__(self, done: float, /) -> None: ...


def ignored(done: float, /) -> None:
    """No progress bar."""


class Told(Protocol):
    """Called with the rows, or the part of one, and the tokens just done."""

    def __call__(self, rows: float, tokens: float, /) -> None: ...


def untold(rows: float, tokens: float, /) -> None:
    """No progress bar."""


def console() -> Console:
    """Standard error; in a notebook its cell, if that can show something that moves."""
    from rich.console import Console

    return Console(stderr=True, force_jupyter=None if find_spec("ipywidgets") else False)


@contextmanager
def token_progress(total: int | None, shown: bool) -> Iterator[Advance]:
    """A bar over `total` tokens (None where it is not known), on standard error."""
    if not shown:
        yield ignored
        return
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.completed / task.elapsed:,.0f} tokens/s" if task.elapsed else "")

    columns = (TextColumn("scoring"), BarColumn(), TextColumn("{task.completed:,.0f} tokens"), Speed())
    with Progress(*columns, TimeRemainingColumn(), console=console()) as bar:
        task = bar.add_task("scoring", total=total)
        yield lambda tokens: bar.advance(task, tokens)


@contextmanager
def row_progress(total: int | None, shown: bool) -> Iterator[Told]:
    """A bar over `total` rows (None where it is not known) that tells of tokens too, on standard error."""
    if not shown:
        yield untold
        return
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        Task,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Done(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = f", {task.fields['tokens'] / task.elapsed:,.0f} tokens/s" if task.elapsed else ""
            of = "" if task.total is None else f" of {task.total:,.0f}"
            return Text(f"{task.completed:,.0f}{of} records{speed}")

    known = () if total is None else (TaskProgressColumn(), TimeRemainingColumn())
    done = 0.0
    with Progress(TextColumn("scoring"), BarColumn(20), Done(), *known, console=console()) as bar:
        task = bar.add_task("scoring", total=total, tokens=0)

        def told(rows: float, tokens: float, /) -> None:
            nonlocal done
            done += tokens
            bar.update(task, advance=rows, tokens=done)

        yield told


@contextmanager
def item_progress(total: int, what: str) -> Iterator[Advance]:
    """A bar over `total` things, for work that takes minutes."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)
