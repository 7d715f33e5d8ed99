"""A second pretrained family: how far each scheme moves the scores of Gemma 3 270M, and what each rotation is worth.

    python -m benchmarks.gemma DATA --work FOLDER

Builds the reward model by `training.gemma3` if FOLDER does not hold it. The figures are those of `benchmarks.fidelity`
and `benchmarks.schemes`, on fewer texts. The rows that Gemma's layers read are normed and rotated at run time: the last
rows leave that out, and the other rotations. Writes results/gemma.json and the tables in the documents.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch

import lightrm
from benchmarks import fidelity, schemes
from benchmarks.record import provenance, quote, this_cpu, write_result
from lightrm.loading.folding import READ_NORMS, Folding, turn
from training.gemma3 import build

NAME = "Gemma 3 270M"
SCHEMES = ("w8a8", "w8a8+cal", "w4a8+cal", "w4a8-g32+cal")
PAIRS, LISTS = 60, 12


class FoldedNorms(Folding):
    """The weights of the norms before attention and MLP folded into the matrices, as in other families."""

    norms = READ_NORMS  # type: ignore[assignment]

    def reads_residual(self, weight_OD: torch.Tensor, norm_D: torch.Tensor) -> torch.Tensor:
        return turn(weight_OD.mul_(norm_D), self.normed_block)


ROWS: tuple[schemes.Row, ...] = (
    ("bf16", "bf16", Folding, False),
    ("w8a8", "w8a8", Folding, False),
    ("w8a8 without any rotation", "w8a8", schemes.NormsOnly, False),
    ("w8a8 without rotated rows of qkv, gate and up", "w8a8", schemes.WithoutResidual, False),
    ("w8a8 without rotated values", "w8a8", schemes.WithoutHeads, False),
    ("w8a8 without rotated down_proj input", "w8a8", schemes.WithoutGated, False),
    ("w8a8 with the norms folded", "w8a8", FoldedNorms, False),
)


def fidelity_table(result: dict[str, Any]) -> str:
    return fidelity.table(result | {"models": {NAME: result["fidelity"]}})


def rotations_table(result: dict[str, Any]) -> str:
    return schemes.table(result | {"models": {NAME: result["rotations"]}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="where the model is built and scores are kept")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", lightrm.TruncationWarning)
    folder = str(build(arguments.data, arguments.work))
    rotations = schemes.measure(folder, arguments.data, ROWS)
    questions = fidelity.held_out(arguments.data, PAIRS, LISTS)
    report = fidelity.measured(folder, questions, SCHEMES, arguments.data, arguments.work / "kept")
    print(report, flush=True)
    versions = provenance(("torch", "numpy", "numba", "scipy", "transformers"))
    write_result("gemma", {**versions, **this_cpu(), "fidelity": fidelity.described(report), "rotations": rotations})
    quote("gemma", fidelity_table, block="gemma_fidelity")
    quote("gemma", rotations_table, block="gemma_rotations")


if __name__ == "__main__":
    main()
