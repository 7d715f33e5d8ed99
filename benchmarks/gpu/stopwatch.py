"""Time on a card, fairly: things to compare run in turn, round after round, and medians are kept."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Run = Callable[[], object]


def said(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:120]}"


@dataclass
class Suite:
    """Where the measurements go, and how much is measured.

    rehearsal: everything runs once, tiny, on a CPU in Triton's interpreter; its times mean nothing and are not kept.
    """

    device: torch.device
    rehearsal: bool
    seconds: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds of the time that the suite was given."""
        return self.seconds - (time.monotonic() - self.started)

    def add(self, section: str, what: str, case: str, unit: str, value: float | None, **more: Any) -> None:
        self.rows.append({"section": section, "what": what, "case": case, "unit": unit, "value": value, **more})

    def in_turn(self, runs: Mapping[str, Run], rounds: int = 5) -> tuple[dict[str, float], dict[str, str]]:
        """Median seconds of each, and what those that cannot run said. The first round warms up and is dropped."""
        seconds: dict[str, list[float]] = {}
        failed: dict[str, str] = {}
        for k in range(1 if self.rehearsal else rounds + 1):
            for name, run in runs.items():
                if name in failed:
                    continue
                try:
                    taken = self.timed(run)
                except Exception as error:  # what a library cannot do on this card is part of the result
                    failed[name] = said(error)
                    continue
                if k or self.rehearsal:
                    seconds.setdefault(name, []).append(taken)
        return {name: statistics.median(found) for name, found in seconds.items()}, failed

    def timed(self, run: Run) -> float:
        """Seconds between events before and after; a short run is repeated between them."""
        if self.rehearsal:
            run()
            return 1.0
        run()
        torch.cuda.synchronize(self.device)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        once = time.perf_counter()
        run()
        torch.cuda.synchronize(self.device)
        repeats = max(1, min(20, round(0.003 / max(time.perf_counter() - once, 1e-6))))
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end) / 1000 / repeats
