"""n answers to one prompt, and a whole evaluation pass: what sharing prompts is worth, against the ideal and peers.

    python -m benchmarks.sharing DATA TOKENIZER [--rounds 3] [--every 32]

DATA holds pairs_dev.jsonl.gz and lists_dev.jsonl.gz, TOKENIZER is LLaMA's sentencepiece model. Peers, rounds and
ratios as in benchmarks.scoring.

The grid: n answers of R tokens to a prompt of P. Unshared work is n(P + R) tokens, shared work P + nR; the ideal
speed-up is their ratio, and that of the same engine with sharing switched off is reported beside it.

The pass: every pair and list, or every k-th, each answer scored once. It is timed on 2 and on 4 layers; their
difference is two whole layers, from which the time of 32 follows: lightrm computes only a part of the last layer, which
would flatter it in a model of few. "beside the model" is the time of text to ids to packs over that of 32 layers.
Writes results/sharing_cpu.json and the README's table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.bundled_model import prompt_of
from benchmarks.record import ROOT, provenance, read_result, with_table, write_result
from benchmarks.scoring import PACKAGES, Groups, Peer, available, build
from training.records import read_jsonl

RESULT = "sharing_cpu"
OURS, ALONE, PADDED, KEPT = (
    "lightrm w8a8", "lightrm w8a8, nothing shared", "transformers bf16", "llama.cpp Q8_0, prompt kept",
)  # fmt: skip
LENGTHS = ((1000, 100), (300, 300), (100, 400))
ANSWERS = (1, 2, 4, 8, 16, 64)
WITH_PEERS = (1, 4, 16)  # values of n that the slower peers are measured at
LAYERS, WHOLE = (2, 4), 32
LONGEST = 2048


def real_groups(data: Path, tokenizer: Path, every: int) -> Groups:
    """[prompt, answers] in tokens: pairs and lists, zh and en, every k-th record; a sequence is cut at LONGEST."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    found = []
    for record in [*read_jsonl(data / "pairs_dev.jsonl.gz"), *read_jsonl(data / "lists_dev.jsonl.gz")][::every]:
        answers = record["responses"] if "responses" in record else [record["chosen"], record["rejected"]]
        prompt = min(len(model.encode(record["prompt"])), LONGEST - 100)
        found.append((prompt, [min(max(1, len(model.encode(text))), LONGEST - prompt) for text in answers]))
    return found


def ideal(groups: Groups) -> float:
    """Tokens in all over distinct ones."""
    return tokens(groups) / sum(prompt + sum(answers) for prompt, answers in groups)


def tokens(groups: Groups) -> int:
    return sum(prompt + answer for prompt, answers in groups for answer in answers)


def seconds(folder: Path, loads: dict[str, tuple[Groups, list[str]]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """By load and peer, one a round, all peers in turn; equal scores are checked on the way."""
    names = list(dict.fromkeys(name for _, wanted in loads.values() for name in wanted))
    peers = {name: Peer(name, folder) for name in names}
    for peer in peers.values():
        peer.ask([(20, [20, 30]), (0, [300])], seed=0)
    found: dict[str, dict[str, list[float]]] = {}
    for load, (groups, wanted) in loads.items():
        found[load] = {name: [] for name in wanted}
        for _ in range(rounds):
            answers = {name: peers[name].ask(groups, seed=1) for name in wanted}
            if ALONE in answers:
                assert answers[OURS]["scores"] == answers[ALONE]["scores"], "sharing changed a score"
            for name, answer in answers.items():
                found[load][name].append(answer["seconds"])
        print(load, {name: round(statistics.median(times), 2) for name, times in found[load].items()}, flush=True)
    for peer in peers.values():
        peer.process.kill()
    return found


def faster(times: dict[str, list[float]], name: str) -> float | None:
    """How many times quicker than a peer we are, by the median of the rounds."""
    if name not in times:
        return None
    return statistics.median(b / a for a, b in zip(times[OURS], times[name], strict=True))


def grid(rounds: int) -> list[dict[str, Any]]:
    loads: dict[str, tuple[Groups, list[str]]] = {}
    for prompt, answer in LENGTHS:
        for n in ANSWERS:
            peers = [OURS, ALONE, *([PADDED, KEPT] if n in WITH_PEERS else [])]
            loads[f"{prompt}/{answer} x {n}"] = [(prompt, [answer] * n)], peers
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), LAYERS[0])
        found = seconds(Path(folder), loads, rounds)
    return [
        {
            "load": load,
            "ideal": ideal(groups),
            **{name: faster(found[load], name) for name in (ALONE, PADDED, KEPT)},
            "seconds": {name: statistics.median(times) for name, times in found[load].items()},
        }
        for load, (groups, _) in loads.items()
    ]


