"""The fidelity report as files: fidelity.json, and fidelity.html, a single file with its plots inside.

matplotlib, an extra, draws the plots. Without it the page has its tables and says what is missing.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from lightrm.architecture import LINEARS
from lightrm.files import write_text
from lightrm.judge.fidelity import FIGURES, TOKENS_PER_SECOND, FidelityReport, Row, figures, html_table

STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --line: #ddd; --edge: #888; --pale: #666 }
@media (prefers-color-scheme: dark) {
:root { --ink: #ddd; --paper: #181a1b; --line: #3a3d40; --edge: #888; --pale: #aaa } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: var(--ink);
background: var(--paper) }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; display: block; overflow-x: auto }
th, td { padding: .3rem .6rem; text-align: right }
th { border-bottom: 2px solid var(--edge) } tr + tr td { border-top: 1px solid var(--line) }
td:first-child { text-align: left } img { max-width: 100%; background: #fff; border-radius: 4px }
.note { color: var(--pale) }
"""
DOTS = 4000  # points of a scatter plot, at most


def write_report(report: FidelityReport, folder: Path) -> Path:
    """Write both files, each whole or not at all. Returns the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("fidelity.json", report.to_json()), ("fidelity.html", page(report))):
        write_text(folder / name, text)
    return folder / "fidelity.html"


def page(report: FidelityReport) -> str:
    """Return the whole page; nothing in it is loaded from elsewhere."""
    title = html.escape(f"Fidelity of {report.model}")
    about = html.escape("; ".join(f"{name}: {value}" for name, value in report.about.items()))
    pictures = "".join(f"<h2>{html.escape(name)}</h2>{picture}" for name, picture in drawn(report))
    slices = "".join(f"<h3>{html.escape(row.scheme)}</h3>{slice_table(row)}" for row in report.rows if row.slices)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head><body>
<h1>{title}</h1>
<p>Against {html.escape(report.reference)} on {report.prompts} prompts with {report.answers} answers,
{report.tokens:,} tokens, of {html.escape(report.data)}. 95 % intervals of a bootstrap over prompts, the same draws for
every scheme.</p>
{report._repr_html_()}
<p class="note">Errors are in units of the reference's standard deviation within a prompt. Flips: pairs of a prompt's
answers that change their order. The noise floor is what a half precision does without any quantization.
{html.escape(TOKENS_PER_SECOND)} {about}</p>
{pictures}
<h2>By language and length</h2>
{slices}
</body></html>
"""


def slice_table(row: Row) -> str:
    lines = [(name, str(a.flips.n), *figures(a)) for name, a in row.slices.items()]
    return html_table(("", "pairs", *FIGURES), lines)


def drawn(report: FidelityReport) -> Iterator[tuple[str, str]]:
    """Return the heading of each plot with its picture as an <img>."""
    try:
        import_module("matplotlib")
    except ImportError:
        yield "Plots", "<p>Plots need matplotlib: pip install matplotlib</p>"
        return
    for name, figure in plots(report).items():
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=110, bbox_inches="tight")
        source = base64.b64encode(picture.getvalue()).decode()
        yield name, f'<img alt="{html.escape(name)}" src="data:image/png;base64,{source}">'


def plots(report: FidelityReport) -> dict[str, Any]:
    """Return matplotlib figures by heading, for pages and notebooks. They open no windows."""
    rows = [*([report.floor] if report.floor else []), *report.rows]
    found = {
        "Scores": scatters(report, rows),
        "Difference against the reference's score": differences(report, rows),
        "Flips by margin": flips(rows),
    }
    if any(row.sqnr_db for row in report.rows):
        found["Signal to quantization noise by layer"] = layers(report.rows)
    if report.sensitivity:
        found["What each layer alone does to the scores"] = sensitivities(report)
    return found


def panels(count: int) -> tuple[Any, list[Any]]:
    figure = import_module("matplotlib.figure").Figure(figsize=(3.4 * max(count, 1), 3.2), layout="constrained")
    return figure, list(figure.subplots(1, max(count, 1), squeeze=False)[0])


def scatters(report: FidelityReport, rows: Sequence[Row]) -> Any:
    figure, axes = panels(len(rows))
    exact = report.scores[report.reference]
    some = np.linspace(0, len(exact) - 1, min(DOTS, len(exact))).astype(int)
    for axis, row in zip(axes, rows, strict=True):
        axis.plot([exact.min(), exact.max()], [exact.min(), exact.max()], color="#999", lw=0.8)
        axis.scatter(exact[some], report.scores[row.scheme][some], s=3, alpha=0.4)
        axis.set(title=row.scheme, xlabel=report.reference, ylabel=row.scheme)
    return figure


def differences(report: FidelityReport, rows: Sequence[Row]) -> Any:
    figure, axes = panels(len(rows))
    exact = report.scores[report.reference]
    some = np.linspace(0, len(exact) - 1, min(DOTS, len(exact))).astype(int)
    for axis, row in zip(axes, rows, strict=True):
        error = (report.scores[row.scheme] - exact) / row.agreement.spread
        axis.axhline(0, color="#999", lw=0.8)
        axis.scatter(exact[some], error[some], s=3, alpha=0.4)
        axis.set(title=row.scheme, xlabel=f"score in {report.reference}", ylabel="difference / standard deviation")
    return figure


def flips(rows: Sequence[Row]) -> Any:
    figure, (axis,) = panels(1)
    figure.set_size_inches(7, 3.2)
    width = 0.8 / max(len(rows), 1)
    names: list[str] = []
    for k, row in enumerate(rows):
        found = row.agreement.buckets
        names = [f"{b.low:g}-{b.high:g}" if np.isfinite(b.high) else f"over {b.low:g}" for b in found]
        heights = [100 * b.flips / b.pairs if b.pairs else 0.0 for b in found]
        axis.bar(np.arange(len(found)) + k * width, heights, width, label=row.scheme)
    axis.set_xticks(np.arange(len(names)) + 0.4 - width / 2, names)
    axis.set(xlabel="margin of the pair in the reference, in standard deviations", ylabel="% flipped")
    axis.legend(fontsize=8)
    return figure


def layers(rows: Sequence[Row]) -> Any:
    """Plot the SQNR over the layers, in dB, one line for each kind of matrix."""
    lossy = [row for row in rows if any(np.isfinite(db) for db in row.sqnr_db.values())]
    figure, axes = panels(len(lossy))
    for axis, row in zip(axes, lossy, strict=False):
        for kind in LINEARS:
            points = [(int(name.split(".")[1]), db) for name, db in row.sqnr_db.items() if name.endswith(f".{kind}")]
            axis.plot(*zip(*sorted(points), strict=True), label=kind) if points else None
        axis.set(title=row.scheme, xlabel="layer", ylabel="dB")
        axis.legend(fontsize=7)
    return figure


def sensitivities(report: FidelityReport) -> Any:
    figure, axes = panels(len(report.sensitivity))
    for axis, alone in zip(axes, report.sensitivity, strict=True):
        axis.bar(range(len(alone.layers)), [100 * moved for moved in alone.layers])
        axis.set(title=alone.scheme, xlabel="layer", ylabel="% of a standard deviation")
    return figure
