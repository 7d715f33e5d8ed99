"""Is turning text into ids ever the wait? Tokens a second of `encode` against those of scoring, with a small model.

    python -m benchmarks.text_speed DATA [--reference FOLDER] [--rounds 5]

The bundled model, and with --reference the 135 M model of `training.rebuild`; held-out pairs and lists, each answer
with its prompt, in w8a8 on a CPU: a large model is slower, and its text takes as long. Each round encodes all texts,
then scores the ids; the ratio is taken within a round. Writes results/text_speed.json and the line in the documents.
"""

from __future__ import annotations

import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import lightrm
from benchmarks.fidelity import held_out, models_of, options
from benchmarks.record import measured_on, provenance, quote, this_cpu, write_result

LONGEST = 512  # tokens
PAIRS, LISTS = 200, 40


def measure(path: str, data: Path, rounds: int) -> dict[str, Any]:
    rm = lightrm.load(path, scheme="w8a8", device="cpu", max_length=LONGEST)
    questions = held_out(data, PAIRS, LISTS)
    prompts = [question.prompt for question in questions for _ in question.responses]
    answers = [response for question in questions for response in question.responses]
    rm.score_ids(rm.encode(prompts, answers)[:8])  # compiles
    encoding, ratios, ids = [], [], rm.encode(prompts, answers)
    for _ in range(rounds):
        started = time.perf_counter()
        rm.encode(prompts, answers)
        encoded = time.perf_counter()
        rm.score_ids(ids)
        encoding.append(encoded - started)
        ratios.append((time.perf_counter() - encoded) / encoding[-1])
    tokens = sum(map(len, ids))
    return {
        "texts": len(answers), "tokens": tokens, "tokens/s of text": tokens / statistics.median(encoding),
        "text over model": statistics.median(ratios),
    }  # fmt: skip


def line(result: dict[str, Any]) -> str:
    found = [
        f"{name}: {row['text over model']:.0f} times as fast as scoring the {row['texts']} texts"
        for name, row in result["models"].items()
    ]
    return f"Text to ids, against scoring the ids in w8a8. {'; '.join(found)}. {measured_on(result)}\n"


def main() -> None:
    arguments = options(__doc__, rounds=5).parse_args()
    warnings.simplefilter("ignore", lightrm.TruncationWarning)
    found = {
        name: measure(path, arguments.data, arguments.rounds) for name, path in models_of(arguments.reference).items()
    }
    print(found)
    write_result("text_speed", {**provenance(("torch", "numba", "tokenizers")), **this_cpu(), "models": found})
    quote("text_speed", line)


if __name__ == "__main__":
    main()
