"""Is fp8 more faithful than w8a8? Simulated on a CPU: the same model, rounded to e4m3 where w8a8 rounds to int8.

    python -m benchmarks.fp8 DATA [--reference FOLDER]

Weights are e4m3 with a scale for each output channel, activations e4m3 with a scale for each token, products are summed
in float32: the most that hardware does (Hopper's tensor cores sum shorter). With the rotations of w8a8, and without.
`error` and `tau` as in benchmarks.schemes. Writes results/fp8.json and the sentence in the documents.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau

import lightrm
from benchmarks.bundled_model import prompt_of, sample
from benchmarks.fidelity import models_of, options
from benchmarks.record import measured_on, provenance, quote, write_result
from benchmarks.schemes import LONGEST, PAIRS
from lightrm.architecture import LINEARS
from lightrm.checkpoints.detect import open_checkpoint
from lightrm.checkpoints.hub import resolve
from lightrm.engine.engine import Engine
from lightrm.kernels.operands import Residual, Rows, Sums
from lightrm.loading.folding import Folding
from lightrm.loading.loader import Loader
from lightrm.loading.placement import Placement
from lightrm.model.linear import Linear
from lightrm.schemes.grammar import parse_scheme

E4M3 = torch.float8_e4m3fn
ROWS = ("w8a8", "fp8", "fp8 without any rotation")


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Each row to e4m3 and back, its largest magnitude at the end of the range."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / torch.finfo(E4M3).max
    return (x / scale).to(E4M3).float() * scale


@dataclass(frozen=True, slots=True)
class Fp8Linear(Linear):
    """Rounds the rows that it reads."""

    def __call__(self, rows: Rows) -> Sums:
        return Linear.__call__(self, Rows(rounded(rows.values_TI)))

    def add_to(self, residual: Residual, rows: Rows) -> None:
        Linear.add_to(self, residual, Rows(rounded(rows.values_TI)))


def scores_in_fp8(rm: lightrm.RewardModel, path: str, texts: list[list[int]], rotated: bool) -> np.ndarray:
    """rm: the same model in float32."""
    cpu = torch.device("cpu")
    loader = Loader(open_checkpoint(resolve(path, None)), Placement(parse_scheme("fp32", cpu), cpu))
    loader.folding = Folding(loader.architecture) if rotated else None
    decoder, head, _ = loader.load()
    if loader.folding is not None:
        decoder.embedding_VD = loader.folding.embedding(loader.checkpoint.read("embedding.weight").float())
    for i, layer in enumerate(decoder.layers):
        parts = {name: getattr(layer, name) for name in LINEARS}
        decoder.layers[i] = replace(
            layer,
            **{n: Fp8Linear(rounded(p.weight), p.bias_O, block=p.block) for n, p in parts.items()},
        )
    scores = np.empty(len(texts), np.float32)
    for group, found in Engine(decoder, head, rm.report.scheme, rm.engine.residence).scores(texts):
        scores[group] = found
    return scores


def measure(path: str, data: Path) -> dict[str, Any]:
    exact = lightrm.load(path, scheme="fp32", max_length=LONGEST)
    dev = sample(data / "pairs_dev.jsonl.gz", PAIRS)
    texts = [exact.encode([prompt_of(r)], [r[side]])[0] for r in dev for side in ("chosen", "rejected")]
    truth = exact.score_ids(texts)
    found = {
        "w8a8": lightrm.load(path, scheme="w8a8", max_length=LONGEST).score_ids(texts),
        "fp8": scores_in_fp8(exact, path, texts, True),
        "fp8 without any rotation": scores_in_fp8(exact, path, texts, False),
    }
    for name, scores in found.items():
        if np.array_equal(scores, truth):
            raise SystemExit(f"{name}: float32's scores to the bit, so it is not what was measured")
    return {
        "answers": len(texts),
        "rows": {
            name: {
                "error": float(np.std(scores - truth) / np.std(truth)),
                "tau": float(kendalltau(scores, truth).statistic),
            }
            for name, scores in found.items()
        },
    }


def sentence(result: dict[str, Any]) -> str:
    parts = []
    for name, model in result["models"].items():
        shown = ", ".join(f"{row} {100 * model['rows'][row]['error']:.1f} %" for row in ROWS)
        parts.append(f"{name[0].lower() + name[1:]}: {shown}")
    return f"Error of the scores over their spread: {'; '.join(parts)}. {measured_on(result)}\n"


def main() -> None:
    arguments = options(__doc__).parse_args()
    warnings.simplefilter("ignore", lightrm.TruncationWarning)
    models = {name: measure(path, arguments.data) for name, path in models_of(arguments.reference).items()}
    write_result("fp8", {**provenance(("torch", "numpy", "scipy")), "models": models})
    quote("fp8", sentence)


if __name__ == "__main__":
    main()
