"""From `load` to the first score, in a fresh process: kernels compiled ahead, by numba, and from numba's cache.

    python -m benchmarks.first_score [--rounds 5]

The bundled model in w8a8 on a CPU; every process is new, and imports PyTorch and transformers before the clock starts.
"by numba" begins with an empty cache, "from numba's cache" with the one that was filled so. Each round runs all in
turn; medians. Writes results/first_score.json and the table in the documents.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.record import ROOT, measured_on, provenance, quote, this_cpu, write_result

AHEAD, BY_NUMBA, CACHED = "compiled ahead", "compiled by numba", "from numba's cache"
WAYS = (AHEAD, BY_NUMBA, CACHED)  # in this order: the last one finds what the second left
PROGRAM = """
import json, sys, time
import torch, transformers
if sys.argv[1] != "compiled ahead":
    from pathlib import Path
    from lightrm.kernels.cpu import objects
    objects.FOLDER = Path("nowhere")
started = time.perf_counter()
import lightrm
rm = lightrm.load("demo", scheme="w8a8", device="cpu")
loaded = time.perf_counter()
rm.score("What is tea?", ["A drink of leaves in hot water.", "Tea tea tea."])
first = time.perf_counter()
rm.score("What is rain?", ["Water that falls from clouds.", "Rain rain rain."])
now = time.perf_counter()
print(json.dumps({"load": loaded - started, "first score": first - loaded, "next score": now - first,
                  "kernels": rm.report.kernels.name}))
"""


def run(way: str, cache: str) -> dict[str, Any]:
    environment = os.environ | {"NUMBA_CACHE_DIR": cache}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, way], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert (found["kernels"] == "numba, compiled ahead") == (way == AHEAD), found["kernels"]
    return found


def measure(rounds: int) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            for way in WAYS:
                runs[way].append(run(way, cache))
                print(way, runs[way][-1], flush=True)
    parts = ("load", "first score", "next score")
    return {way: {part: statistics.median(one[part] for one in found) for part in parts} for way, found in runs.items()}


def table(result: dict[str, Any]) -> str:
    lines = ["| kernels | load | first score | next score |", "| --- | ---: | ---: | ---: |"]
    for way, row in result["ways"].items():
        lines.append(f"| {way} | {row['load']:.2f} s | {row['first score']:.2f} s | {row['next score']:.3f} s |")
    return "\n".join(lines) + f"\n\nMedians of {result['rounds']} runs. {measured_on(result)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    ways = measure(rounds)
    write_result("first_score", {**provenance(("torch", "numba")), **this_cpu(), "rounds": rounds, "ways": ways})
    quote("first_score", table)


if __name__ == "__main__":
    main()
