"""A checkpoint calibrated: seconds by step, and peak memory beside the weights. Writes no result.

    python benchmarks/calibration_worker.py FOLDER SCHEME TOKENS THREADS

Run by its path, so that PYTHONPATH says which version of lightrm it times. FOLDER is of `benchmarks.scoring.build`,
and FOLDER/warm-up a smaller model, on which is compiled what is compiled. Texts of 512 random ids. Seconds are CPU time
over threads, since the clock's (`wall`) are longer on a busy machine. Linux only, for it reads /proc.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightrm.checkpoints.detect import open_checkpoint
from lightrm.loading.calibrated_loader import loader_for
from lightrm.loading.placement import Placement
from lightrm.schemes.grammar import parse_scheme

STEPS = {  # what each step is, and the functions in which its time passes; the rest is passes over the two streams
    "second moments and targets": ("gptq_rounding.Moments.of", "second_moments.Moments.of"),
    "regression": ("calibrated_loader.regressed",),
    "factor": ("gptq_rounding.inverse_factor", "gptq_rounding.factored", "calibrated_loader.factored"),
    "rounding": ("calibrated_loader.compensated_int8", "calibrated_loader.compensated_int4"),
}
LENGTH = 512


class Clock:
    """CPU seconds by step, each without the steps inside it."""

    def __init__(self) -> None:
        self.inside: list[str] = ["passes"]
        self.seconds: dict[str, float] = {}
        self.last = time.process_time()

    def turn(self) -> None:
        now = time.process_time()
        self.seconds[self.inside[-1]] = self.seconds.get(self.inside[-1], 0.0) + now - self.last
        self.last = now

    def timed(self, step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            self.turn()
            self.inside.append(step)
            try:
                return function(*arguments, **named)
            finally:
                self.turn()
                self.inside.pop()

        return run


def watch(clock: Clock) -> None:
    """Time the functions of STEPS that this version has."""
    for step, paths in STEPS.items():
        for path in paths:
            module, *owners, name = path.split(".")
            try:
                owner: Any = importlib.import_module(f"lightrm.loading.{module}")
                for one in owners:
                    owner = getattr(owner, one)
                function = getattr(owner, name)
            except (ImportError, AttributeError):
                continue
            setattr(owner, name, clock.timed(step, function))


def memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def texts(tokens: int, vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, vocabulary, (max(1, tokens // LENGTH), LENGTH), generator=generator).tolist()


def main(folder: Path, scheme: str, tokens: int) -> dict[str, Any]:
    placement = Placement(parse_scheme(scheme, torch.device("cpu")), torch.device("cpu"))
    small = open_checkpoint(folder / "warm-up")
    loader_for(small, placement, texts(4096, small.architecture.vocabulary)).load()
    checkpoint = open_checkpoint(folder)
    loader = loader_for(checkpoint, placement, texts(tokens, checkpoint.architecture.vocabulary))
    clock = Clock()
    watch(clock)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, started, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    clock.last = cpu
    loaded = loader.load()
    clock.turn()
    return {
        "wall": time.perf_counter() - started,
        "seconds": {step: found / torch.get_num_threads() for step, found in clock.seconds.items()},
        "peak": memory("VmHWM") - before - loaded.report.bytes,
        "held": loaded.report.bytes,
    }


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[4]))
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
