"""How far each scheme moves the scores and the rankings of two trained models, and what a guaranteed ranking costs.

    python -m benchmarks.fidelity DATA --work FOLDER [--reference FOLDER]

The bundled model, and with --reference the 135 M model of `training.rebuild`. Held-out pairs and lists, each answer
with its prompt, cut at LONGEST tokens; the schemes with "+cal" are calibrated on training pairs. Speed is measured in
turn: the same text by every scheme, ROUNDS times around, the median of the ratios to float32. The bound of the
guaranteed ranking is measured on training pairs and held-out lists of one half, and used on all pairs and the other
half's lists. Scores are kept in --work: a stopped run goes on. Writes results/fidelity.json and README's table.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import lightrm
from benchmarks.record import measured_on, provenance, quote, this_cpu, write_result
from lightrm.agreement import Prompts, agreement
from lightrm.fidelity import FidelityReport, Row, number, percent
from lightrm.measuring import measure_fidelity
from lightrm.questions import Question, calibration_pairs, read_questions
from lightrm.ranking import plain_ranking, ranking, settled
from lightrm.sensitivity import some_ids

LONGEST = 512  # tokens
CALIBRATION = 16384  # tokens
SCHEMES = ("w8a8", "w8a8+cal", "w4a8+cal", "w4a8-g32+cal", "nf4")
QUICK = "w8a8+cal"  # of the guaranteed ranking
ROUNDS, SPEED_TOKENS = 5, 6000


def every(items: Sequence[Any], count: int) -> list[Any]:
    """Spread evenly."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)]


def held_out(data: Path, pairs: int, lists: int) -> list[Question]:
    """At most so many of each, spread evenly."""
    found = every(read_questions(data / "pairs_dev.jsonl.gz"), pairs)
    return found + every(read_questions(data / "lists_dev.jsonl.gz"), lists)


def models_of(reference: Path | None) -> dict[str, str]:
    """What to call each model, and where it is; reference: folder of `training.rebuild`."""
    paths = {"The bundled model": "demo"}
    if reference is not None:
        paths["The 135 M reference model"] = str(reference / "sequence_classification")
    return paths


def measured(path: str, questions: list[Question], schemes: Sequence[str], data: Path, keep: Path) -> FidelityReport:
    text = list(calibration_pairs(data / "pairs_train.jsonl.gz", CALIBRATION))
    return measure_fidelity(
        path, questions, name="held-out pairs and lists", schemes=schemes, max_length=LONGEST,
        calibration=text if any(scheme.endswith("+cal") for scheme in schemes) else None,
        keep=keep, tell=lambda line: print(line, flush=True),
    )  # fmt: skip


def speeds(path: str, questions: list[Question], schemes: Sequence[str]) -> dict[str, float]:
    """Tokens a second over float32's, in turn; calibration does not change a scheme's speed."""
    names = ["fp32", *dict.fromkeys(scheme.removesuffix("+cal") for scheme in schemes)]
    models = {name: lightrm.load(path, scheme=name, max_length=LONGEST) for name in names}
    ids, _ = some_ids(models["fp32"], questions, SPEED_TOKENS)
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(ROUNDS + 1):
        seconds = {}
        for name, model in models.items():
            started = time.perf_counter()
            model.score_ids(ids)
            seconds[name] = time.perf_counter() - started
        if turn:  # the first round compiles
            for name in names:
                ratios[name].append(seconds["fp32"] / seconds[name])
    return {name: float(np.median(found)) for name, found in ratios.items()}


def split(scores: np.ndarray, questions: Sequence[Question]) -> list[np.ndarray]:
    ends = np.cumsum([len(q.responses) for q in questions])
    return [part.astype(np.float32) for part in np.split(scores, ends[:-1])]


def guaranteed(
    path: str, report: FidelityReport, questions: list[Question], train: list[Question], data: Path, keep: Path
) -> dict[str, Any]:
    """The order of float32 from QUICK's scores, by a bound from other prompts; cost in distinct tokens."""
    other = measured(path, train, [QUICK], data, keep / "bound")
    lists = [k for k, q in enumerate(questions) if len(q.responses) > 2]
    measured_on = set(lists[::2])
    of_lists = bound_on(report, questions, sorted(measured_on))
    bound = max(other.row(QUICK).agreement.pair_error.error, of_lists)
    prompts = other.row(QUICK).agreement.pair_error.prompts + len(measured_on)
    rm = lightrm.load(path, max_length=LONGEST)  # for its ids
    found: dict[str, Any] = {
        "bound": bound,
        "prompts of the bound": prompts,
        "unit": report.row(QUICK).agreement.spread,
    }
    exact, quick = (split(report.scores[name], questions) for name in ("fp32", QUICK))
    for name, chosen in (
        ("pairs", [k for k, q in enumerate(questions) if len(q.responses) == 2]),
        ("lists", [k for k in lists if k not in measured_on]),
    ):
        found[name] = ranked_exactly(
            rm, [questions[k] for k in chosen], [quick[k] for k in chosen], [exact[k] for k in chosen], bound
        )
    return found


def bound_on(report: FidelityReport, questions: list[Question], chosen: list[int]) -> float:
    exact, quick = (split(report.scores[name], questions) for name in ("fp32", QUICK))
    prompt = np.concatenate([np.full(len(exact[k]), k) for k in chosen])
    scores = [np.concatenate([one[k] for k in chosen]) for one in (exact, quick)]
    return agreement(scores[0], scores[1], Prompts(prompt, draws=1)).pair_error.error


