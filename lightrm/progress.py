"""One progress bar, in tokens a second, for terminals and notebooks; silent unless asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Called with the number of tokens just scored."""

    def __call__(self, tokens: int) -> None: ...


@contextmanager
def token_progress(total: int | None, shown: bool) -> Iterator[Advance]:
    """A bar over `total` tokens (None where it is not known), on standard error."""
    if not shown:
        yield lambda tokens: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.completed / task.elapsed:,.0f} tokens/s" if task.elapsed else "")

    columns = (TextColumn("scoring"), BarColumn(), TextColumn("{task.completed:,.0f} tokens"), Speed())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("scoring", total=total)
        yield lambda tokens: bar.advance(task, tokens)
