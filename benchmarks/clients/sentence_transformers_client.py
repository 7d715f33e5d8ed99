"""Runs in the evaluators' environment: SAMPLES.json ANSWER.json. See `benchmarks.clients.sentence_transformers`."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.pop(0)  # this folder, where a file has the name of the package that is imported next

from sentence_transformers.cross_encoder.evaluation import (
    CrossEncoderClassificationEvaluator,
    CrossEncoderCorrelationEvaluator,
    CrossEncoderRerankingEvaluator,
)

import lightrm


def main(given: Path, answer: Path) -> None:
    samples = json.loads(given.read_text())
    pairs = [[one["query"], document] for one in samples for document in one["documents"]]
    labels = [int(document in one["positive"]) for one in samples for document in one["documents"]]
    rm = lightrm.load("demo", scheme="w8a8", device="cpu")
    evaluators = {
        "reranking": CrossEncoderRerankingEvaluator(samples, show_progress_bar=False),
        "classification": CrossEncoderClassificationEvaluator(pairs, labels, show_progress_bar=True),
        "correlation": CrossEncoderCorrelationEvaluator(pairs, list(map(float, labels))),
    }
    figures = {f"{kind} {name}": value for kind, run in evaluators.items() for name, value in run(rm).items()}
    versions = {name: version(name) for name in ("sentence-transformers", "transformers", "scikit-learn")}
    found = {"figures": figures, "versions": versions, "reported": list(rm.model_card_data.metrics)}
    answer.write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
