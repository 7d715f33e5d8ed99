"""What each scheme, and each part of it, does to the scores, against float32.

    python -m benchmarks.schemes DATA [--reference FOLDER]

The bundled model, and with --reference the 135 M model of `training.rebuild`; real answers, cut at LONGEST tokens.

`error` is the standard deviation of the score's error over that of the scores; `tau` is Kendall's tau-b between the two
orders of all answers. The last rows leave out one part of w8a8 or w4a8 each: a part that does not help does not stay.
Writes results/schemes.json and the table in the documents.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from scipy.stats import kendalltau

import lightrm
from benchmarks.bundled_model import prompt_of, sample
from benchmarks.fidelity import models_of, options
from benchmarks.record import measured_on, provenance, quote, write_result
from lightrm.loading import loader
from lightrm.loading.folding import Folding

LONGEST, PAIRS, CALIBRATION = 256, 75, 60


class WithoutGated(Folding):
    gated_block = 1  # type: ignore[assignment]

    def down(self, weight_DF: torch.Tensor) -> torch.Tensor:
        return self.writes_residual(weight_DF)


class WithoutHeads(Folding):
    def value(self, weight: torch.Tensor) -> torch.Tensor:
        return weight

    def output(self, weight_DI: torch.Tensor) -> torch.Tensor:
        return self.writes_residual(weight_DI)


class WithoutResidual(Folding):
    """Neither the stream nor, where norms stand behind attention and MLP, the rows that are read from it."""

    normed_block = 1  # type: ignore[assignment]

    def reads_residual(self, weight_OD: torch.Tensor, norm_D: torch.Tensor) -> torch.Tensor:
        return weight_OD.mul_(norm_D) if self.norms else weight_OD

    def reads_last(self, weight_OD: torch.Tensor, norm_D: torch.Tensor) -> torch.Tensor:
        return weight_OD.mul_(norm_D)

    def writes_residual(self, weight_DI: torch.Tensor) -> torch.Tensor:
        return weight_DI

    def embedding(self, rows_VD: torch.Tensor) -> torch.Tensor:
        return rows_VD


class NormsOnly(WithoutResidual, WithoutHeads, WithoutGated):
    """Norm weights as they are otherwise, nothing rotated."""


Row = tuple[str, str, type[Folding], bool]  # its name, scheme, folding, whether it is calibrated
ROWS: tuple[Row, ...] = (
    ("bf16", "bf16", Folding, False),
    ("w8a8", "w8a8", Folding, False),
    ("w8a8, calibrated", "w8a8", Folding, True),
    ("w4a8", "w4a8", Folding, False),
    ("w4a8-g32", "w4a8-g32", Folding, False),
    ("w4a8, calibrated", "w4a8", Folding, True),
    ("w4a8-g32, calibrated", "w4a8-g32", Folding, True),
    ("w4a16, calibrated", "w4a16", Folding, True),
    ("bitsandbytes int8", "bnb-int8", Folding, False),
    ("bitsandbytes nf4", "nf4", Folding, False),
    ("w8a8 without any rotation", "w8a8", NormsOnly, False),
    ("w8a8 without rotated residual stream", "w8a8", WithoutResidual, False),
    ("w8a8 without rotated values", "w8a8", WithoutHeads, False),
    ("w8a8 without rotated down_proj input", "w8a8", WithoutGated, False),
    ("w4a8 without any rotation", "w4a8", NormsOnly, False),
)


def measure(path: str, data: Path, asked: Sequence[Row] = ROWS) -> dict[str, Any]:
    exact = lightrm.load(path, scheme="fp32", max_length=LONGEST)
    dev = sample(data / "pairs_dev.jsonl.gz", PAIRS)
    train = sample(data / "pairs_train.jsonl.gz", CALIBRATION)
    texts = [exact.encode([prompt_of(r)], [r[side]])[0] for r in dev for side in ("chosen", "rejected")]
    calibration = [(prompt_of(r), r["chosen"]) for r in train]
    truth = exact.score_ids(texts)
    rows = {}
    for row, scheme, folding, calibrated in asked:
        with patch.object(loader, "Folding", folding):
            rm = lightrm.load(path, scheme=scheme, max_length=LONGEST, calibration=calibration if calibrated else None)
        scores = rm.score_ids(texts)
        worst = rm.report.worst
        rows[row] = {
            "error": float(np.std(scores - truth) / np.std(truth)),
            "tau": float(kendalltau(scores, truth).statistic),
            "worst SQNR dB": None if worst is None else worst[1],
            "bytes": rm.report.bytes,
        }
        print(f"{path} {row}: error {rows[row]['error']:.4f}, tau {rows[row]['tau']:.3f}", flush=True)
    return {"answers": len(texts), "rows": rows}


def table(result: dict[str, Any]) -> str:
    models = result["models"]
    lines = ["| | " + " | ".join(f"{name}: error | tau-b" for name in models) + " |"]
    lines.append("| --- |" + " ---: |" * 2 * len(models))
    for row in next(iter(models.values()))["rows"]:
        found = [model["rows"][row] for model in models.values()]
        cells = [f"{100 * one['error']:.1f} % | {one['tau']:.3f}" for one in found]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    lines += ["", measured_on(result)]
    return "\n".join(lines) + "\n"


def main() -> None:
    arguments = options(__doc__).parse_args()
    warnings.simplefilter("ignore", lightrm.TruncationWarning)
    models = {name: measure(path, arguments.data) for name, path in models_of(arguments.reference).items()}
    write_result("schemes", {**provenance(("torch", "numpy", "numba", "scipy")), "models": models})
    quote("schemes", table)


if __name__ == "__main__":
    main()