def evaluation(groups: Groups, rounds: int) -> dict[str, Any]:
    """The pass, by the time of 32 layers that two depths imply."""
    names, by_depth = [OURS, ALONE, PADDED], []
    for layers in LAYERS:
        with tempfile.TemporaryDirectory() as folder:
            build(Path(folder), layers)
            by_depth.append(seconds(Path(folder), {"pass": (groups, names)}, rounds)["pass"])
    few, many = by_depth
    more = (WHOLE - LAYERS[0]) / (LAYERS[1] - LAYERS[0])
    whole = {name: [a + more * (b - a) for a, b in zip(few[name], many[name], strict=True)] for name in names}
    return {
        "sequences": sum(len(answers) for _, answers in groups),
        "tokens": tokens(groups),
        "ideal": ideal(groups),
        "seconds of 32 layers": {name: statistics.median(times) for name, times in whole.items()},
        "seconds": {str(layers): found for layers, found in zip(LAYERS, by_depth, strict=True)},
        "faster than": {name: faster(whole, name) for name in names[1:]},
    }


def beside_the_model(data: Path, every: int) -> float:
    """Seconds from text to packs of the same records, by the bundled model's tokenizer and template."""
    import lightrm
    from lightrm.prefixes import packs

    rm = lightrm.load("demo", max_length=512)
    records = [*read_jsonl(data / "pairs_dev.jsonl.gz"), *read_jsonl(data / "lists_dev.jsonl.gz")][::every]
    pairs = [(prompt_of(r), text) for r in records for text in r.get("responses") or [r["chosen"], r["rejected"]]]
    started = time.perf_counter()
    ids = [rm.encode_one(prompt, text).token_ids for prompt, text in pairs]
    for _ in packs(ids, 8192):
        pass
    return time.perf_counter() - started


def table(result: dict[str, Any]) -> str:
    """Speed-up over each other way, in the same round."""
    lines = [
        "| prompt / answer tokens x answers | ideal | over itself, nothing shared | of the ideal "
        "| over transformers bf16 | over llama.cpp Q8_0, prompt kept |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["grid"]:
        own, most = row[ALONE], row["ideal"]
        cells = [f"{most:.2f}", f"{own:.2f}", f"{100 * own / most:.0f} %"]
        cells += ["-" if row[name] is None else f"{row[name]:.2f}" for name in (PADDED, KEPT)]
        lines.append(f"| {row['load']} | {' | '.join(cells)} |")
    whole = result["pass"]
    over = whole["faster than"]
    lines.append(
        f"\nAn evaluation pass over {whole['sequences']} answers of pairs_dev and lists_dev (every {result['every']}th "
        f"record, {whole['tokens']} tokens), 32 layers: {over[PADDED]:.2f} times as fast as transformers bf16 in "
        f"batches sorted by length, {over[ALONE]:.2f} times as fast as lightrm without sharing (ideal "
        f"{whole['ideal']:.2f}). From text to packs takes {100 * whole['beside the model']:.2f} % of the model's time."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--every", type=int, default=32)
    arguments = parser.parse_args()
    whole = evaluation(real_groups(arguments.data, arguments.tokenizer, arguments.every), arguments.rounds)
    beside = beside_the_model(arguments.data, arguments.every)
    whole["beside the model"] = beside / whole["seconds of 32 layers"][OURS]
    print(json.dumps(whole))
    result = {**provenance(available(PACKAGES)), "rounds": arguments.rounds, "every": arguments.every}
    result |= {"device": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    write_result(RESULT, result | {"pass": whole, "grid": grid(arguments.rounds)})
    readme = ROOT / "README.md"
    quoted = with_table(readme.read_text(encoding="utf-8"), RESULT, table(read_result(RESULT)))
    readme.write_text(quoted, encoding="utf-8")


if __name__ == "__main__":
    main()
