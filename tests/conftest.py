"""Shared fixtures: where the real data lies when a developer has it, and threads for small machines."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for the network
torch.set_num_threads(1)  # tests run side by side; tiny tensors gain nothing from more

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real tokenizers and cases, which stay outside the project; tests that need them skip without."""
    folder = Path(os.environ.get("LIGHTRM_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"the shared golden cases are not at {folder} (set LIGHTRM_SHARED)")
    return folder
