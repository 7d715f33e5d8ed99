"""End to end: lightrm and its peers on the same checkpoint, the same ids, in turn, in one run.

    python -m benchmarks.scoring DATA [--layers 2] [--rounds 5]        DATA holds pairs_dev.jsonl.gz

The checkpoint has the shape of LLaMA-7B or Baichuan-13B, random weights, and few layers, so that a round takes seconds;
every peer is a process of its own, asleep while another works, and its peak memory is its own; each round runs every
peer once, ratios are taken within a round, and the median of the rounds is reported. `error` is that of the scores
against float32, over their spread, on random weights: it compares kernels, and says nothing about real models.
Since lightrm computes a part of the last layer only, few layers flatter it: at two layers, by up to a half.
Writes results/scoring_cpu.json and the tables in the documents; on a CPU without VNNI results/scoring_without_vnni.json
and its own. For cards: benchmarks.gpu.
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

from benchmarks.peers import PEERS, READINGS
from benchmarks.record import ROOT, has_vnni, measured_on, provenance, quote, this_cpu, write_result
from lightrm.checkpoints.stored import write_safetensors

SHARING = ("lightrm w8a8, nothing shared", "llama.cpp Q8_0, prompt kept")  # for benchmarks.sharing
CEILING, TRUTH = "int8 products alone", "lightrm fp32"
RESULT, WITHOUT_VNNI = "scoring_cpu", "scoring_without_vnni"
SHORT = (16, 32, 64, 128)  # tokens: of these, reading the weights takes most of the time
BRIEFLY = (
    ("1 x 16", "1 x 128", "4 x 256", "1 x 2048"),
    ("lightrm w8a8", "lightrm w4a8", "lightrm bf16", "transformers bf16", "torchao int8, compiled",
     "OpenVINO int8", "ONNX Runtime int8", "llama.cpp Q8_0", "llama.cpp Q4_K_M"),
)  # fmt: skip
LONG, OF_LONG = "1 x 4096", ("lightrm w8a8", "lightrm w4a8", "lightrm bf16", "transformers bf16", CEILING)
SHAPES = {"7B": (4096, 11008, 32), "13B": (5120, 13696, 40)}  # width, ffn, heads
PACKAGES = (
    "torch", "numpy", "numba", "transformers", "bitsandbytes", "torchao", "llama_cpp_python",
    "openvino", "nncf", "onnxruntime",
)  # fmt: skip
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForSequenceClassification"], "model_type": "llama", "vocab_size": 4096,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "hidden_act": "silu", "num_labels": 1, "pad_token_id": 0,
}  # fmt: skip


def build(folder: Path, layers: int, vocabulary: int = CONFIG["vocab_size"], shape: str = "7B") -> None:
    """A checkpoint of few layers, random fp16 weights, one set for every layer."""
    generator = torch.Generator().manual_seed(0)
    width, ffn, heads = SHAPES[shape]

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).half()

    weights = {"model.embed_tokens.weight": normal(vocabulary, width, scale=1.0)}
    weights |= {"model.norm.weight": torch.ones(width).half(), "score.weight": normal(1, width, scale=width**-0.5)}
    shapes = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (ffn, width), "mlp.up_proj": (ffn, width), "mlp.down_proj": (width, ffn)}
    layer = {f"{name}.weight": normal(*s, scale=s[1] ** -0.5) for name, s in shapes.items()}
    layer |= {f"{norm}.weight": torch.ones(width).half() for norm in ("input_layernorm", "post_attention_layernorm")}
    for i in range(layers):
        weights |= {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()}
    write_safetensors(folder / "model.safetensors", weights)
    sizes = {"hidden_size": width, "intermediate_size": ffn, "num_attention_heads": heads, "num_key_value_heads": heads}
    config = CONFIG | sizes | {"num_hidden_layers": layers, "vocab_size": vocabulary}
    (folder / "config.json").write_text(json.dumps(config))


def real_lengths(data: Path, count: int) -> list[int]:
    """Tokens of prompt and answer together, of real pairs, zh and en, by the bundled model's tokenizer, cut at 512."""
    import lightrm
    from benchmarks.bundled_model import prompt_of, sample

    rm = lightrm.load("demo", max_length=512)
    records = sample(data / "pairs_dev.jsonl.gz", count)
    return [len(rm.encode([prompt_of(r)], [r["chosen"]])[0]) for r in records]


Groups = list[tuple[int, list[int]]]  # tokens of a prompt, and of each answer to it


