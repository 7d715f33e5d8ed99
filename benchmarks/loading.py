"""Loading: time and peak memory by scheme and source format, each in a process of its own.

    python -m benchmarks.loading [--layers 4]

The checkpoint has LLaMA-7B's layer shapes and vocabulary, and random weights. `peak` is the growth of the process's
resident memory during the load, over the bytes of the model as held; the bound is 1.5 x the largest tensor of the file.
A native folder is mapped: what it grows by is the file itself. `scoring` is the peak while 2048 tokens are scored, and
`planned` what `lightrm plan` says of weights and activations. Linux only, for it reads /proc.
Writes results/loading.json and prints a table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.record import ROOT, measured_on, provenance, quote, read_result, write_result
from benchmarks.scoring import build

SCHEMES = ("fp32", "bf16", "w8a8", "w4a8", "nf4", "bnb-int8")
VOCABULARY = 32000
WORKER = """
import ctypes, json, sys, time
import lightrm
from lightrm.engine.memory import activation_bytes, weight_bytes
lightrm.load("demo", scheme=sys.argv[2]).score_ids([[k] * 256 for k in range(5, 13)])
def settle():  # give freed memory back, and let the peak start from here; its value
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")
    return peak()
def peak():  # of this process alone: ru_maxrss would start at what the parent had in memory
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = settle()
started = time.perf_counter()
rm = lightrm.load(sys.argv[1], scheme=sys.argv[2])
found = {"seconds": time.perf_counter() - started, "grown": peak() - before, "held": rm.report.bytes}
settle()
rm.score_ids([[k] * 256 for k in range(5, 13)])
a = rm.engine.architecture
planned = weight_bytes(a, rm.report.scheme) + activation_bytes(a, rm.report.scheme, 2048)
print(json.dumps({**found, "scoring": peak() - before, "planned": planned}))
"""


def sources(root: Path, layers: int) -> dict[str, Path]:
    """The same weights as fp16 and fp32 safetensors and as fp16 pickles."""
    folders = {name: root / name for name in ("fp16 safetensors", "fp32 safetensors", "fp16 .bin")}
    for folder in folders.values():
        folder.mkdir()
    build(folders["fp16 safetensors"], layers, VOCABULARY)
    weights = load_file(folders["fp16 safetensors"] / "model.safetensors")
    save_file({n: t.float() for n, t in weights.items()}, folders["fp32 safetensors"] / "model.safetensors")
    torch.save(weights, folders["fp16 .bin"] / "pytorch_model.bin")
    for name in ("fp32 safetensors", "fp16 .bin"):
        shutil.copy(folders["fp16 safetensors"] / "config.json", folders[name] / "config.json")
    return folders


def run(folder: Path, scheme: str) -> dict[str, Any]:
    command = [sys.executable, "-c", WORKER, str(folder), scheme]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)


def measure(layers: int) -> dict[str, Any]:
    rows = []
    with tempfile.TemporaryDirectory() as root:
        for source, folder in sources(Path(root), layers).items():
            largest = VOCABULARY * 4096 * (4 if source.startswith("fp32") else 2)
            for scheme in SCHEMES:
                rows.append({"source": source, "scheme": scheme, "largest": largest, **run(folder, scheme)})
                print(rows[-1], flush=True)
        for scheme in ("w8a8", "w4a8"):
            target, folder = Path(root) / f"native {scheme}", Path(root) / "fp16 safetensors"
            enter = "from lightrm.cli import main; main()"
            command = [sys.executable, "-c", enter, "quantize", str(folder), str(target), "--scheme", scheme]
            subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
            rows.append({"source": "native folder", "scheme": scheme, "largest": 0, **run(target, scheme)})
            print(rows[-1], flush=True)
    return {**provenance(), "layers": layers, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """Times as ratios: to bf16's from the same source, or of mapping a folder to quantizing again."""
    rows = result["rows"]
    seconds = {(r["source"], r["scheme"]): r["seconds"] for r in rows}
    lines = ["| source | scheme | time | held | peak over held | bound | scoring 2048 tokens | planned |"]
    lines.append("| --- | --- |" + " ---: |" * 6)
    for r in rows:
        native = r["source"] == "native folder"
        again = seconds["fp16 safetensors", r["scheme"]]
        time = f"1/{again / r['seconds']:.0f} of quantizing" if native else ratio(r, seconds)
        bound = "-" if native else f"{1.5 * r['largest'] / 2**20:.0f} MiB"
        cells = [f"{size / 2**20:.0f} MiB" for size in (r["held"], r["grown"] - r["held"])]
        cells += [bound, *(f"{r[name] / 2**20:.0f} MiB" for name in ("scoring", "planned"))]
        lines.append(f"| {r['source']} | {r['scheme']} | {time} | {' | '.join(cells)} |")
    lines += ["", measured_on(result)]
    return "\n".join(lines) + "\n"


def ratio(row: dict[str, Any], seconds: dict[tuple[str, str], float]) -> str:
    return f"{row['seconds'] / seconds[row['source'], 'bf16']:.1f} x bf16"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    write_result("loading", measure(arguments.layers))
    quote("loading", table)
    print(table(read_result("loading")))


if __name__ == "__main__":
    main()
