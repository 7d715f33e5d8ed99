"""How good a trained model is on held-out prompts: against corrupted answers, and on natural preferences.

    python -m benchmarks.bundled_model DATA                          the bundled model
    python -m benchmarks.bundled_model DATA --reference FOLDER       the 135 M model of `training.rebuild`

Each distinct prompt's first chosen answer is spoilt in every way that `training.corruptions` knows, with a fixed seed.
An answer counts as proper if it has at least 20 characters and ends as a sentence does; a comparison counts as proper
if its answer (and, from another prompt, the foreign one) is proper and both texts fit into the model's limit, since
what is cut away cannot be judged. The rows `any` count every comparison, whatever the answer is like.
Writes results/bundled_model.json or reference_model.json, and the tables of the documents that quote it.
"""

from __future__ import annotations

import argparse
import random
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import binomtest

import lightrm
from benchmarks.record import documents, provenance, quote, write_result
from lightrm.data import record_forms
from lightrm.text.conversation import turns_of
from training.corruptions import SHORTEST, cut, repeated
from training.records import read_jsonl

CARD = Path(lightrm.__file__).parent / "demo_model" / "MODEL_CARD.md"
REFERENCE_CARD = Path(__file__).parent / "reference" / "MODEL_CARD.md"
KINDS = {"repeated": "a repeated span", "cut": "cut in mid-sentence", "foreign": "another prompt's answer"}
PROPER_END = set('.。!！?？…"”」』)）')
LANGUAGES = {"zh": "Chinese", "en": "English"}


def prompt_of(record: dict) -> str | list[dict[str, str]]:
    return record_forms.prompt_of(record)


def sample(path: Path, count: int, languages: tuple[str, ...] = ("zh", "en")) -> list[dict]:
    """Records spread evenly over a file."""
    records = [record for record in read_jsonl(path) if record["lang"] in languages]
    return records[:: len(records) // count][:count]


def share(wins: Iterable[bool]) -> dict[str, float | int]:
    """Wins out of n with a 95 % Wilson interval."""
    wins = list(wins)
    interval = binomtest(sum(wins), len(wins)).proportion_ci(method="wilson")
    return {"n": len(wins), "share": sum(wins) / len(wins), "low": float(interval.low), "high": float(interval.high)}


@dataclass(frozen=True, slots=True)
class Comparison:
    """A held-out record's chosen answer against a spoilt one; `proper` as the module says, lengths aside."""

    record: dict
    kind: str
    bad: str
    proper: bool

    @property
    def good(self) -> str:
        return self.record["chosen"].strip()


def is_proper(answer: str) -> bool:
    return len(answer) >= SHORTEST and answer[-1] in PROPER_END


def comparisons(records: list[dict]) -> list[Comparison]:
    """Every corruption of each distinct prompt's first chosen answer, always the same ones."""
    rng = random.Random(20260101)
    first = {record["prompt"]: record for record in reversed(records)}
    chosen = sorted(first.values(), key=lambda record: record["id"])
    found = []
    for record in chosen:
        answer = record["chosen"].strip()
        proper = is_proper(answer)
        for kind, spoil in (("repeated", repeated), ("cut", cut)):
            bad = spoil(answer, rng)
            if bad is not None:
                found.append(Comparison(record, kind, bad, proper))
        others = [
            other["chosen"].strip()
            for other in chosen
            if other["lang"] == record["lang"] and other is not record and other["chosen"].strip() != answer
        ]
        if proper:
            others = [other for other in others if is_proper(other)]
        found.append(Comparison(record, "foreign", rng.choice(others), proper))
    return found


def measure(data: Path, model: str, max_length: int | None = None) -> dict:
    rm = lightrm.load(model, max_length=max_length)
    records = read_jsonl(data / "pairs_dev.jsonl.gz")
    drawn = comparisons(records)
    texts = {(r["id"], r[side].strip()): r for r in records for side in ("chosen", "rejected")}
    texts |= {(c.record["id"], answer): c.record for c in drawn for answer in (c.good, c.bad)}
    encoded = {key: rm.text.encode(turns_of(prompt_of(record)), [key[1]])[0] for key, record in texts.items()}
    scores = rm.score_ids([e.token_ids for e in encoded.values()], progress=True)
    score = dict(zip(encoded, scores.tolist(), strict=True))

    def wins(comparison: Comparison) -> bool:
        return score[comparison.record["id"], comparison.good] > score[comparison.record["id"], comparison.bad]

    def fits(comparison: Comparison) -> bool:
        return not any(encoded[comparison.record["id"], answer].cut for answer in (comparison.good, comparison.bad))

    def prefers(record: dict) -> bool:
        return score[record["id"], record["chosen"].strip()] > score[record["id"], record["rejected"].strip()]

    corrupted = {}
    for lang in LANGUAGES:
        for kind in KINDS:
            every = [c for c in drawn if c.record["lang"] == lang and c.kind == kind]
            corrupted[f"{lang} {kind}"] = share(wins(c) for c in every if c.proper and fits(c))
            corrupted[f"{lang} {kind}, any"] = share(wins(c) for c in every)
    return {
        "scheme": rm.report.scheme.name,
        "max_length": rm.max_length,
        **provenance(("torch", "numpy", "scipy")),
        "corrupted": corrupted,
        "natural": {
            lang: share(prefers(r) for r in records if lang in ("all", r["lang"])) for lang in (*LANGUAGES, "all")
        },
        "natural, without CBBQ": {
            lang: share(prefers(r) for r in records if r["lang"] == lang and "CC-BY-SA" not in r["license"])
            for lang in LANGUAGES
        },
        "scores": {"mean": float(scores.mean()), "std": float(scores.std())},
    }


def percent(row: dict) -> str:
    return f"{100 * row['share']:.1f} % ({100 * row['low']:.1f} - {100 * row['high']:.1f}, n = {row['n']})"


def table(result: dict) -> str:
    lines = ["| the proper answer beats | Chinese | English |", "| --- | --- | --- |"]
    rows = list(KINDS.items())
    rows += [(f"{kind}, any", f"{title}; any chosen answer, also short, unended or too long") for kind, title in rows]
    for kind, title in rows:
        cells = [percent(result["corrupted"][f"{lang} {kind}"]) for lang in LANGUAGES]
        lines.append(f"| {title} | {cells[0]} | {cells[1]} |")
    for key, title in (("natural", "natural pairs"), ("natural, without CBBQ", "natural pairs without CBBQ")):
        cells = [percent(result[key][lang]) for lang in LANGUAGES]
        lines.append(f"| the rejected answer, {title} | {cells[0]} | {cells[1]} |")
    both = percent(result["natural"]["all"])
    lines.append(f"\nNatural pairs have human and benchmark labels; both languages together: {both}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with pairs_dev.jsonl.gz")
    parser.add_argument("--reference", type=Path, help="folder of training.rebuild")
    parser.add_argument("--max-length", type=int, help="tokens of a text; what is cut cannot be judged")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", lightrm.TruncationWarning)
    if arguments.reference is None:
        write_result("bundled_model", measure(arguments.data, "demo"))
        quote("bundled_model", table, paths=[CARD, *documents()])
    else:
        folder = str(arguments.reference / "sequence_classification")
        write_result("reference_model", measure(arguments.data, folder, arguments.max_length))
        quote("reference_model", table, paths=[REFERENCE_CARD])


if __name__ == "__main__":
    main()