class Peer:
    """A worker process; `ask` waits for its answer."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        command = [sys.executable, "-m", "benchmarks.peers", name, str(folder), str(torch.get_num_threads())]
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

    def ask(self, groups: Groups, seed: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"groups": groups, "seed": seed}) + "\n")
        self.process.stdin.flush()
        return self.answer() | {"kernel": self.kernel}


Loads = dict[str, list[int]]
Answers = dict[str, dict[str, list[dict[str, Any]]]]  # by workload and peer, one a round


def in_turn(names: list[str], folder: Path, loads: Loads, rounds: int, failed: dict[str, str]) -> Answers:
    """All peers at once in memory; in each round every one runs once. The first round warms up and is dropped.

    A short text is asked twice, and the second answer counts: whoever follows another finds its caches cold, and the
    other's threads still waiting on the cores for more work.
    """
    peers = []
    for name in names:
        try:
            peers.append(Peer(name, folder))
        except RuntimeError as error:  # a peer that cannot run is part of the result
            failed[name] = str(error)
    answers: Answers = {}
    for load, sizes in loads.items():
        answers[load] = {peer.name: [] for peer in peers}
        for k in range(rounds + 1):
            for peer in list(peers):
                if load == LONG and peer.name not in OF_LONG:
                    answers[load].pop(peer.name, None)
                    continue
                try:
                    for _ in range(2 if sum(sizes) <= max(SHORT) else 1):
                        answer = peer.ask([(0, sizes)], seed=1)
                except RuntimeError as error:
                    failed[peer.name] = f"{load}: {error}"
                    peers.remove(peer)
                    del answers[load][peer.name]
                    continue
                if k:
                    answers[load][peer.name].append(answer)
        print(load, {name: statistics.median(a["seconds"] for a in found) for name, found in answers[load].items()})
    for peer in peers:
        peer.process.kill()
    return answers


def measure(data: Path, shape: str, layers: int, rounds: int, names: list[str], wanted: list[str]) -> dict[str, Any]:
    lengths = real_lengths(data, 12)
    loads = {
        **{f"1 x {tokens}": [tokens] for tokens in SHORT},
        "4 x 256": [256] * 4,
        "8 x 256": [256] * 8,
        "2 x 1024": [1024] * 2,
        "1 x 2048": [2048],
        "1 x 4096": [4096],
        "real mix": lengths,
    }
    loads = {name: load for name, load in loads.items() if name in wanted or not wanted}
    result: dict[str, Any] = {**provenance(available(PACKAGES)), "shape": shape, "layers": layers, "rounds": rounds}
    result |= {**this_cpu(), "real lengths": lengths}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), layers, shape=shape)
        answers = in_turn(names, Path(folder), loads, rounds, failed)
    result["workloads"] = {load: summary(loads[load], answers[load]) for load in loads}
    return result | {"failed": failed}


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


def summary(sizes: list[int], answers: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    truth = np.array(answers[TRUTH][-1]["scores"]) if TRUTH in answers else None
    runs = {name: [answer["seconds"] for answer in found] for name, found in answers.items()}
    rows = {}
    for name, seconds in runs.items():
        against = {
            other: statistics.median(b / a for a, b in zip(seconds, runs[other], strict=True))
            for other in ("lightrm w8a8", CEILING, "transformers fp32", "transformers bf16")
            if other in runs
        }
        last = answers[name][-1]
        error = None
        if truth is not None and len(sizes) > 1 and name not in (CEILING, *READINGS):
            error = float(np.sqrt(np.mean((np.array(last["scores"]) - truth) ** 2)) / max(truth.std(), 1e-9))
        rows[name] = {
            "tokens/s": sum(sizes) / statistics.median(seconds),
            "pairs/s": len(sizes) / statistics.median(seconds),
            "speed against": against,
            "peak memory": last["peak"],
            "error": error,
            "kernel": last["kernel"],
        }
    return rows


def table(result: dict[str, Any], kernels: bool = True) -> str:
    """Speed of each scorer over lightrm's w8a8 in the same round, by workload; memory and error from the last."""
    loads = result["workloads"]
    rows = {name: row for found in loads.values() for name, row in found.items()}  # of the last load that has it
    titles = [f"{load} tokens" if " x " in load else load for load in loads]
    lines = [
        f"| | {' | '.join(titles)} | peak memory | error |{' kernel |' * kernels}",
        f"| --- |{' ---: |' * len(loads)} ---: | ---: |{' --- |' * kernels}",
    ]
    for name, row in rows.items():
        found = [rows.get(name) for rows in loads.values()]
        cells = ["-" if one is None else f"{one['speed against']['lightrm w8a8']:.2f}" for one in found]
        peak = "-" if row["peak memory"] is None else f"{row['peak memory'] / 2**30:.1f} GiB"
        errors = [one["error"] for one in found if one is not None and one["error"] is not None]
        error = f"{100 * errors[-1]:.1f} %" if errors else "-"
        lines.append(f"| {name} | {' | '.join(cells)} | {peak} | {error} |" + f" {row['kernel']} |" * kernels)
    absolute = ", ".join(f"{rows['lightrm w8a8']['tokens/s']:.0f} ({load})" for load, rows in loads.items())
    lines.append(f"\nw8a8 alone, tokens/s of {result['layers']} layers: {absolute}. {measured_on(result)}")
    for error in dict.fromkeys(result["failed"].values()):
        names = [name for name, why in result["failed"].items() if why == error]
        lines[-1] += f" Not measured: {', '.join(names)} ({error})."
    return "\n".join(lines) + "\n"


def short_table(result: dict[str, Any]) -> str:
    """The same for a reader in a hurry: the loads and the rows of `BRIEFLY`."""
    kept = {load: found for load, found in result["workloads"].items() if load in BRIEFLY[0]}
    rows = {load: {name: row for name, row in found.items() if name in BRIEFLY[1]} for load, found in kept.items()}
    return table(result | {"workloads": rows, "failed": {}}, kernels=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--shape", choices=list(SHAPES), default="7B")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=None, help="names of peers")
    parser.add_argument("--loads", nargs="*", default=[], help="workloads, all if none is named")
    parser.add_argument("--dry", action="store_true", help="print, write nothing")
    arguments = parser.parse_args()
    names = arguments.only or [name for name in PEERS if name not in SHARING]
    result = measure(arguments.data, arguments.shape, arguments.layers, arguments.rounds, names, arguments.loads)
    print(table(result))
    if arguments.dry:
        return
    if has_vnni():
        write_result(RESULT, result)
        quote(RESULT, table)
        quote(RESULT, short_table, block="scoring_short")
    else:
        write_result(WITHOUT_VNNI, result)
        quote(WITHOUT_VNNI, table)


if __name__ == "__main__":
    main()
