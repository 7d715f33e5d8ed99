"""n answers to one prompt, and a whole evaluation pass: what sharing prompts is worth, against the ideal and peers.

    python -m benchmarks.sharing DATA TOKENIZER [--rounds 3] [--every 48] [--only pass] [--most 64]

DATA holds pairs_dev.jsonl.gz and lists_dev.jsonl.gz, TOKENIZER is LLaMA's sentencepiece model. Peers, rounds and
ratios as in benchmarks.scoring.

The grid: n answers of R tokens to a prompt of P. Unshared work is n(P + R) tokens, shared work P + nR; the ideal
speed-up is their ratio, and that of the same engine with sharing switched off is reported beside it.

The pass: every pair and list, or every k-th, each answer scored once. It is timed on 2 and on 6 layers in turn; their
difference is four whole layers, from which the time of 32 follows: lightrm computes only a part of the last layer,
which would flatter it in a model of few. "beside the model" is the time of text to ids to packs over that of 32 layers.
Writes results/sharing_cpu.json and the table in the documents.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.bundled_model import prompt_of
from benchmarks.record import (
    measured_on,
    multiplies_bfloat16,
    provenance,
    quote,
    read_result,
    this_cpu,
    write_result,
)
from benchmarks.scoring import PACKAGES, SHARING, Groups, Peer, available, build
from training.records import read_jsonl

RESULT = "sharing_cpu"
OURS, PADDED = "lightrm w8a8", ("transformers bf16", "transformers fp32")
ALONE, KEPT = SHARING
OTHERS = (*PADDED, KEPT)
LENGTHS = ((1000, 100), (300, 300), (100, 400))  # tokens of prompt and answer
ANSWERS = (1, 2, 4, 8, 16, 64)
WITH_OTHERS = 4  # answers: they are slow
WARMING: Groups = [(20, [20, 30]), (0, [300])]
LAYERS, WHOLE = (2, 6), 32
LONGEST = 2048


def texts_of(data: Path, every: int) -> list[tuple[dict[str, Any], list[str]]]:
    """Pairs and lists with their answers, zh and en, every k-th record."""
    records = [*read_jsonl(data / "pairs_dev.jsonl.gz"), *read_jsonl(data / "lists_dev.jsonl.gz")][::every]
    return [(r, r.get("responses") or [r["chosen"], r["rejected"]]) for r in records]


def real_groups(data: Path, tokenizer: Path, every: int) -> Groups:
    """[prompt, answers] of those texts in tokens; a sequence is cut at LONGEST."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    found = []
    for record, answers in texts_of(data, every):
        prompt = min(len(model.encode(record["prompt"])), LONGEST - 100)
        found.append((prompt, [min(max(1, len(model.encode(text))), LONGEST - prompt) for text in answers]))
    return found


def ideal(groups: Groups) -> float:
    """Tokens in all over distinct ones."""
    return tokens(groups) / sum(prompt + sum(answers) for prompt, answers in groups)


def tokens(groups: Groups) -> int:
    return sum(prompt + answer for prompt, answers in groups for answer in answers)


Times = dict[str, list[float]]  # by peer, one a round


def seconds(peers: dict[str, Peer], names: list[str], groups: Groups, rounds: int) -> Times:
    """All peers in turn, each warmed up before it is timed, for who follows a slow one finds its caches cold; that
    sharing moves no score is checked on the way."""
    found: Times = {name: [] for name in names}
    for _ in range(rounds):
        answers = {}
        for name in names:
            peers[name].ask(WARMING, seed=0)
            answers[name] = peers[name].ask(groups, seed=1)
        if ALONE in answers:
            assert answers[OURS]["scores"] == answers[ALONE]["scores"], "sharing changed a score"
        for name, answer in answers.items():
            found[name].append(answer["seconds"])
    return found


def faster(times: Times, name: str) -> float | None:
    """How many times quicker than a peer we are, by the median of the rounds."""
    if name not in times:
        return None
    return statistics.median(b / a for a, b in zip(times[OURS], times[name], strict=True))


def padded() -> list[str]:
    """The peers that batch by padding. Which dtype is the quicker one depends on the CPU."""
    return [name for name in PADDED if "bf16" not in name or multiplies_bfloat16()]


def grid(rounds: int, most: int) -> list[dict[str, Any]]:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), LAYERS[0])
        others = [*padded(), KEPT]
        peers = {name: Peer(name, Path(folder)) for name in (OURS, ALONE, *others)}
        for prompt, answer in LENGTHS:
            for n in (n for n in ANSWERS if n <= most):
                names = [OURS, ALONE, *(others if n == WITH_OTHERS else ())]
                groups = [(prompt, [answer] * n)]
                times = seconds(peers, names, groups, rounds)
                row = {"load": f"{prompt} / {answer} x {n}", "ideal": ideal(groups)}
                row |= {name: faster(times, name) for name in (ALONE, *OTHERS)}
                found.append(row | {"seconds": {name: statistics.median(taken) for name, taken in times.items()}})
                print(found[-1], flush=True)
        for peer in peers.values():
            peer.process.kill()
    return found


