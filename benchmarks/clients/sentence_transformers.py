"""Do sentence-transformers' own evaluators of cross-encoders run on a model of lightrm?

    python -m benchmarks.clients.sentence_transformers PAIRS.jsonl [--env FOLDER]

PAIRS: records with prompt, chosen and rejected. The evaluators of reranking, classification and correlation run on the
bundled model, in an environment made here (minutes), and each of their figures is compared with the same figure of
scores that lightrm gives by itself. Writes results/sentence_transformers.json and the sentence in the documents.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr

import lightrm
from benchmarks.record import ROOT, measured_on, provenance, quote, write_result

PACKAGES = ("sentence-transformers==6.2.0",)
CLIENT = Path(__file__).with_name("sentence_transformers_client.py")
COUNT = 60  # prompts


def python_of(folder: Path) -> Path:
    """The interpreter of the evaluators' environment, made if it is not there, with lightrm of this clone."""
    python = folder / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-e", str(ROOT), *PACKAGES], check=True)
    return python


def samples(path: Path) -> list[dict[str, Any]]:
    """Each prompt with its better answer, its worse one, and the better answers to the next three prompts."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    asked = [q for q in lightrm.read_questions(path) if isinstance(q.prompt, str)][:COUNT]
    assert asked, f"{len(found)} records, and no prompt that is a string"
    best = [q.responses[int(np.argmax(q.worths))] for q in asked]
    made = []
    for k, q in enumerate(asked):
        others = [best[(k + i) % len(best)] for i in (1, 2, 3)]
        documents = list(dict.fromkeys([*q.responses[::-1], *others]))
        made.append({"query": q.prompt, "positive": [best[k]], "documents": documents})
    return made


def ours(asked: list[dict[str, Any]]) -> dict[str, float]:
    """The same figures from `rank` and `score_batch`, by their definitions."""
    rm = lightrm.load("demo", scheme="w8a8", device="cpu")
    places = []
    for one in asked:
        documents = one["positive"] + [d for d in one["documents"] if d not in one["positive"]]
        places.append(1 + [r.index for r in rm.rank(one["query"], documents)].index(0))
    pairs = [(one["query"], d) for one in asked for d in one["documents"]]
    labels = [int(d in one["positive"]) for one in asked for d in one["documents"]]
    scores = rm.score_batch([p for p, _ in pairs], [d for _, d in pairs]).astype(np.float64)
    return {
        "reranking mrr@10": float(np.mean([1 / p if p <= 10 else 0 for p in places])),
        "reranking map": float(np.mean([1 / p for p in places])),
        "reranking ndcg@10": float(np.mean([1 / np.log2(1 + p) if p <= 10 else 0 for p in places])),
        "correlation pearson": float(pearsonr(labels, scores)[0]),
        "correlation spearman": float(spearmanr(labels, scores)[0]),
        "classification accuracy": best_accuracy(scores, np.asarray(labels)),
    }


def best_accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    """The accuracy at the best threshold between two scores."""
    sorted_labels = labels[np.argsort(-scores, kind="stable")]
    right = np.cumsum(sorted_labels) + (len(labels) - labels.sum()) - np.cumsum(1 - sorted_labels)
    return float(right[:-1].max() / len(labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument(
        "--env", type=Path, default=Path("sentence-transformers-env"), help="the evaluators' environment"
    )
    arguments = parser.parse_args()
    python, asked = python_of(arguments.env), samples(arguments.pairs)
    with tempfile.TemporaryDirectory() as root:
        given, answered = Path(root) / "samples.json", Path(root) / "answer.json"
        given.write_text(json.dumps(asked))
        subprocess.run([python, CLIENT, given, answered], check=True)
        answer = json.loads(answered.read_text())
    expected = ours(asked)
    rows = {name: {"evaluator": answer["figures"][name], "lightrm": value} for name, value in expected.items()}
    write_result(
        "sentence_transformers",
        {**provenance(("torch", "numpy", "scipy")), "client": answer["versions"], "prompts": len(asked),
         "pairs": sum(len(one["documents"]) for one in asked), "figures": rows, "reported": answer["reported"]},
    )  # fmt: skip
    quote("sentence_transformers", sentence)


def sentence(result: dict[str, Any]) -> str:
    rows, client = result["figures"], result["client"]
    worst = max(abs(row["evaluator"] - row["lightrm"]) for row in rows.values())
    return (
        f"sentence-transformers {client['sentence-transformers']}'s evaluators of reranking, classification and "
        f"correlation ran on the bundled model with {result['prompts']} prompts and {result['pairs']} answers. Their "
        f"{len(rows)} figures ({', '.join(rows)}) are those of lightrm's own scores, to within {worst:.0e}. "
        f"{measured_on(result)}\n"
    )


if __name__ == "__main__":
    main()