def ranked_exactly(
    rm: lightrm.RewardModel, questions: list[Question], quick: list[np.ndarray], exact: list[np.ndarray], bound: float
) -> dict[str, Any]:
    again: list[tuple[int, int]] = []

    def rescore(wanted: list[tuple[int, int]]) -> list[float]:
        again.extend(wanted)
        return [float(exact[k][i]) for k, i in wanted]

    full, sufficed = settled(quick, bound, rescore)
    same = sum(
        [r.position for r in ranking(q, f, sufficed, question.responses)]
        == [r.position for r in plain_ranking(e, question.responses)]
        for q, f, e, question in zip(quick, full, exact, questions, strict=True)
    )
    before = sum(
        [r.position for r in plain_ranking(q, question.responses)]
        == [r.position for r in plain_ranking(e, question.responses)]
        for q, e, question in zip(quick, exact, questions, strict=True)
    )
    ids = [rm.encode([q.prompt] * len(q.responses), q.responses) for q in questions]
    distinct = [
        rm.engine.distinct(some) for some in ([one for many in ids for one in many], [ids[k][i] for k, i in again])
    ]
    return {
        "prompts": len(questions), "same order": same, "same order alone": before,
        "answers": sum(len(q.responses) for q in questions), "rescored": len(again),
        "tokens": distinct[0], "rescored tokens": distinct[1], "bound that sufficed": sufficed,
    }  # fmt: skip


def described(report: FidelityReport, speed: dict[str, float]) -> dict[str, Any]:
    def row(one: Row) -> dict[str, Any]:
        return {
            "bytes": one.bytes,
            "speed": speed[one.scheme.removesuffix("+cal")],
            "whole": dataclasses.asdict(one.agreement),
            "parts": {name: dataclasses.asdict(part) for name, part in one.slices.items()},
        }

    rows = [*([report.floor] if report.floor else []), *report.rows]
    return {
        "prompts": report.prompts, "answers": report.answers, "tokens": report.tokens,
        "bytes": report.reference_bytes,
        "accuracy": None if report.accuracy is None else dataclasses.asdict(report.accuracy),
        "rows": {one.scheme: row(one) for one in rows},
        "cells": {one.scheme: cells(one) for one in rows},
    }  # fmt: skip


def cells(row: Row) -> list[str]:
    a = row.agreement
    return [percent(a.mean_error), percent(a.p99_error), number(a.tau), percent(a.flips), percent(a.top1)]


def table(result: dict[str, Any]) -> str:
    lines = []
    for name, model in result["models"].items():
        lines += [
            f"**{name}**, {model['prompts']} prompts with {model['answers']} answers:",
            "",
            "| | weights | speed over fp32 | mean error | 99th percentile | tau-b | flips | same best |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
            f"| fp32 | {model['bytes'] / 2**20:.0f} MiB | 1.00 | - | - | - | - | - |",
        ]
        for scheme, row in model["rows"].items():
            title = {"bf16": "bf16: the noise floor"}.get(scheme, scheme)
            figures = " | ".join(model["cells"][scheme])
            lines.append(f"| {title} | {row['bytes'] / 2**20:.0f} MiB | {row['speed']:.2f} | {figures} |")
        lines += ["", *(guarantee(kind, model["exact"][kind]) for kind in ("pairs", "lists")), together(model), ""]
    return "\n".join([*lines, measured_on(result), ""])


def guarantee(kind: str, one: dict[str, Any]) -> str:
    share = 100 * one["rescored tokens"] / one["tokens"]
    return (
        f"`rank(exact=True)` on {one['prompts']} {kind}: the order of float32 in {one['same order']} of them (by "
        f"{QUICK} alone in {one['same order alone']}), with {one['rescored']} of {one['answers']} answers scored "
        f"again, {share:.1f} % of the tokens.  "
    )


def together(model: dict[str, Any]) -> str:
    exact = model["exact"]
    again, whole = (sum(exact[kind][name] for kind in ("pairs", "lists")) for name in ("rescored tokens", "tokens"))
    return (
        f"Together {100 * again / whole:.1f} % of the tokens. The bound, {exact['bound'] / exact['unit']:.2f} "
        f"within-prompt standard deviations, is of {exact['prompts of the bound']} other prompts."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--reference", type=Path, help="folder of training.rebuild")
    parser.add_argument("--work", type=Path, required=True, help="where scores are kept")
    parser.add_argument("--pairs", type=int, default=10**6)
    parser.add_argument("--lists", type=int, default=10**6)
    parser.add_argument("--bound", type=int, default=1000, help="training pairs that the bound is measured on")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", lightrm.TruncationWarning)
    questions = held_out(arguments.data, arguments.pairs, arguments.lists)
    train = every(read_questions(arguments.data / "pairs_train.jsonl.gz"), arguments.bound)
    models = {}
    for name, path in models_of(arguments.reference).items():
        keep = arguments.work / path.replace("/", "-")
        report = measured(path, questions, SCHEMES, arguments.data, keep)
        print(report, flush=True)
        floor = [report.floor.scheme] if report.floor else []
        models[name] = described(report, speeds(path, questions, [*floor, *SCHEMES]))
        models[name]["exact"] = guaranteed(path, report, questions, train, arguments.data, keep)
        print(models[name]["exact"], flush=True)
    versions = provenance(("torch", "numpy", "numba", "scipy", "bitsandbytes"))
    write_result("fidelity", {**versions, **this_cpu(), "models": models})
    quote("fidelity", table)


if __name__ == "__main__":
    main()
