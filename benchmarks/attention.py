"""What rounding the two products of attention costs: bfloat16, or int8 as in SageAttention (arXiv 2410.02367).

    python -m benchmarks.attention DATA [--reference FOLDER]

Simulated in plain PyTorch over models whose other parts are in float32, and over w8a8. In int8 every query, key and
value has a scale of its own, since what depends on other tokens would make a score depend on its batch; with "rotated",
query and key go through the same Hadamard transform first. Weights of the softmax are 8 bits without a sign, over the
largest of a block of keys, with the scales of the values multiplied in. Writes results/attention.json and the table in
the documents.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from scipy.stats import kendalltau

import lightrm
from benchmarks.fidelity import held_out, models_of, options
from benchmarks.record import measured_on, provenance, quote, this_cpu, write_result
from lightrm.kernels import passes
from lightrm.kernels.cpu import cpu_passes
from lightrm.kernels.operands import Rows, ScoreRule
from lightrm.kernels.paths import Paths
from lightrm.kernels.segments import views
from lightrm.schemes.hadamard import block_of, hadamard
from lightrm.schemes.int8 import quantize_rows

LONGEST = 256  # tokens
PAIRS, LISTS = 60, 12
KEYS = 64  # of a block
ROWS = ("float32", "bfloat16", "int8 query and key", "int8 query and key, rotated", "int8, query and key rotated")
SCHEMES = ("fp32", "w8a8")
Round = Callable[[torch.Tensor], torch.Tensor]


def in_int8(x_THE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and scales, (T, H, E) and (T, H, 1), both float32."""
    values, scale = quantize_rows(x_THE.flatten(0, 1))
    return values.float().view(x_THE.shape), scale.view(*x_THE.shape[:2], 1)


def rounded(x_THE: torch.Tensor, row: str) -> torch.Tensor:
    """A query or key as the product sees it."""
    if row == "bfloat16":
        return x_THE.bfloat16().float()
    if "rotated" in row:
        x_THE = hadamard(x_THE.clone(), block_of(x_THE.shape[-1], 256))
    values, scale = in_int8(x_THE)
    return values * scale


def mixed(score_HQK: torch.Tensor, value_HKE: torch.Tensor, row: str) -> torch.Tensor:
    """softmax(score) @ value."""
    if not row.startswith("int8, "):
        round_: Round = (lambda x: x.bfloat16().float()) if row == "bfloat16" else (lambda x: x)
        weight = (score_HQK - score_HQK.amax(-1, keepdim=True)).exp()
        return round_(weight) @ round_(value_HKE) / weight.sum(-1, keepdim=True)
    value_HKE, scale_HK1 = in_int8(value_HKE)
    scaled = score_HQK + scale_HK1.log().transpose(1, 2)
    most = scaled.amax(-1, keepdim=True)
    out, total = torch.zeros(()), torch.zeros(())
    for start in range(0, scaled.shape[-1], KEYS):
        some = slice(start, start + KEYS)
        peak = scaled[..., some].amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
        weight, shrink = (scaled[..., some] - peak).exp(), (peak - most).exp()
        out = out + (weight * 255).round() @ value_HKE[:, some] / 255 * shrink
        total = total + (weight / scale_HK1[:, some].transpose(1, 2)).sum(-1, keepdim=True) * shrink
    return out / total


def attention_of(row: str) -> Callable[..., Rows]:
    """As `passes.attention`."""

    def attention(
        query_THE: torch.Tensor, key_TJE: torch.Tensor, value_TJE: torch.Tensor, paths: Paths, rule: ScoreRule,
        *, int8: bool = False,
    ) -> Rows:  # fmt: skip
        repeats, out_THE = query_THE.shape[1] // key_TJE.shape[1], torch.empty_like(query_THE)
        query, key = (rounded(x.float(), row) for x in (query_THE, key_TJE))
        for first, end, ranges in views(paths.segments, paths.picked):
            key_HKE, value_HKE = (
                torch.cat([x[a:b] for a, b in ranges]).repeat_interleave(repeats, 1).transpose(0, 1)
                for x in (key, value_TJE.float())
            )
            query_HQE = query[first:end].transpose(0, 1)
            j = torch.arange(key_HKE.shape[1])
            i = j[len(j) - query_HQE.shape[1] :]
            score = query_HQE @ key_HKE.transpose(1, 2) * rule.scale
            score = score.masked_fill(j[None, :] > i[:, None], float("-inf"))
            out_THE[first:end] = mixed(score, value_HKE, row).transpose(0, 1)
        return passes.as_rows(out_THE, int8)

    return attention


def scores(rm: lightrm.RewardModel, ids: Sequence[Sequence[int]], row: str) -> np.ndarray:
    decoder: Any = rm.engine.decoder  # type: ignore[attr-defined]
    kernel = passes.attention if row == "float32" else attention_of(row)
    with patch.object(decoder, "attention_kernel", kernel), patch.object(cpu_passes, "PAIRS", False):
        return rm.score_ids(ids)


def measure(path: str, data: Path) -> dict[str, Any]:
    questions = held_out(data, PAIRS, LISTS)
    asked = [(question.prompt, response) for question in questions for response in question.responses]
    found: dict[str, Any] = {"answers": len(asked)}
    truth = np.empty(0)
    for scheme in SCHEMES:
        rm = lightrm.load(path, scheme=scheme, device="cpu", max_length=LONGEST)
        ids = rm.encode([prompt for prompt, _ in asked], [response for _, response in asked])
        for row in ROWS:
            made = scores(rm, ids, row)
            truth = truth if len(truth) else made
            error = float((made - truth).std() / truth.std())
            found[f"{scheme}: {row}"] = {"error": error, "tau": float(kendalltau(truth, made).statistic)}
            print(scheme, row, found[f"{scheme}: {row}"], flush=True)
    return found


def table(result: dict[str, Any]) -> str:
    models = result["models"]
    lines = [
        f"| attention | {' | '.join(f'{name}: error alone | in w8a8 | tau-b in w8a8' for name in models)} |",
        f"| --- |{' ---: |' * 3 * len(models)}",
    ]
    for row in ROWS:
        cells = []
        for found in models.values():
            alone, inside = found[f"fp32: {row}"], found[f"w8a8: {row}"]
            cells += ["-" if row == "float32" else f"{100 * alone['error']:.2f} %"]
            cells += [f"{100 * inside['error']:.2f} %", f"{inside['tau']:.3f}"]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\n{measured_on(result)}\n"


def main() -> None:
    arguments = options(__doc__).parse_args()
    warnings.simplefilter("ignore", lightrm.TruncationWarning)
    found = {name: measure(path, arguments.data) for name, path in models_of(arguments.reference).items()}
    versions = provenance(("torch", "numpy", "numba", "scipy"))
    write_result("attention", {**versions, **this_cpu(), "models": found})
    quote("attention", table)


if __name__ == "__main__":
    main()
