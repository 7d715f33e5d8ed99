"""The suite for a card, rehearsed without one: every line of it runs, and nothing that it prints is a figure."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from benchmarks.gpu.__main__ import slug, summary
from benchmarks.gpu.lengths import LONGEST, read_groups
from benchmarks.record import RESULTS, ROOT


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *flags]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_rehearsal() -> None:
    before = sorted(path.name for path in RESULTS.iterdir())
    done = run("--rehearse", "--sizes", "13B")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checks held" in done.stdout
    assert "whose values mean nothing and are not kept" in done.stdout
    assert "TFLOP/s" not in done.stdout
    assert sorted(path.name for path in RESULTS.iterdir()) == before


def test_a_kernel_that_differs_stops_the_suite() -> None:
    program = """
import sys
sys.argv = ["benchmarks.gpu", "--rehearse"]
import os; os.environ["TRITON_INTERPRET"] = "1"
from lightrm.kernels.cuda import cuda_products
right = cuda_products.product
cuda_products.product = lambda *a, **k: right(*a, **k).add_(1)
from benchmarks.gpu.__main__ import main
sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "nothing was measured:\n  int8 17 x 65 x 128: sums" in done.stdout
    assert "ceilings" not in done.stdout


def test_without_a_card() -> None:
    done = run()
    assert done.returncode == 2
    assert "PyTorch sees no CUDA card here" in done.stderr


def test_summary_stays_short() -> None:
    """Medians over shapes, what failed by name, at most 60 lines."""
    linear = {"section": "linears", "unit": "TFLOP/s", "share": 0.5}
    rows = [{"section": "ceilings", "what": "copy", "case": "1", "unit": "GB/s", "value": 1.0}]
    rows += [
        linear | {"what": f"kind {k}", "case": f"shape {n}", "tokens": t, "value": 1.0, "against_bf16": k + 1.0}
        for k in range(5) for n in range(9) for t in (256, 1024)
    ]  # fmt: skip
    rows += [linear | {"what": "kind 7", "case": "shape 1", "tokens": 256, "value": None, "failed": "OutOfMemoryError"}]
    peers = {"section": "whole", "case": "13B", "unit": "pairs/s", "tflops": 1.0, "peak_gib": 2.0, "failed": ""}
    rows += [peers | {"what": "transformers bf16", "value": 2.0}, peers | {"what": "lightrm w8a8", "value": 5.0}]
    rows += [peers | {"what": f"peer {k}", "value": None, "failed": "ImportError: no"} for k in range(70)]
    text = summary(rows)
    assert len(text.splitlines()) == 60
    assert "linears: kind 2, against bf16  256: 3.00  1024: 3.00  (median share 0.50)" in text
    assert "linears: kind 7: 1 cases failed, first: OutOfMemoryError" in text
    assert "lightrm w8a8: 5.0 pairs/s, 2.50 x transformers bf16" in text
    assert "peer 3: ImportError: no" in text
    assert slug("NVIDIA GeForce RTX 4090") == "geforce_rtx_4090"


def test_lengths_are_those_of_real_pairs() -> None:
    groups = read_groups()
    assert len(groups) == 256
    assert all(len(answers) == 2 and min(answers) > 0 for _, answers in groups)
    assert max(prompt + max(answers) for prompt, answers in groups) <= LONGEST
    assert len(read_groups(128)) == 128
