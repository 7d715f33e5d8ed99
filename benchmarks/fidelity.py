"""How far each scheme moves the scores and the rankings of two trained models.

    python -m benchmarks.fidelity DATA --work FOLDER [--reference FOLDER]

The bundled model, and with --reference the 135 M model of `training.rebuild`. Held-out pairs and lists, each answer
with its prompt, cut at LONGEST tokens; the schemes with "+cal" are calibrated on training pairs. Scores are kept in
--work: a stopped run goes on. Writes results/fidelity.json and the tables in the documents.
"""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import lightrm
from benchmarks.record import measured_on, provenance, quote, this_cpu, write_result
from lightrm.data.preferences import Question, calibration_pairs, read_questions
from lightrm.display.sizes import size_text
from lightrm.judge.fidelity import FidelityReport, Row
from lightrm.measure.measurement import measure_fidelity
from lightrm.text.conversation import Prompt

LONGEST = 512  # tokens
CALIBRATION = 4 * 16384  # characters of prompts and answers, so 16384 tokens or more
SCHEMES = ("w8a8", "w8a8+cal", "w4a8+cal", "w4a8-g32+cal", "nf4")
PAIRS, LISTS = 160, 32


def options(description: str | None, **most: int) -> argparse.ArgumentParser:
    """What benchmarks of trained models are told; most: an option each for how many of something are used."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--reference", type=Path, help="folder of training.rebuild")
    for name, count in most.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    return parser


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


def calibration_text(data: Path) -> list[tuple[Prompt, str]]:
    """The first training pairs, both answers of each, until there is text enough."""
    found: list[tuple[Prompt, str]] = []
    for prompt_and_response in calibration_pairs(data / "pairs_train.jsonl.gz"):
        found.append(prompt_and_response)
        if len(found) % 2 == 0 and sum(len(str(prompt)) + len(response) for prompt, response in found) > CALIBRATION:
            break
    return found


def measured(path: str, questions: list[Question], schemes: Sequence[str], data: Path, keep: Path) -> FidelityReport:
    text = calibration_text(data)
    return measure_fidelity(
        path, questions, name="held-out pairs and lists", schemes=schemes, max_length=LONGEST,
        calibration=text if any(scheme.endswith("+cal") for scheme in schemes) else None,
        keep=keep, tell=lambda line: print(line, flush=True),
    )  # fmt: skip


def described(report: FidelityReport) -> dict[str, Any]:
    def row(one: Row) -> dict[str, Any]:
        return {
            "bytes": one.bytes,
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
    return [a.mean_error.percent(2), a.p99_error.percent(2), a.tau.text(3), a.flips.percent(2), a.top1.percent(2)]


def table(result: dict[str, Any]) -> str:
    lines = []
    for name, model in result["models"].items():
        lines += [
            f"**{name}**, {model['prompts']} prompts with {model['answers']} answers:",
            "",
            "| | weights | mean error | 99th percentile | tau-b | flips | same best |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
            f"| fp32 | {size_text(model['bytes'])} | - | - | - | - | - |",
        ]
        for scheme, row in model["rows"].items():
            title = {"bf16": "bf16: the noise floor"}.get(scheme, scheme)
            figures = " | ".join(model["cells"][scheme])
            lines.append(f"| {title} | {size_text(row['bytes'])} | {figures} |")
        lines.append("")
    return "\n".join([*lines, measured_on(result), ""])


SHORT = {"mean_error": "mean error", "flips": "flipped pairs", "top1": "same best answer"}


def short_table(result: dict[str, Any]) -> str:
    """Both models in a table of a few columns, without the intervals; in percent."""
    models = result["models"]
    lines = ["| | " + " | ".join(f"{name}: {' | '.join(SHORT.values())}" for name in models) + " |"]
    lines.append("| --- |" + " ---: |" * len(SHORT) * len(models))
    for scheme in next(iter(models.values()))["rows"]:
        wholes = [model["rows"][scheme]["whole"] for model in models.values()]
        cells = [f"{100 * whole[name]['value']:.1f} %" for whole in wholes for name in SHORT]
        lines.append(f"| {scheme} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", measured_on(result), ""])


def main() -> None:
    parser = options(__doc__, pairs=PAIRS, lists=LISTS)
    parser.add_argument("--work", type=Path, required=True, help="where scores are kept")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", lightrm.TruncationWarning)
    questions = held_out(arguments.data, arguments.pairs, arguments.lists)
    models = {}
    for name, path in models_of(arguments.reference).items():
        keep = arguments.work / path.replace("/", "-")
        report = measured(path, questions, SCHEMES, arguments.data, keep)
        print(report, flush=True)
        models[name] = described(report)
    versions = provenance(("torch", "numpy", "numba", "scipy", "bitsandbytes"))
    write_result("fidelity", {**versions, **this_cpu(), "models": models})
    quote("fidelity", table)
    quote("fidelity", short_table, block="fidelity_short")


if __name__ == "__main__":
    main()
