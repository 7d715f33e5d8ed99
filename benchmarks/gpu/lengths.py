"""Lengths of real preference pairs in tokens, so that a machine without the data can score a real mix of lengths.

    python -m benchmarks.gpu.lengths DATA TOKENIZER [--pairs 256]

DATA holds pairs_dev.jsonl.gz, TOKENIZER is a sentencepiece model (LLaMA's). Writes lengths.json beside this file:
[prompt, chosen, rejected] of pairs spread evenly over the file, zh and en, a sequence cut at 2048 tokens.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

LENGTHS = Path(__file__).with_name("lengths.json")
LONGEST = 2048


def read_groups(pairs: int | None = None) -> list[tuple[int, list[int]]]:
    """Tokens of each prompt, and of the two answers to it."""
    found = []
    rows = json.loads(LENGTHS.read_text())["pairs"]
    rows = rows if pairs is None else rows[:: max(1, len(rows) // pairs)][:pairs]
    for prompt, *answers in rows:
        begins = min(prompt, LONGEST - 1)
        found.append((begins, [min(answer, LONGEST - begins) for answer in answers]))
    return found


def main() -> None:
    import sentencepiece

    from benchmarks.bundled_model import sample

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--pairs", type=int, default=256)
    arguments = parser.parse_args()
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(arguments.tokenizer))
    records = sample(arguments.data / "pairs_dev.jsonl.gz", arguments.pairs)
    pairs = [[len(tokenizer.encode(record[part])) for part in ("prompt", "chosen", "rejected")] for record in records]
    LENGTHS.write_text(json.dumps({"tokenizer": arguments.tokenizer.name, "pairs": pairs}) + "\n")


if __name__ == "__main__":
    main()
