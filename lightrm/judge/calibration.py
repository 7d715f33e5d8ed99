"""Making scores comparable, as a separate, visible step: nothing in lightrm applies one of these by itself.

    Affine     a * score + b, fitted by least squares to the scores of a reference: puts one model on another's scale
    Platt      sigmoid(a * score + b), fitted to labels by maximum likelihood (Platt 1999, with his smoothed targets)
    Isotonic   the non-decreasing function closest to labels or to a reference (pool adjacent violators), flat outside

Each is fitted with `fit`, applied by calling it, saved as JSON with `save` and read back with `read_calibration`. numpy
float64 (n,) in, float64 (n,) out.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import isotonic_regression, minimize
from scipy.special import expit

from lightrm.errors import InputError
from lightrm.typed_json import made, read_object

Array = NDArray[np.float64]
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Calibration:
    """What the three share: each is saved as its name and its fields. Raises InputError on NaN or Inf."""

    kind: ClassVar[str]

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not np.isfinite(value).all():
                raise InputError(f"a calibration's {name} must be finite, found {value!r:.60}")

    def __call__(self, scores: ArrayLike) -> Array:
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        raw = {"format": FORMAT, "kind": self.kind} | dataclasses.asdict(self)
        Path(path).write_text(json.dumps(raw) + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Affine(Calibration):
    """slope * score + offset."""

    slope: float
    offset: float
    kind: ClassVar[str] = "affine"

    @classmethod
    def fit(cls, scores: ArrayLike, reference: ArrayLike) -> Affine:
        """Fit by least squares. Raises InputError if all scores are equal."""
        x, y = matched(scores, reference)
        spread = x - x.mean()
        if not spread.any():
            raise InputError("an affine calibration needs scores that differ, all of these are equal")
        slope = float(spread @ y / (spread @ spread))
        return cls(slope, float(y.mean() - slope * x.mean()))

    def __call__(self, scores: ArrayLike) -> Array:
        return self.slope * np.asarray(scores, np.float64) + self.offset


@dataclass(frozen=True, slots=True)
class Platt(Calibration):
    """sigmoid(slope * score + offset): the probability of the label 1."""

    slope: float
    offset: float
    kind: ClassVar[str] = "platt"

    @classmethod
    def fit(cls, scores: ArrayLike, labels: ArrayLike) -> Platt:
        """Fit to labels, 0 or 1. Raises InputError unless both occur."""
        x, y = matched(scores, labels)
        good = int(y.sum())
        if not np.isin(y, (0, 1)).all() or good in (0, len(y)):
            raise InputError("Platt's calibration needs labels 0 and 1, and both of them")
        target = np.where(y == 1, (good + 1) / (good + 2), 1 / (len(y) - good + 2))
        center, scale = float(x.mean()), float(x.std()) or 1.0
        z = (x - center) / scale

        def loss(p: Array) -> tuple[float, Array]:
            logit = p[0] * z + p[1]
            off = expit(logit) - target
            return float(np.logaddexp(0, logit).sum() - target @ logit), np.asarray([off @ z, off.sum()])

        slope, offset = minimize(loss, np.zeros(2), jac=True, method="BFGS").x
        return cls(float(slope / scale), float(offset - slope * center / scale))

    def __call__(self, scores: ArrayLike) -> Array:
        return np.asarray(expit(self.slope * np.asarray(scores, np.float64) + self.offset), np.float64)


@dataclass(frozen=True, slots=True)
class Isotonic(Calibration):
    """Linear between (knot, value) points, both non-decreasing."""

    knots: tuple[float, ...]
    values: tuple[float, ...]
    kind: ClassVar[str] = "isotonic"

    def __post_init__(self) -> None:
        Calibration.__post_init__(self)
        if not self.knots or len(self.knots) != len(self.values):
            raise InputError(f"expected a value for each knot, found {len(self.knots)} and {len(self.values)}")
        if min([*np.diff(self.knots), *np.diff(self.values)], default=0) < 0:
            raise InputError("the knots and the values of an isotonic calibration must not decrease")

    @classmethod
    def fit(cls, scores: ArrayLike, targets: ArrayLike) -> Isotonic:
        """Fit to targets: labels, or another model's scores. Equal scores share the mean of their targets."""
        x, y = matched(scores, targets)
        knots, index, counts = np.unique(x, return_inverse=True, return_counts=True)
        values = isotonic_regression(np.bincount(index, y) / counts, weights=counts).x
        bends = np.diff(values) != 0
        inner = np.r_[True, bends[:-1] | bends[1:], True][: len(knots)]
        return cls(tuple(knots[inner].tolist()), tuple(values[inner].tolist()))

    def __call__(self, scores: ArrayLike) -> Array:
        return np.interp(np.asarray(scores, np.float64), self.knots, self.values)


KINDS: dict[str, type[Affine] | type[Platt] | type[Isotonic]] = {kind.kind: kind for kind in (Affine, Platt, Isotonic)}


def read_calibration(path: str | Path) -> Affine | Platt | Isotonic:
    """Read a saved calibration. Raises InputError if the file holds none."""
    raw = read_object(Path(path), "a calibration")
    form, kind = raw.pop("format", None), raw.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"{path} is not a calibration: its kind is {kind!r:.40}, expected one of {', '.join(KINDS)}")
    if form != FORMAT:
        raise InputError(f"{path} is a calibration of another format: fit it again")
    return made(KINDS[kind], raw, str(path))


def matched(scores: ArrayLike, targets: ArrayLike) -> tuple[Array, Array]:
    """Return both as float64 arrays. Raises InputError unless both are finite and of the same length."""
    x, y = np.asarray(scores, np.float64), np.asarray(targets, np.float64)
    if x.ndim != 1 or x.shape != y.shape or not len(x):
        raise InputError(f"expected two lists of numbers of one length, found shapes {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise InputError("there is NaN or Inf among the numbers to fit")
    return x, y
