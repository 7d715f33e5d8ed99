"""Models larger than the memory: speed of streamed layers against resident ones, and the memory that they really take.

    python -m benchmarks.streaming [--layers 4] [--rounds 2] [--most 131072]

A checkpoint of LLaMA-7B's layer shapes, fp16 on disk and in the system's file cache, scored from its own files as bf16,
or as fp32 where the CPU has no bfloat16, and as w8a8 from a folder of `lightrm quantize`. Each run is a process of its
own; resident and streamed runs take turns, and `speed` is the median of their ratios. `reading` is the time to make all
layers with nothing beside, as a share of the resident run: below 100 % it can hide behind the computing, which is the
ceiling of streaming. `peak` is the largest resident memory of the process, `bound` what `lightrm plan` says of it.
Windows of more than LARGE tokens run once.

Two models of one base: two checkpoints of Baichuan-13B's layout and shape that differ in W_pack and head, the second
loaded beside the first. Linux only, for it reads /proc. Writes results/streaming.json and the table in the documents.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import lightrm
from benchmarks.record import ROOT, measured_on, multiplies_bfloat16, provenance, quote, this_cpu, write_result
from benchmarks.scoring import build
from lightrm.checkpoints.stored import write_safetensors

FLOAT = "bf16" if multiplies_bfloat16() else "fp32"
RESULT, LARGE, LENGTH = "streaming", 16384, 1024
WINDOWS = {"w8a8": (4096, 16384, 65536, 131072), FLOAT: (4096, 16384)}  # of itself, lightrm takes 32768
WORKER = f"""
import json, sys, time
import numpy as np, torch
import lightrm, lightrm.loading.sources
from lightrm.engine.memory import overhead
from lightrm.engine.residence import Residence, streamed_bytes
from benchmarks.peers import peak_memory
folder, scheme, window, streamed = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "streamed"
real = lightrm.loading.sources.choose_residence
def chosen(a, scheme, device, room, *rest):
    if not streamed:
        return real(a, scheme, device, room, 2048)
    bound = streamed_bytes(a, scheme, 2048, window) + overhead(device)
    return Residence(2048, window, 2**40, bound, "of the benchmark")
