"""How long calibration takes, and what memory: one layer of LLaMA-7B's shape, and 32 times that.

    python -m benchmarks.calibration [--schemes w8a8 w4a8] [--tokens 16384]

Each scheme in a process of its own (`calibration_worker`); random weights and ids, whose values do not matter for time.
Writes results/calibration.json and the table in the documents.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import ROOT, measured_on, provenance, quote, this_cpu, write_result
from benchmarks.scoring import SHAPES, build

LAYERS = 32
WORKER = Path(__file__).with_name("calibration_worker.py")


def measure(schemes: list[str], tokens: int) -> dict[str, Any]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), 1)
        (Path(folder) / "warm-up").mkdir()
        SHAPES["small"] = (256, 768, 2)
        build(Path(folder) / "warm-up", 1, shape="small")
        for scheme in schemes:
            command = [sys.executable, str(WORKER), folder, scheme, str(tokens), str(torch.get_num_threads())]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            found[scheme] = json.loads(done.stdout.splitlines()[-1])
            print(scheme, found[scheme], flush=True)
    return found


def table(result: dict[str, Any]) -> str:
    lines = [
        "| scheme | CPU seconds of a layer, over threads | by step | 32 layers | peak memory beside the weights |",
        "| --- | ---: | --- | ---: | ---: |",
    ]
    for scheme, row in result["schemes"].items():
        whole = sum(row["seconds"].values())
        steps = ", ".join(f"{step} {seconds:.0f}" for step, seconds in row["seconds"].items())
        memory = f"{row['peak'] / 2**30:.1f} GiB"
        lines.append(f"| {scheme}+cal | {whole:.0f} | {steps} | {LAYERS * whole / 60:.0f} min | {memory} |")
    return "\n".join(lines) + f"\n\n{result['tokens']} tokens. {measured_on(result)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="*", default=["w8a8", "w4a8"])
    parser.add_argument("--tokens", type=int, default=16384)
    arguments = parser.parse_args()
    found = measure(arguments.schemes, arguments.tokens)
    versions = provenance(("torch", "numpy", "numba"))
    write_result("calibration", {**versions, **this_cpu(), "tokens": arguments.tokens, "schemes": found})
    quote("calibration", table)


if __name__ == "__main__":
    main()
