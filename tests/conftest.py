"""Shared fixtures: where the real data lies when a developer has it, and threads for small machines."""

from __future__ import annotations

import os
from pathlib import Path

# Tests run side by side: OpenMP threads of several processes on few cores wait for each other in every small operation.
# Set before PyTorch starts its threads, and for the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for the network

import pytest
import torch

torch.set_num_threads(1)

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real tokenizers and cases, which stay outside the project; tests that need them skip without."""
    folder = Path(os.environ.get("LIGHTRM_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"the shared golden cases are not at {folder} (set LIGHTRM_SHARED)")
    return folder
