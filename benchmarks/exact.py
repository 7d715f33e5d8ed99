"""What `rank(exact=True)` costs: the order of float32 from quicker scores, on all held-out pairs and lists.

    python -m benchmarks.exact DATA --work FOLDER [--reference FOLDER]

The models of benchmarks.fidelity, calibrated and cut as there. Answers whose quick scores stand closer than a limit are
scored again in float32, as `rank(exact=True)` does it. Prompts are dealt to two halves, and each half is ranked with
the bound that was measured on the other one. Beside it, what the smallest limit costs that orders everything, which can
be known only afterwards. Scores are kept in --work: a stopped run goes on. Writes results/exact.json and the
table in the documents.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import lightrm
from benchmarks.fidelity import LONGEST, held_out, measured, models_of, options
from benchmarks.record import measured_on, provenance, quote, this_cpu, write_result
from lightrm.data.preferences import Question
from lightrm.judge.bounds import Bound, Limit, wrong_gap
from lightrm.judge.exact_ranking import Ranking, plain_ranking, ranking, settled
from lightrm.judge.fidelity import FidelityReport

QUICK = ("w8a8+cal", "bf16")
CONFIDENCES = (0.98, 0.99, 0.995, 0.9999)  # the last is more than the halves can say: the surest they have
AFTERWARDS = "known afterwards"
ALL = 10**6


def split(scores: np.ndarray, questions: Sequence[Question]) -> list[np.ndarray]:
    ends = np.cumsum([len(q.responses) for q in questions])
    return [part.astype(np.float32) for part in np.split(scores, ends[:-1])]


def orders_and_costs(path: str, report: FidelityReport, questions: list[Question]) -> dict[str, Any]:
    """For each kind of quick scores and each limit: orders and costs, in distinct tokens."""
    rm = lightrm.load(path, max_length=LONGEST)  # for its ids
    halves = halved(questions)
    kinds = {
        "pairs": [k for k, q in enumerate(questions) if len(q.responses) == 2],
        "lists": [k for k, q in enumerate(questions) if len(q.responses) > 2],
    }
    found: dict[str, Any] = {"prompts": list(map(len, halves))}
    for name in QUICK:
        exact, quick = (split(report.scores[one], questions) for one in ("fp32", name))
        bounds = [Bound.of((exact[k], quick[k]) for k in half) for half in reversed(halves)]
        found[name] = {}
        most = max(wrong_gap(*one) for one in zip(exact, quick, strict=True))
        for text in (*map(str, CONFIDENCES), AFTERWARDS):
            limits = {
                k: Limit(most) if text == AFTERWARDS else bound.limit(len(exact[k]), float(text))
                for half, bound in zip(halves, bounds, strict=True)
                for k in half
            }
            ranked = [ranked_exactly(q, quick[k], exact[k], limits[k].gap) for k, q in enumerate(questions)]
            found[name][text] = {
                kind: costs(rm, [ranked[k] for k in some])
                | {"sure": float(np.mean([limits[k].confidence for k in some]))}
                for kind, some in kinds.items()
            }
    return found


def halved(questions: list[Question]) -> tuple[list[int], list[int]]:
    """Every other prompt; the questions of one prompt stay together."""
    number = {prompt: n for n, prompt in enumerate(dict.fromkeys(str(q.prompt) for q in questions))}
    halves: tuple[list[int], list[int]] = ([], [])
    for k, q in enumerate(questions):
        halves[number[str(q.prompt)] % 2].append(k)
    return halves


class Ranked(NamedTuple):
    """right, alone: whether the order is float32's, and whether the quick scores alone give it; again: the answers that
    were scored again."""

    question: Question
    right: bool
    alone: bool
    again: list[int]
    raised: bool


def ranked_exactly(question: Question, quick: np.ndarray, exact: np.ndarray, limit: float) -> Ranked:
    (full,), (sufficed,) = settled([quick], [limit], lambda wanted: [float(exact[i]) for _, i in wanted])
    texts = question.responses
    wanted, alone = (order(plain_ranking(scores, texts)) for scores in (exact, quick))
    found = order(ranking(quick, full, sufficed, texts))
    return Ranked(
        question, found == wanted, alone == wanted, np.flatnonzero(~np.isnan(full)).tolist(), sufficed > limit
    )


def order(ranked: Ranking) -> list[int]:
    return [one.index for one in ranked]


def costs(rm: lightrm.RewardModel, ranked: Sequence[Ranked]) -> dict[str, int]:
    ids = [rm.encode([one.question.prompt] * len(one.question.responses), one.question.responses) for one in ranked]
    answers = [some for many in ids for some in many]
    again = [many[i] for one, many in zip(ranked, ids, strict=True) for i in one.again]
    return {
        "prompts": len(ranked), "same order": sum(one.right for one in ranked),
        "same order alone": sum(one.alone for one in ranked), "raised": sum(one.raised for one in ranked),
        "answers": len(answers), "rescored": len(again),
        "tokens": rm.engine.distinct_tokens(answers), "rescored tokens": rm.engine.distinct_tokens(again),
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    lines = [
        "| | quick | asked | sure: pairs / lists | pairs in order (without) | lists | again: pairs | lists | all |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, model in result["models"].items():
        for quick in QUICK:
            for text, one in model[quick].items():
                sure = text if text == AFTERWARDS else f"{100 * float(text):g} %"
                kinds = one["pairs"], one["lists"]
                orders = [f"{kind['same order']} ({kind['same order alone']}) of {kind['prompts']}" for kind in kinds]
                cost = [f"{100 * share:.1f} %" for share in (again(kinds[0]), again(kinds[1]), again(*kinds))]
                had = "" if text == AFTERWARDS else " / ".join(f"{100 * kind['sure']:.1f} %" for kind in kinds)
                lines.append(f"| {' | '.join([name, quick, sure, had, *orders, *cost])} |")
    halves = " and ".join(map(str, next(iter(result["models"].values()))["prompts"]))
    lines += [
        "",
        f"Sure: the mean confidence of the limits; halves of {halves} questions. {measured_on(result)}",
        "",
    ]
    return "\n".join(lines)


def again(*kinds: dict[str, Any]) -> float:
    return sum(one["rescored tokens"] for one in kinds) / sum(one["tokens"] for one in kinds)


def main() -> None:
    parser = options(__doc__, pairs=ALL, lists=ALL)
    parser.add_argument("--work", type=Path, required=True, help="where scores are kept")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", lightrm.TruncationWarning)
    questions = held_out(arguments.data, arguments.pairs, arguments.lists)
    models = {}
    for name, path in models_of(arguments.reference).items():
        report = measured(path, questions, [QUICK[0]], arguments.data, arguments.work / path.replace("/", "-"))
        models[name] = orders_and_costs(path, report, questions)
        print(models[name], flush=True)
    write_result("exact", {**provenance(("torch", "numpy", "numba", "scipy")), **this_cpu(), "models": models})
    quote("exact", table)


if __name__ == "__main__":
    main()