def evaluation(groups: Groups, rounds: int) -> dict[str, Any]:
    """The pass, by the time of 32 layers that two depths in the same round imply."""
    names = [OURS, ALONE, *padded()]
    with tempfile.TemporaryDirectory() as few, tempfile.TemporaryDirectory() as many:
        for folder, layers in zip((few, many), LAYERS, strict=True):
            build(Path(folder), layers)
        depths = [{name: Peer(name, Path(folder)) for name in names} for folder in (few, many)]
        rounds_of = [[seconds(peers, names, groups, 1) for peers in depths] for _ in range(rounds)]
        for peers in depths:
            for peer in peers.values():
                peer.process.kill()
    more = (WHOLE - LAYERS[0]) / (LAYERS[1] - LAYERS[0])
    whole = {name: [a[name][0] + more * (b[name][0] - a[name][0]) for a, b in rounds_of] for name in names}
    return {
        "sequences": sum(len(answers) for _, answers in groups),
        "tokens": tokens(groups),
        "ideal": ideal(groups),
        "seconds of 32 layers": {name: statistics.median(times) for name, times in whole.items()},
        "seconds": {str(layers): [pair[k] for pair in rounds_of] for k, layers in enumerate(LAYERS)},
        "faster than": {name: faster(whole, name) for name in names[1:]},
    }


def beside_the_model(data: Path, every: int) -> float:
    """Seconds from text to packs of the same records, by the bundled model's tokenizer and template."""
    import lightrm
    from lightrm.engine.packing import packs

    rm = lightrm.load("demo", max_length=512)
    pairs = [(prompt_of(record), text) for record, answers in texts_of(data, every) for text in answers]
    started = time.perf_counter()
    ids = [rm.encode([prompt], [text])[0] for prompt, text in pairs]
    for _ in packs(ids, 8192):
        pass
    return time.perf_counter() - started


def table(result: dict[str, Any]) -> str:
    """Speed-up over each other way, in the same round."""
    lines = [
        "| prompt / answer tokens x answers | ideal | over itself, nothing shared | of the ideal "
        "| over transformers bf16 | fp32 | over llama.cpp Q8_0, prompt kept |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["grid"]:
        own, most = row[ALONE], row["ideal"]
        cells = [f"{most:.2f}", f"{own:.2f}", f"{100 * own / most:.0f} %"]
        cells += ["-" if row[name] is None else f"{row[name]:.2f}" for name in OTHERS]
        lines.append(f"| {row['load']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", measured_on(result), "", sentence(result)])


def sentence(result: dict[str, Any]) -> str:
    """Of the pass."""
    whole, over = result["pass"], result["pass"]["faster than"]
    quicker = [f"{over[name]:.2f} times as fast as {name}" for name in PADDED if name in over]
    return (
        f"An evaluation pass over {whole['sequences']} answers of pairs_dev and lists_dev (every {whole['every']}th "
        f"record, {whole['tokens']} tokens), 32 layers: {' and '.join(quicker)} in batches sorted by length, "
        f"{over[ALONE]:.2f} times as fast as lightrm without sharing (ideal {whole['ideal']:.2f}). From text to packs "
        f"takes {100 * whole['beside the model']:.2f} % of the model's time. {measured_on(whole)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--every", type=int, default=48)
    parser.add_argument("--only", choices=["pass", "grid"], help="measure this part anew, keep the other")
    parser.add_argument("--most", type=int, default=64, help="answers to a prompt of the grid")
    arguments = parser.parse_args()
    result: dict[str, Any] = read_result(RESULT) if arguments.only else {}
    here = {**provenance(available(PACKAGES)), **this_cpu()}  # each part has its own: the other may be older
    if arguments.only != "grid":
        whole = evaluation(real_groups(arguments.data, arguments.tokenizer, arguments.every), arguments.rounds)
        beside = beside_the_model(arguments.data, arguments.every) / whole["seconds of 32 layers"][OURS]
        result["pass"] = (
            here | whole | {"beside the model": beside, "every": arguments.every, "rounds": arguments.rounds}
        )
        print(json.dumps(result["pass"]), flush=True)
    if arguments.only != "pass":
        result |= here | {"grid": grid(arguments.rounds, arguments.most), "rounds": arguments.rounds}
    write_result(RESULT, result)
    quote(RESULT, table)


if __name__ == "__main__":
    main()
