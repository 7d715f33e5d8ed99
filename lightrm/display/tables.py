"""Tables for terminals: cells are never cut, numbers never broken, and a cell's text is never read as markup.

If a terminal is too narrow for all columns, the table is shown in parts, one below the other, each with the first
column.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

GAP = 2  # between columns
WORD = 16  # a longer word of a text, such as a path, may be folded


@dataclass(frozen=True, slots=True)
class Column:
    """A heading ("" for none). words: cells are text, set to the left; otherwise numbers, set to the right and kept
    whole."""

    heading: str
    words: bool = False


@dataclass(frozen=True, slots=True)
class Sheet:
    """The content of a table, which rich displays. A cell may have several lines. title, note: sentences above and
    below."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    note: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        if self.title:
            yield Text(self.title, "bold", overflow="fold")
        for part in self.parts(options.max_width):
            yield self.table(part, options.max_width)
        if self.note:
            yield Text(self.note, "dim", overflow="fold")

    def __str__(self) -> str:
        return plain_text(self, 80)

    __repr__ = __str__

    def parts(self, width: int) -> list[list[int]]:
        """Return which columns are shown together: as many as fit beside the first."""
        found: list[list[int]] = []
        left = 0
        for k in range(1, len(self.columns)):
            need = self.least(k) + GAP
            if not found or left < need:
                found.append([0])
                left = width - self.least(0)
            found[-1].append(k)
            left -= need
        return found or [[0]]

    def table(self, part: Sequence[int], width: int) -> Table:
        widths = self.widths(part, width)
        headed = any(column.heading for column in self.columns)
        table = Table(
            box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0), show_header=headed
        )  # fmt: skip
        for k in part:
            justify: Literal["left", "right"] = "left" if self.columns[k].words else "right"
            heading = Text(self.columns[k].heading, overflow="fold", justify=justify)
            table.add_column(heading, width=widths[k], overflow="fold", justify=justify)
        for row in self.rows:
            table.add_row(*(Text(row[k], overflow="fold") for k in part))
        return table

    def widths(self, part: Sequence[int], width: int) -> dict[int, int]:
        """Return the width of each column: the least it needs, and a part of the free space if its lines are longer."""
        found = {k: self.least(k) for k in part}
        left = max(width - sum(found.values()) - GAP * (len(part) - 1), 0)
        wanting = sorted((self.most(k) - found[k], k) for k in part)
        for i, (want, k) in enumerate(wanting):
            more = min(want, left // (len(wanting) - i))
            found[k] += more
            left -= more
        return found

    def most(self, k: int) -> int:
        return max(longest_line(cell) for cell in (self.columns[k].heading, *(row[k] for row in self.rows)))

    def least(self, k: int) -> int:
        heading = longest_word(self.columns[k].heading)
        if not self.columns[k].words:
            return max([heading, *(longest_line(row[k]) for row in self.rows)])
        return max([heading, min(WORD, max((longest_word(row[k]) for row in self.rows), default=0))])


def longest_line(text: str) -> int:
    return max(map(cell_len, text.split("\n")))


def longest_word(text: str) -> int:
    return max(map(cell_len, text.split()), default=0)


def terminal() -> Console:
    """Return standard output, without rich's markup and emoji codes."""
    return Console(markup=False, emoji=False, highlight=False)


def plain_text(shown: RenderableType, width: int) -> str:
    """Return what a terminal of this width would show, without colours."""
    console = Console(width=width, color_system=None, force_jupyter=False, markup=False, emoji=False, highlight=False)
    with console.capture() as captured:
        console.print(shown)
    return captured.get()
