"""Shared fixtures: where the real data lies when a developer has it, and threads for small machines."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Tests run side by side: OpenMP threads of several processes on few cores wait for each other in every small operation.
# Set before PyTorch starts its threads, and for the processes that tests start; OMP_NUM_THREADS=2 runs them with two.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for the network

import pytest
import torch

from lightrm.kernels.arena import Arena

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported; with a card, they run on it

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real tokenizers and cases, which stay outside the project; tests that need them skip without."""
    folder = Path(os.environ.get("LIGHTRM_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"the shared golden cases are not at {folder} (set LIGHTRM_SHARED)")
    return folder


# Every way to memory that is not cleared: PyTorch's and the arena's. numpy's doors stay: numba compiles code that names
# them.
UNCLEARED = (
    (torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"), (Arena, "empty"),
)  # fmt: skip


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals of few draws, for tests that are about something else."""
    from lightrm.judge import agreement, fidelity

    monkeypatch.setattr(agreement, "DRAWS", 20)
    monkeypatch.setattr(fidelity, "SLICE_DRAWS", 10)


@pytest.fixture(scope="module")
def poisoned() -> Iterator[None]:
    """What is not written stays NaN, or a number that no test expects."""
    with pytest.MonkeyPatch.context() as patch:
        for holder, name in UNCLEARED:
            patch.setattr(holder, name, poisoning(getattr(holder, name)))
        yield


def poisoning(door: Callable[..., Any]) -> Callable[..., Any]:
    def poison(*args: Any, **options: Any) -> Any:
        made = door(*args, **options)
        if isinstance(made, torch.Tensor) and not made.is_meta:
            made.fill_(float("nan") if made.is_floating_point() else 99)
        return made

    return poison
