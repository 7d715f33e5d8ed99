"""End to end: lightrm and its peers on the same checkpoint, the same ids, in turn, in one run.

    python -m benchmarks.scoring DATA [--layers 2] [--rounds 5]      DATA holds pairs_dev.jsonl.gz

On a CPU: layers of LLaMA-7B's shape with random weights, so that a round takes seconds; every peer is a process of its
own, asleep while another works, and its peak memory is its own. Each round runs every peer once; ratios are taken
within a round, and the median of the rounds is reported. `error` is that of the scores against float32, over their
spread, on random weights: it compares kernels, and says nothing about real models.
Writes results/scoring_cpu.json and the table of the README.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.peers import PEERS
from benchmarks.record import ROOT, provenance, read_result, with_table, write_result
from training.records import read_jsonl

CEILING, TRUTH = "int8 GEMMs alone", "lightrm fp32"
PACKAGES = (
    "torch", "numpy", "numba", "transformers", "bitsandbytes", "torchao", "llama_cpp_python",
)  # fmt: skip
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForSequenceClassification"], "model_type": "llama", "vocab_size": 4096,
    "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "hidden_act": "silu", "num_labels": 1, "pad_token_id": 0,
}  # fmt: skip


def build(folder: Path, layers: int, vocabulary: int = CONFIG["vocab_size"]) -> None:
    """A checkpoint of LLaMA-7B's shape with few layers and random fp16 weights."""
    generator = torch.Generator().manual_seed(0)
    width, ffn = CONFIG["hidden_size"], CONFIG["intermediate_size"]

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).half()

    weights = {"model.embed_tokens.weight": normal(vocabulary, width, scale=1.0)}
    weights |= {"model.norm.weight": torch.ones(width).half(), "score.weight": normal(1, width, scale=width**-0.5)}
    shapes = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (ffn, width), "mlp.up_proj": (ffn, width), "mlp.down_proj": (width, ffn)}
    for i in range(layers):
        prefix = f"model.layers.{i}."
        weights |= {f"{prefix}{name}.weight": normal(*s, scale=s[1] ** -0.5) for name, s in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{norm}.weight"] = torch.ones(width).half()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers, "vocab_size": vocabulary}))


def real_lengths(data: Path, count: int) -> list[int]:
    """Tokens of prompt and answer together, of real pairs, zh and en, by the bundled model's tokenizer, cut at 1024."""
    import lightrm
    from benchmarks.bundled_model import prompt_of

    rm = lightrm.load("demo", max_length=512)
    records = read_jsonl(data / "pairs_dev.jsonl.gz")
    return [len(rm.encode_one(prompt_of(r), r["chosen"]).token_ids) for r in records[:: len(records) // count]][:count]


class Peer:
    """A worker process; `ask` waits for its answer."""

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        self.name = name
        command = [sys.executable, "-m", "benchmarks.peers", name, str(folder), str(threads)]
        pipe = subprocess.PIPE
        # Not a pipe: one that nobody reads would fill and stop the peer.
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True, cwd=ROOT)
        self.kernel = self.answer()["kernel"]

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        self.errors.seek(0)
        said = self.errors.read().strip().splitlines()
        raise RuntimeError(f"exit status {self.process.wait()}" + (f", {said[-1][:200]}" if said else ""))

    def ask(self, lengths: list[int], seed: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"lengths": lengths, "seed": seed}) + "\n")
        self.process.stdin.flush()
        return self.answer()


