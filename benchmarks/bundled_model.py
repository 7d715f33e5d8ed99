"""How good the bundled model is, on held-out prompts: corrupted answers, natural preferences, and parity.

    python -m benchmarks.bundled_model ../shared/data

Corruptions are those of `training.corruptions`, drawn with a fixed seed on the chosen answers of pairs_dev. Answers
shorter than 20 characters cannot be cut or made to stutter visibly; they count in the rows named `short` only.
Writes results/bundled_model.json and the tables of the model card that quote it.
"""

from __future__ import annotations

import argparse
import random
import warnings
from collections.abc import Iterable
from pathlib import Path

from scipy.stats import binomtest

import lightrm
from benchmarks.record import ROOT, provenance, read_result, with_table, write_result
from training.corruptions import SHORTEST, cut, repeated
from training.records import dialogue_turns, read_jsonl

CARD = Path(lightrm.__file__).parent / "demo_model" / "MODEL_CARD.md"
KINDS = {
    "repeated": "a repeated span",
    "cut": "cut in mid-sentence",
    "foreign": "another prompt's answer",
    "foreign, short": "another prompt's answer, answers under 20 characters",
}
LANGUAGES = {"zh": "Chinese", "en": "English"}


def prompt_of(record: dict) -> str | list[dict[str, str]]:
    return dialogue_turns(record["prompt"]) if record["format"] == "hh" else record["prompt"]


def share(wins: Iterable[bool]) -> dict[str, float | int]:
    """Wins out of n with a 95 % Wilson interval."""
    wins = list(wins)
    interval = binomtest(sum(wins), len(wins)).proportion_ci(method="wilson")
    return {"n": len(wins), "share": sum(wins) / len(wins), "low": float(interval.low), "high": float(interval.high)}


def corrupted_pairs(records: list[dict]) -> list[tuple[str, str, dict, str]]:
    """(lang, kind, record, bad answer): each distinct prompt's first chosen answer, spoilt once in each way."""
    rng = random.Random(20260101)
    seen: set[str] = set()
    proper = [r for r in records if not (r["prompt"] in seen or seen.add(r["prompt"]))]
    found = []
    for record in proper:
        answer = record["chosen"].strip()
        for kind, spoil in (("repeated", repeated), ("cut", cut)):
            bad = spoil(answer, rng)
            if bad is not None:
                found.append((record["lang"], kind, record, bad))
        long = len(answer) >= SHORTEST
        others = [
            r["chosen"].strip()
            for r in proper
            if r["lang"] == record["lang"] and r["prompt"] != record["prompt"] and r["chosen"].strip() != answer
        ]
        others = [other for other in others if (len(other) >= SHORTEST) == long]
        found.append((record["lang"], "foreign" if long else "foreign, short", record, rng.choice(others)))
    return found


def measure(data: Path, model: str) -> dict:
    rm = lightrm.load(model)
    records = read_jsonl(data / "pairs_dev.jsonl.gz")
    corrupted = corrupted_pairs(records)
    prompts = [prompt_of(r) for r in records] * 2 + [prompt_of(r) for _, _, r, _ in corrupted] * 2
    answers = [r["chosen"].strip() for r in records] + [r["rejected"].strip() for r in records]
    answers += [r["chosen"].strip() for _, _, r, _ in corrupted] + [bad for _, _, _, bad in corrupted]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lightrm.TruncationWarning)  # overlong texts are cut as in use
        scores = rm.score_batch(prompts, answers, progress=True)
    n, m = len(records), len(corrupted)
    natural = scores[:n] > scores[n : 2 * n]
    wins = scores[2 * n : 2 * n + m] > scores[2 * n + m :]
    return {
        "model": model,
        **provenance(("torch", "numpy", "scipy")),
        "corrupted": {
            f"{lang} {kind}": share(w for w, c in zip(wins, corrupted, strict=True) if c[:2] == (lang, kind))
            for lang in LANGUAGES
            for kind in KINDS
        },
        "natural": {
            lang: share(w for w, r in zip(natural, records, strict=True) if lang in ("all", r["lang"]))
            for lang in ("all", *LANGUAGES)
        },
        "natural without CC-BY-SA": share(
            w for w, r in zip(natural, records, strict=True) if "CC-BY-SA" not in r["license"]
        ),
        "scores": {"mean": float(scores.mean()), "std": float(scores.std())},
    }


def percent(row: dict) -> str:
    return f"{100 * row['share']:.1f} % ({100 * row['low']:.1f} - {100 * row['high']:.1f}, n = {row['n']})"


def table(result: dict) -> str:
    lines = ["| the proper answer beats | Chinese | English |", "| --- | --- | --- |"]
    for kind, title in KINDS.items():
        cells = [percent(result["corrupted"][f"{lang} {kind}"]) for lang in LANGUAGES]
        lines.append(f"| {title} | {cells[0]} | {cells[1]} |")
    natural = result["natural"]
    lines.append(
        f"| the rejected answer (human and benchmark labels) | {percent(natural['zh'])} | {percent(natural['en'])} |"
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with pairs_dev.jsonl.gz")
    parser.add_argument("--model", default="demo")
    arguments = parser.parse_args()
    result = measure(arguments.data, arguments.model)
    print(table(result))
    if arguments.model == "demo":
        write_result("bundled_model", result)
        for path in (CARD, ROOT / "README.md"):
            quoted = with_table(path.read_text(encoding="utf-8"), "bundled_model", table(read_result("bundled_model")))
            path.write_text(quoted, encoding="utf-8")


if __name__ == "__main__":
    main()
