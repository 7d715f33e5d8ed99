"""The text, ids and pieces behind one score, to print or to show in a notebook."""

from __future__ import annotations

import html
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Explanation:
    """text: the whole text after templating. token_ids, pieces: those that remained of it. cut: how many more were cut
    off. template: its name. score: raw. steps: each step of the answer with its score, by a process reward model."""

    text: str
    token_ids: list[int]
    pieces: list[str]
    cut: int
    template: str
    score: float
    steps: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        pairs = "  ".join(f"{piece!r}:{i}" for piece, i in zip(self.pieces, self.token_ids, strict=True))
        cut = f", {self.cut} more cut" if self.cut else ""
        head = f"score {self.score:.4f} · template {self.template} · {len(self.token_ids)} tokens{cut}"
        steps = "".join(f"\n{score:.4f}  {step!r}" for step, score in self.steps)
        return f"{head}{steps}\n{self.text}\n{pairs}"

    def _repr_html_(self) -> str:
        shades = ("#e8f0fe", "#fef3e0")
        spans = "".join(
            f'<span title="{i}" style="background:{shades[k % 2]};color:#222">{html.escape(piece)}</span>'
            for k, (piece, i) in enumerate(zip(self.pieces, self.token_ids, strict=True))
        )
        cut = f", {self.cut} more cut" if self.cut else ""
        steps = "".join(f"<li>{score:.4f} {html.escape(step)}</li>" for step, score in self.steps)
        name = html.escape(self.template)
        return (
            f"<p><b>{self.score:.4f}</b> · template {name} · {len(self.token_ids)} tokens{cut}</p>"
            f"{f'<ol>{steps}</ol>' if steps else ''}"
            f'<p style="font-family:monospace;white-space:pre-wrap">{spans}</p>'
        )
