"""The fidelity report: what each scheme does to the scores of one model, against its reference, on the same ids.

Built from arrays of scores, read back from its JSON, shown as a table, a page or one line. Knows no models.
"""

from __future__ import annotations

import dataclasses
import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightrm.display.sizes import size_text
from lightrm.display.tables import Column, Sheet
from lightrm.errors import InputError
from lightrm.judge.agreement import Agreement, Array, Estimate, Prompts, agreement
from lightrm.judge.bounds import Bound, FidelityNote
from lightrm.typed_json import INFINITE, made, read_object

FORMAT = 3
BANDS = ((0, 128), (128, 512), (512, None))  # tokens of a prompt with its answer
SLICE_DRAWS = 200
FEWEST = 20  # prompts of a slice that is shown


@dataclass(frozen=True, slots=True)
class Measured:
    """The result of one scheme. bytes: of its weights; sqnr_db: as in `loading.placement.LoadReport`."""

    scheme: str
    scores: Array
    bytes: int
    tokens_per_second: float
    sqnr_db: Mapping[str, float] = field(default_factory=dict, metadata=INFINITE)


@dataclass(frozen=True, slots=True)
class Asked:
    """The answers that were scored, one entry each: number of the prompt, tokens, language, worth (NaN without a
    label)."""

    name: str
    prompt: NDArray[np.int64]
    tokens: NDArray[np.int64]
    lang: Sequence[str]
    worth: Array

    @property
    def slices(self) -> dict[str, NDArray[np.bool_]]:
        """Return the answers by language and by length; an answer belongs to the length band of its prompt's longest
        answer."""
        longest = np.zeros(int(self.prompt.max()) + 1, np.int64)
        np.maximum.at(longest, self.prompt, self.tokens)
        length, lang = longest[self.prompt], np.asarray(self.lang)
        found = {name: lang == name for name in sorted(set(self.lang))}
        for low, high in BANDS:
            name = f"{low}-{high} tokens" if high else f"over {low} tokens"
            found[name] = (length >= low) & (length < (high or np.inf))
        return {name: chosen for name, chosen in found.items() if len(np.unique(self.prompt[chosen])) >= FEWEST}


@dataclass(frozen=True, slots=True)
class Row:
    """One scheme in the report: its agreement, also by language and by length, and the bound for exact rankings."""

    scheme: str
    bytes: int
    tokens_per_second: float
    agreement: Agreement
    slices: dict[str, Agreement]
    sqnr_db: dict[str, float] = field(metadata=INFINITE)
    bound: Bound


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """How far each layer alone moves the scores: root mean square, in within-prompt standard deviations of the exact
    scores.

    whole: the same for all layers together. answers, tokens: how much text was scored.
    """

    scheme: str
    layers: tuple[float, ...]
    whole: float
    answers: int
    tokens: int

    @property
    def most(self) -> list[int]:
        """The layers, sorted by how far they move the score, the furthest first."""
        return sorted(range(len(self.layers)), key=lambda i: -self.layers[i])

    def table(self) -> Sheet:
        top = max((moved for moved in self.layers if moved > 0), default=1.0)
        bars = ("█" * round(30 * moved / top) if moved > 0 else "" for moved in self.layers)
        return Sheet(
            (Column("layer"), Column("moves the score by"), Column("", words=True)),
            tuple((str(i), f"{100 * self.layers[i]:.2f} %", bar) for i, bar in enumerate(bars)),
            f"{self.scheme}, one layer at a time, {self.answers} answers; all layers {100 * self.whole:.2f} %",
        )

    def __str__(self) -> str:
        return str(self.table())

    __repr__ = __str__


@dataclass(frozen=True, slots=True)
class FidelityReport:
    """The whole report.

    floor: a half precision against the reference, which is the noise without any quantization; None if the reference is
    a half precision itself. scores: of every scheme, in input order. about: versions, device, date.
    """

    model: str
    reference: str
    reference_bytes: int
    reference_tokens_per_second: float
    accuracy: Estimate | None
    data: str
    prompts: int
    answers: int
    tokens: int
    rows: tuple[Row, ...]
    floor: Row | None
    scores: dict[str, Array]
    about: dict[str, str]
    sensitivity: tuple[Sensitivity, ...] = ()

    def row(self, scheme: str) -> Row:
        found = next((row for row in self.rows if row.scheme == scheme), None)
        if found is None:
            raise InputError(f"no scheme {scheme!r} was measured, only {', '.join(row.scheme for row in self.rows)}")
        return found

    def summary(self, scheme: str) -> str:
        """Return one line about a scheme, for a quantized folder to keep."""
        a = self.row(scheme).agreement
        floor = f"; {self.floor.scheme} alone: {short(self.floor.agreement)}" if self.floor else ""
        return f"{short(a)} against {self.reference} on {self.prompts} prompts of {self.data}{floor}"

    def note(self, scheme: str) -> FidelityNote:
        """Return what a quantized folder keeps of the report."""
        return FidelityNote(self.summary(scheme), self.reference, self.row(scheme).bound)

    def below(self, tau: float) -> list[str]:
        """Return a sentence for each scheme whose tau-b is lower than `tau`."""
        return [
            f"{row.scheme}: tau-b {row.agreement.tau.value:.4f} is below {tau}"
            for row in self.rows
            if not row.agreement.tau.value >= tau  # a NaN is no pass
        ]

    def table(self) -> Sheet:
        return Sheet(
            tuple(Column(name, words=name == "scheme") for name in HEADINGS),
            tuple((scheme, *map(stacked, rest)) for scheme, *rest in self.cells()),
            f"{self.model} against {self.reference}, {self.prompts} prompts with {self.answers} answers of {self.data}",
            TOKENS_PER_SECOND,
        )

    def cells(self) -> list[tuple[str, ...]]:
        """Return the rows of the table as text: the reference, the noise floor, the schemes."""
        right = self.accuracy.percent(2) if self.accuracy else "-"
        first = (
            self.reference, size_text(self.reference_bytes, digits=2), f"{self.reference_tokens_per_second:,.0f}",
            *["-"] * 6, right,
        )  # fmt: skip
        rows = [*([self.floor] if self.floor else []), *self.rows]
        return [first, *[row_cells(row, row is self.floor) for row in rows]]

    def to_json(self) -> str:
        scores = {name: list(map(shortest, found)) for name, found in self.scores.items()}
        raw = {"format": FORMAT} | dataclasses.asdict(self) | {"scores": scores}
        return json.dumps(without_infinities(raw), ensure_ascii=False, indent=1) + "\n"

    @classmethod
    def read(cls, path: str | Path) -> FidelityReport:
        """Read a report from its JSON. Raises InputError if the file holds none."""
        raw = read_object(Path(path), "a fidelity report")
        if raw.pop("format", None) != FORMAT:
            raise InputError(f"{path} is a fidelity report of another format, or none: measure again")
        try:
            report = made(cls, raw, "the report")
            report.check()
        except InputError as error:
            raise InputError(f"{path} is not a fidelity report: {error}") from error
        return report

    def check(self) -> None:
        """Raise InputError unless there is a score of each scheme for each answer."""
        rows = [*([self.floor] if self.floor else []), *self.rows]
        for scheme in (self.reference, *(row.scheme for row in rows)):
            found = len(self.scores[scheme]) if scheme in self.scores else 0
            if found != self.answers:
                raise InputError(f"it is of {self.answers} answers and holds {found} scores of {scheme}")

    def __str__(self) -> str:
        return str(self.table())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(HEADINGS, self.cells())


