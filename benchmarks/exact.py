"""What a guaranteed ranking costs: the order of float32 from quicker scores, on all held-out pairs and lists.

    python -m benchmarks.exact DATA --work FOLDER [--reference FOLDER] [--bound 1000]

The models of benchmarks.fidelity, calibrated and cut as there. Answers whose quick scores stand closer than the bound
are scored again in float32, as `rank(exact=True)` does it. The bound is measured on --bound training pairs and on every
other list, and used on all held-out pairs and the other lists. Scores are kept in --work: a stopped run goes on. Writes
results/exact.json and README's table.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from operator import eq
from pathlib import Path
from typing import Any

import numpy as np

import lightrm
from benchmarks.fidelity import LONGEST, every, held_out, measured, models_of, options
from benchmarks.record import measured_on, provenance, quote, this_cpu, write_result
from lightrm.agreement import Prompts, agreement
from lightrm.fidelity import FidelityReport
from lightrm.questions import Question, read_questions
from lightrm.ranking import Ranking, plain_ranking, ranking, settled

QUICK = ("w8a8+cal", "bf16")
ALL = 10**6


def split(scores: np.ndarray, questions: Sequence[Question]) -> list[np.ndarray]:
    ends = np.cumsum([len(q.responses) for q in questions])
    return [part.astype(np.float32) for part in np.split(scores, ends[:-1])]


def guaranteed(
    path: str, report: FidelityReport, other: FidelityReport, questions: list[Question], train: list[Question]
) -> dict[str, Any]:
    """For each kind of quick scores: orders and costs, in distinct tokens; other: the report on the training pairs."""
    lists = [k for k, q in enumerate(questions) if len(q.responses) > 2]
    seen = set(lists[::2])
    rm = lightrm.load(path, max_length=LONGEST)  # for its ids
    asked = {
        "pairs": [k for k, q in enumerate(questions) if len(q.responses) == 2],
        "lists": [k for k in lists if k not in seen],
    }
    found: dict[str, Any] = {"prompts of the bound": len(train) + len(seen)}
    for name in QUICK:
        exact, quick = (split(report.scores[one], questions) for one in ("fp32", name))
        of_train = bound_on(other, train, range(len(train)), name)
        bound = max(of_train, bound_on(report, questions, sorted(seen), name))
        kinds = {
            kind: ranked_exactly(
                rm, [questions[k] for k in chosen], [quick[k] for k in chosen], [exact[k] for k in chosen], bound
            )
            for kind, chosen in asked.items()
        }
        found[name] = {"bound": bound, "unit": report.row(QUICK[0]).agreement.spread, **kinds}
    return found


def bound_on(report: FidelityReport, questions: list[Question], chosen: Sequence[int], quick: str) -> float:
    found = [split(report.scores[name], questions) for name in ("fp32", quick)]
    prompt = np.concatenate([np.full(len(found[0][k]), k) for k in chosen])
    scores = [np.concatenate([one[k] for k in chosen]) for one in found]
    return agreement(scores[0], scores[1], Prompts(prompt, draws=1)).pair_error.error


def ranked_exactly(
    rm: lightrm.RewardModel, questions: list[Question], quick: list[np.ndarray], exact: list[np.ndarray], bound: float
) -> dict[str, Any]:
    scored_again: list[tuple[int, int]] = []

    def rescore(wanted: list[tuple[int, int]]) -> list[float]:
        scored_again.extend(wanted)
        return [float(exact[k][i]) for k, i in wanted]

    full, bounds = settled(quick, bound, rescore)
    texts = [q.responses for q in questions]
    wanted, alone = (
        [order(plain_ranking(*one)) for one in zip(scores, texts, strict=True)] for scores in (exact, quick)
    )
    found = [order(ranking(*one)) for one in zip(quick, full, bounds, texts, strict=True)]
    ids = [rm.encode([q.prompt] * len(q.responses), q.responses) for q in questions]
    every_answer = [one for many in ids for one in many]
    distinct = [rm.engine.distinct(some) for some in (every_answer, [ids[k][i] for k, i in scored_again])]
    return {
        "prompts": len(questions), "same order": sum(map(eq, found, wanted)),
        "same order alone": sum(map(eq, alone, wanted)),
        "answers": sum(len(q.responses) for q in questions), "rescored": len(scored_again),
        "tokens": distinct[0], "rescored tokens": distinct[1], "raised": sum(b > bound for b in bounds),
    }  # fmt: skip


def order(ranked: Ranking) -> list[int]:
    return [one.position for one in ranked]


def table(result: dict[str, Any]) -> str:
    lines = [
        "| | quick scores | pairs in float32's order (without) | lists | tokens again: pairs | lists | all | bound |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, model in result["models"].items():
        for quick in QUICK:
            one = model[quick]
            kinds = one["pairs"], one["lists"]
            orders = [f"{kind['same order']} ({kind['same order alone']}) of {kind['prompts']}" for kind in kinds]
            costs = [f"{100 * cost:.1f} %" for cost in (again(kinds[0]), again(kinds[1]), again(*kinds))]
            bound = f"{one['bound'] / one['unit']:.2f}"
            lines.append(f"| {' | '.join([name, quick, *orders, *costs, bound])} |")
    prompts = next(iter(result["models"].values()))["prompts of the bound"]
    lines += [
        "",
        f"The bound, in within-prompt standard deviations, is of {prompts} other prompts. {measured_on(result)}",
        "",
    ]
    return "\n".join(lines)


def again(*kinds: dict[str, Any]) -> float:
    return sum(one["rescored tokens"] for one in kinds) / sum(one["tokens"] for one in kinds)


def main() -> None:
    parser = options(__doc__, pairs=ALL, lists=ALL, bound=1000)
    parser.add_argument("--work", type=Path, required=True, help="where scores are kept")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", lightrm.TruncationWarning)
    questions = held_out(arguments.data, arguments.pairs, arguments.lists)
    train = every(read_questions(arguments.data / "pairs_train.jsonl.gz"), arguments.bound)
    models = {}
    for name, path in models_of(arguments.reference).items():
        keep = arguments.work / path.replace("/", "-")
        report = measured(path, questions, [QUICK[0]], arguments.data, keep)
        other = measured(path, train, [QUICK[0]], arguments.data, keep / "bound")
        models[name] = guaranteed(path, report, other, questions, train)
        print(models[name], flush=True)
    write_result("exact", {**provenance(("torch", "numpy", "numba", "scipy")), **this_cpu(), "models": models})
    quote("exact", table)


if __name__ == "__main__":
    main()