def measure(data: Path, layers: int, rounds: int, names: list[str], wanted: list[str]) -> dict[str, Any]:
    threads = torch.get_num_threads()
    lengths = real_lengths(data, 24)
    loads = {
        "4 x 256": ([256] * 4, rounds),
        "8 x 256": ([256] * 8, rounds),
        "2 x 1024": ([1024] * 2, rounds),
        "1 x 2048": ([2048], rounds),
        "real mix": (lengths, rounds),
    }
    loads = {name: load for name, load in loads.items() if name in wanted or not wanted}
    result: dict[str, Any] = {**provenance(), "layers": layers, "threads": threads, "rounds": rounds}
    result |= {"cpu": torch.backends.cpu.get_cpu_capability(), "real lengths": lengths, "workloads": {}, "failed": {}}
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), layers)
        peers = []
        for name in names:
            try:
                peers.append(Peer(name, Path(folder), threads))
            except RuntimeError as error:  # a peer that cannot run is part of the result
                result["failed"][name] = str(error)
                print(f"{name}: {error}", file=sys.stderr)
        for load, (sizes, count) in loads.items():
            runs: dict[str, list[float]] = {peer.name: [] for peer in peers}
            last: dict[str, dict[str, Any]] = {}
            for k in range(count + 1):  # the first warms up
                for peer in list(peers):
                    try:
                        last[peer.name] = peer.ask(sizes, seed=1)
                    except RuntimeError as error:
                        result["failed"][peer.name] = f"{load}: {error}"
                        peers.remove(peer)
                        runs.pop(peer.name)
                        print(f"{peer.name}, {load}: {error}", file=sys.stderr)
                        continue
                    if k:
                        runs[peer.name].append(last[peer.name]["seconds"])
            result["workloads"][load] = summary(sizes, runs, last, {peer.name: peer.kernel for peer in peers})
            print(table(result), flush=True)
        for peer in peers:
            peer.process.kill()
    return result | {"versions": provenance(available(PACKAGES))["versions"]}


def available(packages: tuple[str, ...]) -> tuple[str, ...]:
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in packages:
        try:
            version(name)
        except PackageNotFoundError:
            continue
        found.append(name)
    return tuple(found)


def summary(sizes: list[int], runs: dict, last: dict, kernels: dict) -> dict[str, Any]:
    truth = np.array(last[TRUTH]["scores"])
    rows = {}
    for name, seconds in runs.items():
        against = {
            other: statistics.median(b / a for a, b in zip(seconds, runs[other], strict=True))
            for other in ("lightrm w8a8", CEILING, "transformers fp32", "transformers bf16")
            if other in runs
        }
        error = float(np.sqrt(np.mean((np.array(last[name]["scores"]) - truth) ** 2)) / max(truth.std(), 1e-9))
        rows[name] = {
            "tokens/s": sum(sizes) / statistics.median(seconds),
            "pairs/s": len(sizes) / statistics.median(seconds),
            "speed against": against,
            "peak memory": last[name]["peak"],
            "error": None if name == CEILING or len(sizes) == 1 else error,
            "kernel": kernels[name],
        }
    return rows


def table(result: dict[str, Any]) -> str:
    """Speed of each scorer over lightrm's w8a8 in the same round, by workload; memory and error from the first."""
    loads = result["workloads"]
    first = next(iter(loads.values()))
    titles = [f"{load} tokens" if "x" in load else load for load in loads]
    lines = [
        f"| | {' | '.join(titles)} | peak memory | error | kernel |",
        f"| --- |{' ---: |' * len(loads)} ---: | ---: | --- |",
    ]
    for name, row in first.items():
        cells = [f"{rows[name]['speed against']['lightrm w8a8']:.2f}" for rows in loads.values()]
        peak = "-" if row["peak memory"] is None else f"{row['peak memory'] / 2**30:.1f} GiB"
        error = "-" if row["error"] is None else f"{100 * row['error']:.1f} %"
        lines.append(f"| {name} | {' | '.join(cells)} | {peak} | {error} | {row['kernel']} |")
    absolute = ", ".join(f"{rows['lightrm w8a8']['tokens/s']:.0f} ({load})" for load, rows in loads.items())
    lines.append(f"\nw8a8 alone, tokens/s of {result['layers']} layers: {absolute}.")
    for name, error in result["failed"].items():
        lines.append(f"Not measured: {name}: {error}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=list(PEERS), help="names of peers")
    parser.add_argument("--loads", nargs="*", default=[], help="workloads, all if none is named")
    parser.add_argument("--dry", action="store_true", help="print, write nothing")
    arguments = parser.parse_args()
    result = measure(arguments.data, arguments.layers, arguments.rounds, arguments.only, arguments.loads)
    if not arguments.dry:
        write_result("scoring_cpu", result)
        readme = ROOT / "README.md"
        quoted = with_table(readme.read_text(encoding="utf-8"), "scoring_cpu", table(read_result("scoring_cpu")))
        readme.write_text(quoted, encoding="utf-8")


if __name__ == "__main__":
    main()