TOKENS_PER_SECOND = (
    "tokens/s: tokens of all texts, a prompt's with each of its answers, over the seconds of scoring them, once the "
    "model is loaded and its kernels are compiled."
)
FIGURES = ("mean error", "99th percentile", "tau-b", "tau-b in prompts", "flips", "same best")
HEADINGS = ("scheme", "weights", "tokens/s", *FIGURES, "accuracy")


def row_cells(row: Row, floor: bool) -> tuple[str, ...]:
    a = row.agreement
    return (
        f"{row.scheme} (floor)" if floor else row.scheme,
        size_text(row.bytes, digits=2),
        f"{row.tokens_per_second:,.0f}",
        *figures(a),
        a.accuracy.percent(2) if a.accuracy else "-",
    )


def figures(a: Agreement) -> tuple[str, ...]:
    """Return the cells of a row, one for each heading in FIGURES."""
    return (
        a.mean_error.percent(2), a.p99_error.percent(2), a.tau.text(3), a.tau_within.text(3), a.flips.percent(2),
        a.top1.percent(2),
    )  # fmt: skip


def html_table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in headings)
    body = "".join("<tr>" + "".join(f"<td>{unbroken(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def unbroken(cell: str) -> str:
    """Return a cell as HTML. A line may end before an interval, never inside it or inside a figure, in a page as in a
    notebook."""
    value, opened, rest = cell.partition(" (")
    parts = [value, "(" + rest] if opened else [cell]
    return " ".join(f'<span style="white-space:nowrap">{html.escape(part)}</span>' for part in parts)


def build(
    model: str, asked: Asked, reference: Measured, found: Sequence[Measured], floor: Measured | None,
    about: Mapping[str, str],
) -> FidelityReport:  # fmt: skip
    """Compare every scheme with the reference, on all answers and on each slice."""
    every = Prompts(asked.prompt)
    own = agreement(reference.scores, reference.scores, Prompts(asked.prompt, SLICE_DRAWS), asked.worth)

    def row(measured: Measured) -> Row:
        whole = agreement(reference.scores, measured.scores, every, asked.worth)
        slices = {
            name: agreement(
                reference.scores[chosen], measured.scores[chosen],
                Prompts(asked.prompt[chosen], SLICE_DRAWS), asked.worth[chosen],
            )
            for name, chosen in asked.slices.items()
        }  # fmt: skip
        bound = Bound.of((reference.scores[answers], measured.scores[answers]) for answers in every.members)
        return Row(
            measured.scheme, measured.bytes, measured.tokens_per_second, whole, slices, dict(measured.sqnr_db), bound
        )

    rows = tuple(row(measured) for measured in found)
    return FidelityReport(
        model=model,
        reference=reference.scheme,
        reference_bytes=reference.bytes,
        reference_tokens_per_second=reference.tokens_per_second,
        accuracy=own.accuracy,
        data=asked.name,
        prompts=len(every),
        answers=len(asked.prompt),
        tokens=int(asked.tokens.sum()),
        rows=rows,
        floor=None if floor is None else row(floor),
        scores={m.scheme: m.scores for m in (reference, *([floor] if floor else []), *found)},
        about=dict(about),
    )


def without_infinities(value: Any) -> Any:
    """Return a value for JSON, which has no NaN and no infinity: null stands for them."""
    if isinstance(value, dict):
        return {key: without_infinities(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_infinities(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shortest(score: float) -> float:
    """Return a float32 with as few digits as distinguish it from its neighbours."""
    return float(str(np.float32(score)))


def stacked(cell: str) -> str:
    """Return a figure with its interval on the next line, for narrow terminals."""
    return cell.replace(" (", "\n").replace(" - ", "-").removesuffix(")")


def short(a: Agreement) -> str:
    error = a.mean_error.percent(2)
    return f"tau-b {a.tau.text(3)}, flips {a.flips.percent(2)}, mean error {error} of a standard deviation"
