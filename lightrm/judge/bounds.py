"""What a fidelity measurement stores with a model: one sentence, and how far apart two scores in the wrong order can
be."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightrm.errors import InputError
from lightrm.typed_json import INFINITE, made

CONFIDENCE = 0.995
Scores = NDArray[np.floating]


def wrong_gap(exact: Scores, quick: Scores) -> float:
    """Return the largest difference between two quick scores that are in another order than the exact ones; 0 if none
    are.

    exact, quick: scores of one prompt's answers, float (n,). If all answers that are no further apart than this are
    ordered by their exact scores, the order is right. Breaking a tie of the exact scores counts as another order.
    """
    wrong = (np.abs(gaps[np.sign(gaps) != np.sign(true)]) for true, gaps in differences(exact, quick))
    return max((float(some.max(initial=0.0)) for some in wrong), default=0.0)


def order_error(exact: Scores, quick: Scores) -> float:
    """Return the largest error of a difference that could have reversed the order of its two answers; 0 if none could.

    exact, quick: as in `wrong_gap`, whose result is never larger. An error could reverse the order, with one of its
    signs, if it is not smaller than the quick difference.
    """
    errors = ((np.abs(gaps - true), np.abs(gaps)) for true, gaps in differences(exact, quick))
    return max((float(error[gap <= error].max(initial=0.0)) for error, gap in errors), default=0.0)


def differences(exact: Scores, quick: Scores) -> Iterator[tuple[Scores, Scores]]:
    """Yield each answer's differences from the answers before it, exact and quick, float64."""
    f, q = np.asarray(exact, np.float64), np.asarray(quick, np.float64)
    return ((f[i] - f[:i], q[i] - q[:i]) for i in range(1, len(f)))


@dataclass(frozen=True, slots=True)
class Limit:
    """How far apart answers must be, in raw scores, to be in the right order.

    confidence: probability that this holds for all answers of a further prompt; 0 if it was not measured.
    """

    gap: float
    confidence: float = 0.0

    def __str__(self) -> str:
        sure = f", which is enough for {100 * self.confidence:.2f} % of prompts or more" if self.confidence else ""
        return f"{self.gap:.4f}{sure}"


@dataclass(frozen=True, slots=True)
class Bound:
    """What was measured on some prompts.

    prompts: how many there were, by their number of answers. gaps: all wrong gaps above 0, in raw scores, each with the
    number of answers of its prompt, the largest first. error: the largest order error.

    Of N + 1 exchangeable values the last exceeds the k-th largest of the others with probability at most k / (N + 1)
    (split conformal prediction, Vovk et al. 2005). So for a further prompt drawn like these, the k-th largest wrong gap
    is enough with confidence 1 - k / (N + 1). More answers mean more chances of a wrong order, and a part of a prompt's
    answers has no larger wrong gap than all of them; so N counts the prompts with as many answers or more. If these are
    too few for the confidence that is asked for, the largest order error is used. Its confidence is above N / (N + 1),
    but by an unknown amount.

    Raises InputError if a number cannot have been measured.
    """

    prompts: Mapping[int, int]
    gaps: tuple[tuple[float, int], ...]
    error: float = field(metadata=INFINITE)

    def __post_init__(self) -> None:
        if any(count < 0 for count in self.prompts.values()):
            raise InputError(f"a bound counts prompts, found {dict(self.prompts)}")
        if not (self.error >= 0 and all(gap >= 0 for gap, _ in self.gaps)):  # a NaN is not
            raise InputError("a bound's gaps and error are distances, 0 or more: one of them is below 0 or NaN")
        if any(after > before for (before, _), (after, _) in pairwise(self.gaps)):
            raise InputError("a bound's gaps stand in order, the largest first")

    def limit(self, answers: int = 2, confidence: float = CONFIDENCE) -> Limit:
        """Return the smallest gap with this confidence for a prompt with so many answers, or with the confidence that
        the measured prompts allow."""
        measured = sum(count for n, count in self.prompts.items() if n >= answers)
        gaps = [gap for gap, n in self.gaps if n >= answers]
        k = int((1 - confidence) * (measured + 1) + 1e-9)  # 1 - 0.995 is a little less than 0.005
        if k == 0:
            return Limit(self.error, measured / (measured + 1))
        return Limit(gaps[k - 1] if k <= len(gaps) else 0.0, 1 - k / (measured + 1))

    @classmethod
    def of(cls, prompts: Iterable[tuple[Scores, Scores]]) -> Bound:
        """Make a bound from the exact and the quick scores of each prompt. Prompts with a single answer are ignored."""
        many = [(exact, quick) for exact, quick in prompts if len(exact) > 1]
        gaps = sorted(((wrong_gap(*one), len(one[0])) for one in many), reverse=True)
        error = max((order_error(*one) for one in many), default=math.inf)
        sizes = Counter(len(exact) for exact, _ in many)
        return cls(dict(sorted(sizes.items())), tuple(one for one in gaps if one[0]), error)

    @classmethod
    def read(cls, raw: Any) -> Bound:
        """Read a bound from the JSON of its `dataclasses.asdict`. Raises InputError on anything else."""
        return made(cls, raw, "the bound")

    def __str__(self) -> str:
        return ", ".join(f"{n} answers: {self.limit(n)}" for n in self.prompts)


@dataclass(frozen=True, slots=True)
class FidelityNote:
    """summary: one line. reference: the scheme that the model was compared with. bound: for exact rankings."""

    summary: str
    reference: str
    bound: Bound

    @classmethod
    def read(cls, raw: Any) -> FidelityNote:
        """As `Bound.read`."""
        return made(cls, raw, "what was measured")


def bound_for(asked: float | Bound | None, confidence: float, note: FidelityNote | None, scheme: str) -> Bound:
    """Return the bound that an exact ranking works with: the one asked for, else the one measured of the model.

    asked: a measured bound, or a difference of raw scores. Raises InputError where confidence or bound is no such
    number, and where none is known.
    """
    if not is_number(confidence) or not 0 < confidence < 1:
        raise InputError(f"confidence must be above 0 and below 1, such as 0.995, found {confidence!r}")
    if asked is None and note is None:
        raise InputError(
            f"how far {scheme} moves a difference of two scores is not known: measure it with `lightrm fidelity`, and "
            "pass bound=report.row(scheme).bound, or load a quantized folder that was measured"
        )
    if asked is None:
        assert note is not None
        return note.bound
    if isinstance(asked, Bound):
        return asked
    if not is_number(asked) or not asked >= 0:  # a NaN is not
        raise InputError(f"bound must be a difference of raw scores, 0 or more, or a report's, found {asked!r}")
    return Bound({}, (), float(asked))


def is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)
