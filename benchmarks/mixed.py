"""Mixed precision: do bytes spent where the score feels them beat the same bytes spent everywhere?

    python -m benchmarks.mixed DATA [--reference FOLDER]

Groups of 32 instead of 128 cost w4a8 some bytes, spread evenly. A rival spends no more of them on single matrices, in
8 bits: each matrix alone is rounded to 4 bits among exact ones, on training pairs, and those whose rounding moves the
score most for each byte come first. Another two spend more: on every down_proj in 8 bits, and as much on what is felt
most. All are then calibrated on the same text, and compared on held-out pairs and lists, paired, with intervals.
Writes results/mixed.json and the table in the documents.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

import lightrm
from benchmarks.fidelity import LISTS, LONGEST, PAIRS, calibration_text, every, held_out, models_of, options
from benchmarks.record import measured_on, provenance, quote, this_cpu, write_result
from lightrm.architecture import LINEARS
from lightrm.data.preferences import Question, read_questions
from lightrm.display.progress import item_progress
from lightrm.judge.agreement import Array, Estimate, Prompts, agreement, estimate, flips_less, spread_of
from lightrm.loading.calibrated_loader import CompensatingLoader
from lightrm.measure.sensitivity import exact_twin, scores_through, some_ids
from lightrm.model.decoder import Layer, Layers
from lightrm.model.linear import Linear
from lightrm.schemes.int4 import Int4
from lightrm.schemes.int8 import Rowwise
from lightrm.scorer import native
from lightrm.typed_json import made

COARSE, FINE = "w4a8", "w4a8-g32"
DOWN = f"{FINE}, down_proj in 8 bits"
FELT, FELT_MORE = f"{COARSE}, the most felt in 8 bits", f"{FINE}, the most felt in 8 bits"
RIVALS = ((FELT, FINE), (FELT_MORE, DOWN))  # each of the size of the other
FIGURES = ("mean_error", "tau", "flips")
FELT_TOKENS = 1500
Place = tuple[int, str]  # layer and matrix


@dataclass(frozen=True, slots=True)
class OneRounded:
    """Exact layers, one matrix of which stands for its 4-bit form."""

    exact: Layers
    rounded: Layers
    place: Place | None

    def __len__(self) -> int:
        return len(self.exact)

    def __getitem__(self, i: int) -> Layer:
        if self.place is None or self.place[0] != i:
            return self.exact[i]
        return replace(self.exact[i], **{self.place[1]: widened(getattr(self.rounded[i], self.place[1]))})


def widened(linear: Linear) -> Linear:
    assert isinstance(linear.weight, Rowwise | Int4)
    return Linear(linear.weight.float(), linear.bias_O, block=linear.block)


def felt(rm: lightrm.RewardModel, questions: Sequence[Question]) -> dict[Place, float]:
    """What rounding each matrix alone as rm does to the score: its mean square error, raw."""
    exact, head = exact_twin(rm)
    ids, _ = some_ids(rm, questions, FELT_TOKENS)

    def scores(place: Place | None) -> Array:
        return scores_through(OneRounded(exact.layers, native(rm)[1].decoder.layers, place), rm, exact, head, ids)

    reference, moved = scores(None), {}
    places = [(i, name) for i in range(len(exact.layers)) for name in LINEARS]
    with item_progress(len(places), "matrices rounded alone") as advance:
        for place in places:
            moved[place] = float(np.mean((scores(place) - reference) ** 2))
            advance(1)
    return moved


def costs(four: Layers, eight: Layers, places: Iterable[Place]) -> dict[Place, int]:
    """Bytes that each matrix takes more in 8 bits."""
    return {(i, name): getattr(eight[i], name).bytes - getattr(four[i], name).bytes for i, name in places}


def chosen(cost: dict[Place, int], moved: dict[Place, float], budget: int) -> list[Place]:
    """The matrices for 8 bits that are felt most for each byte, within `budget` bytes."""
    taken = []
    for place in sorted(moved, key=lambda place: -moved[place] / cost[place]):
        if cost[place] <= budget:
            taken.append(place)
            budget -= cost[place]
    return taken


def mixed_loader(eight: Collection[Place]) -> type[CompensatingLoader]:
    class MixedLoader(CompensatingLoader):
        def rounded(self, prefix: str, name: str, *rest: Any, **more: Any) -> Linear:
            whole = self.scheme
            if (int(prefix.split(".")[1]), name) in eight:
                self.scheme = replace(whole, weights="int8")
            try:
                return super().rounded(prefix, name, *rest, **more)
            finally:
                self.scheme = whole

    return MixedLoader


def error_less(reference: Array, found: Array, other: Array, prompts: Prompts) -> Estimate:
    """How much lower the mean error is in `found` than in `other`, paired, in within-prompt standard deviations."""
    gain = prompts.by_prompt(np.abs(other - reference) - np.abs(found - reference)) / spread_of(reference, prompts)
    draws = [gain[drawn].sum() / prompts.sizes[drawn].sum() for drawn in prompts.drawn()]
    return estimate(gain.sum() / prompts.sizes.sum(), np.asarray(draws), len(prompts))


def compared(path: str, questions: list[Question], data: Path) -> dict[str, Any]:
    text = calibration_text(data)
    prompts = Prompts(np.asarray([k for k, q in enumerate(questions) for _ in q.responses]))

    def scored(scheme: str, calibration: Any = text, eight: Collection[Place] = ()) -> tuple[Array, int]:
        with patch("lightrm.loading.calibrated_loader.CompensatingLoader", mixed_loader(eight)):
            rm = lightrm.load(path, scheme=scheme, max_length=LONGEST, calibration=calibration)
        asked = [q.prompt for q in questions for _ in q.responses]
        return rm.score_batch(asked, [r for q in questions for r in q.responses]).astype(np.float64), rm.report.bytes

    exact, _ = scored("fp32", None)
    coarse, fine, large = (lightrm.load(path, scheme=s, max_length=LONGEST) for s in (COARSE, FINE, "w8a8"))
    moved = felt(coarse, every(read_questions(data / "pairs_train.jsonl.gz"), 400))
    four, four_fine, eight = (native(rm)[1].decoder.layers for rm in (coarse, fine, large))
    down = [(i, "down") for i in range(len(eight))]
    more = sum(costs(four_fine, eight, down).values())
    places: dict[str, tuple[str, list[Place]]] = {
        FINE: (FINE, []),
        FELT: (COARSE, chosen(costs(four, eight, moved), moved, fine.report.bytes - coarse.report.bytes)),
        DOWN: (FINE, down),
        FELT_MORE: (FINE, chosen(costs(four_fine, eight, moved), moved, more)),
    }
    del coarse, fine, large, four, four_fine, eight
    found = {}
    for name, (scheme, in_eight) in places.items():
        found[name] = scored(scheme, eight=in_eight)
        print(f"{path} {name}: {found[name][1]} bytes", flush=True)

    def described(name: str) -> dict[str, Any]:
        scores, held = found[name]
        a = agreement(exact, scores, prompts)
        figures = {figure: dataclasses.asdict(getattr(a, figure)) for figure in FIGURES}
        return {"bytes": held, "in 8 bits": [f"layers.{i}.{matrix}" for i, matrix in places[name][1]], **figures}

    def against(name: str, other: str) -> dict[str, Any]:
        both = (exact, found[name][0], found[other][0], prompts)
        return {
            "error less": dataclasses.asdict(error_less(*both)),
            "flips less": dataclasses.asdict(flips_less(*both)),
        }

    shares = np.sort(np.asarray(list(moved.values())))[::-1]
    return {
        "prompts": len(questions),
        "answers": len(exact),
        "share of the ten most felt": float(shares[:10].sum() / shares.sum()),
        "rows": {name: described(name) for name in places},
        "rivals": {name: {"of the size of": other, **against(name, other)} for name, other in RIVALS},
    }


def table(result: dict[str, Any]) -> str:
    lines = []
    for name, model in result["models"].items():
        lines += [
            f"**{name}**, {model['prompts']} prompts with {model['answers']} answers:", "",
            "| calibrated | weights | mean error | tau-b | flips |", "| --- | ---: | ---: | ---: | ---: |",
        ]  # fmt: skip
        for row, one in model["rows"].items():
            error, tau, flips = (made(Estimate, one[figure]) for figure in FIGURES)
            figures = (error.percent(2), tau.text(3), flips.percent(2))
            lines.append(f"| {row} | {one['bytes'] / 2**20:.1f} MiB | {' | '.join(figures)} |")
        lines.append("")
        for rival, one in model["rivals"].items():
            less = [made(Estimate, one[what]).percent(2) for what in ("error less", "flips less")]
            lines.append(f"{rival}, against {one['of the size of']}: error less by {less[0]}, flips by {less[1]}.  ")
        lines.append("")
    return "\n".join([*lines, measured_on(result), ""])


def main() -> None:
    arguments = options(__doc__, pairs=PAIRS, lists=LISTS).parse_args()
    warnings.simplefilter("ignore", lightrm.TruncationWarning)
    questions = held_out(arguments.data, arguments.pairs, arguments.lists)
    models = {}
    for name, path in models_of(arguments.reference).items():
        models[name] = compared(path, questions, arguments.data)
        print(name, models[name], flush=True)
    write_result("mixed", {**provenance(("torch", "numpy", "numba", "scipy")), **this_cpu(), "models": models})
    quote("mixed", table)


if __name__ == "__main__":
    main()
