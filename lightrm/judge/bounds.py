"""What a fidelity measurement leaves with a model: a sentence, and how far apart two scores in wrong order can be."""

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
    """The largest difference of two quick scores that stand in another order than the exact ones; 0 if none do.

    exact, quick: of one prompt's answers, float (n,). The order is right if all answers that are no further apart are
    ordered by their exact scores. A tie that was torn is another order.
    """
    wrong = (np.abs(gaps[np.sign(gaps) != np.sign(true)]) for true, gaps in differences(exact, quick))
    return max((float(some.max(initial=0.0)) for some in wrong), default=0.0)


def order_error(exact: Scores, quick: Scores) -> float:
    """The largest error of a difference that could have turned the order of its two answers round; 0 if none could.

    exact, quick: as in `wrong_gap`, which is never larger. An error can do so, by one of its signs, where it is no
    smaller than the quick difference.
    """
    errors = ((np.abs(gaps - true), np.abs(gaps)) for true, gaps in differences(exact, quick))
    return max((float(error[gap <= error].max(initial=0.0)) for error, gap in errors), default=0.0)


def differences(exact: Scores, quick: Scores) -> Iterator[tuple[Scores, Scores]]:
    """Each answer's differences from those before it, exact and quick, float64."""
    f, q = np.asarray(exact, np.float64), np.asarray(quick, np.float64)
    return ((f[i] - f[:i], q[i] - q[:i]) for i in range(1, len(f)))


@dataclass(frozen=True, slots=True)
class Limit:
    """How far apart, in raw scores, answers are in order; confidence: that they are, for all answers of a further
    prompt; 0 where nobody measured that."""

    gap: float
    confidence: float = 0.0

    def __str__(self) -> str:
        sure = f", which is enough for {100 * self.confidence:.2f} % of prompts or more" if self.confidence else ""
        return f"{self.gap:.4f}{sure}"


@dataclass(frozen=True, slots=True)
class Bound:
    """What was measured: prompts, how many there were with each number of answers; gaps: the wrong gaps above 0 of all
    of them, in raw scores, each with the number of answers, largest first; error: the largest of their order errors.

    Of N + 1 exchangeable values the last is above the k-th largest of the others with probability k / (N + 1) at most
    (split conformal prediction, Vovk et al. 2005): for a further prompt drawn like these, the k-th largest wrong gap is
    enough with a confidence of 1 - k / (N + 1). More answers are more chances of a wrong order, and some of a prompt's
    answers have no larger wrong gap than all of them: N are the prompts with as many answers or more. Where they are
    too few for the confidence that is asked for, the largest order error is taken: it is surer than N / (N + 1), nobody
    knows by how much.

    Raises InputError if a number is none that can have been measured.
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
        """The smallest gap of that confidence for a prompt with so many answers, or what the prompts can say."""
        measured = sum(count for n, count in self.prompts.items() if n >= answers)
        gaps = [gap for gap, n in self.gaps if n >= answers]
        k = int((1 - confidence) * (measured + 1) + 1e-9)  # 1 - 0.995 is a little less than 0.005
        if k == 0:
            return Limit(self.error, measured / (measured + 1))
        return Limit(gaps[k - 1] if k <= len(gaps) else 0.0, 1 - k / (measured + 1))

    @classmethod
    def of(cls, prompts: Iterable[tuple[Scores, Scores]]) -> Bound:
        """From the exact and the quick scores of each prompt; a prompt with a single answer says nothing."""
        many = [(exact, quick) for exact, quick in prompts if len(exact) > 1]
        gaps = sorted(((wrong_gap(*one), len(one[0])) for one in many), reverse=True)
        error = max((order_error(*one) for one in many), default=math.inf)
        sizes = Counter(len(exact) for exact, _ in many)
        return cls(dict(sorted(sizes.items())), tuple(one for one in gaps if one[0]), error)

    @classmethod
    def read(cls, raw: Any) -> Bound:
        """From what `dataclasses.asdict` made of one, in JSON. Raises InputError on anything else."""
        return made(cls, raw, "the bound")

    def __str__(self) -> str:
        return ", ".join(f"{n} answers: {self.limit(n)}" for n in self.prompts)


@dataclass(frozen=True, slots=True)
class FidelityNote:
    """summary: one line; reference: the scheme it was measured against; bound: for exact rankings."""

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