lightrm.loading.sources.choose_residence = chosen
rm = lightrm.load(folder, scheme=scheme, device="cpu")
ids = np.random.default_rng(0).integers(3, 4096, (window // {LENGTH}, {LENGTH}))
rm.score_ids([row[:64] for row in ids[:2]])
started = time.perf_counter()
scores = rm.score_ids(list(ids))
found = {{"seconds": time.perf_counter() - started, "peak": peak_memory(), "scores": scores.tolist()}}
if streamed:
    started = time.perf_counter()
    for i in range(len(rm.engine.decoder.layers)):
        layer = rm.engine.decoder.layers.make(i)
        del layer
    found |= {{"reading": time.perf_counter() - started, "bound": rm.engine.residence.bytes}}
print(json.dumps(found))
"""
TWINS = """
import json, sys
import lightrm
from benchmarks.peers import peak_memory
first = lightrm.load(sys.argv[1], scheme=sys.argv[3])
before = peak_memory()
second = lightrm.load(sys.argv[2], scheme=sys.argv[3], beside=first if sys.argv[4] == "beside" else None)
ids = [[5] * 40, [9] * 30]
print(json.dumps({"held": second.report.bytes, "shared": second.report.shared, "grown": peak_memory() - before,
                   "scores": [model.score_ids(ids).tolist() for model in (first, second)]}))
"""


def worker(program: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{arguments}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def windows(folder: Path, scheme: str, rounds: int, most: int) -> list[dict[str, Any]]:
    found = []
    for window in (tokens for tokens in WINDOWS[scheme] if tokens <= most):
        runs = []
        for _ in range(rounds if window <= LARGE else 1):
            resident, streamed = (worker(WORKER, str(folder), scheme, str(window), m) for m in ("resident", "streamed"))
            assert resident.pop("scores") == streamed.pop("scores"), "streaming changed a score"
            assert streamed["peak"] <= streamed["bound"], f"{streamed} takes more than `lightrm plan` says"
            runs.append((resident, streamed))
        found.append(
            {
                "scheme": scheme,
                "window": window,
                "runs": len(runs),
                "speed": statistics.median(r["seconds"] / s["seconds"] for r, s in runs),
                "reading": statistics.median(s["reading"] / r["seconds"] for r, s in runs),
                "peak": max(s["peak"] for _, s in runs),
                "bound": runs[0][1]["bound"],
                "resident peak": max(r["peak"] for r, _ in runs),
                "tokens/s": statistics.median(window / s["seconds"] for _, s in runs),
            }
        )
        print(found[-1], flush=True)
    return found


def baichuan(source: Path, folder: Path, seed: int) -> None:
    """The same weights in Baichuan-13B's layout; W_pack and head follow the seed."""
    folder.mkdir()
    weights, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    generator = torch.Generator().manual_seed(seed)
    made = {n: w for n, w in weights.items() if n.split(".")[-2] not in ("q_proj", "k_proj", "v_proj", "score")}
    width = config["hidden_size"]
    for i in range(config["num_hidden_layers"]):
        pack = torch.randn(3 * width, width, generator=generator) * width**-0.5
        made[f"model.layers.{i}.self_attn.W_pack.weight"] = pack.half()
    made["v_head.summary.weight"] = torch.randn(1, width, generator=generator).half()
    made["v_head.summary.bias"] = torch.zeros(1).half()
    write_safetensors(folder / "model.safetensors", made)
    config = {name: value for name, value in config.items() if name not in ("num_key_value_heads", "architectures")}
    config |= {"model_type": "baichuan", "model_max_length": config.pop("max_position_embeddings")}
    (folder / "config.json").write_text(json.dumps(config))


def twins(root: Path, layers: int) -> list[dict[str, Any]]:
    plain, folders = root / "13B", [root / "helpful", root / "safe"]
    plain.mkdir()
    build(plain, layers, shape="13B")
    for seed, folder in enumerate(folders):
        baichuan(plain, folder, seed)
    found = []
    for scheme in ("bf16", "w8a8"):
        alone, beside = (worker(TWINS, *map(str, folders), scheme, mode) for mode in ("alone", "beside"))
        assert alone["scores"] == beside["scores"], "sharing changed a score"
        found.append({"scheme": scheme, "alone": alone["grown"], "beside": beside["grown"]} | beside)
        del found[-1]["scores"]
        print(found[-1], flush=True)
    return found


def table(result: dict[str, Any]) -> str:
    lines = [
        "| scheme | tokens of a window | speed of resident | reading alone | peak memory | bound | resident's peak |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["windows"]:
        sizes = " | ".join(f"{row[name] / 2**30:.2f} GiB" for name in ("peak", "bound", "resident peak"))
        lines.append(
            f"| {row['scheme']} | {row['window']} | {row['speed']:.2f} | {100 * row['reading']:.0f} % | {sizes} |"
        )
    lines.append("")
    for row in result["twins"]:
        lines.append(
            f"Two models of Baichuan-13B's shape ({result['twin layers']} layers) that differ in W_pack and head, "
            f"{row['scheme']}: the second is {row['held'] / 2**20:.0f} MiB, {row['shared'] / 2**20:.0f} MiB of it the "
            "first's."
        )
    lines += ["", measured_on(result)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--most", type=int, default=131072, help="tokens of the largest window")
    arguments = parser.parse_args()
    result: dict[str, Any] = {**provenance(("torch", "numpy", "numba")), "layers": arguments.layers}
    result |= {**this_cpu(), "twin layers": 2}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        result["twins"] = twins(root, result["twin layers"])
        for folder in root.iterdir():
            shutil.rmtree(folder)
        plain, own = root / "plain", root / "own"
        plain.mkdir()
        build(plain, arguments.layers)
        rm = lightrm.load(plain, scheme="w8a8", device="cpu")
        rm.save(own)
        del rm
        result["windows"] = [
            *windows(own, "w8a8", arguments.rounds, arguments.most),
            *windows(plain, FLOAT, arguments.rounds, arguments.most),
        ]
    write_result(RESULT, result)
    quote(RESULT, table)


if __name__ == "__main__":
    main()
