"""Which number of a head with several attributes is the score: one of them, or all, each times a weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real

from lightrm.engine.scoring_engine import Head
from lightrm.errors import InputError

Weights = Sequence[float] | Mapping[str, float]


def chosen(head: Head, label: str | None, weights: Weights | None) -> Head:
    """Return the head that gives the score that the caller asked for; the same one if nothing was asked for.

    weights: a number for each attribute in order, or by name, where the others count 0. Raises InputError.
    """
    if label is None and weights is None:
        return head
    if label is not None and weights is not None:
        raise InputError("pass label or weights, not both")
    names = head.names
    if not names:
        raise InputError("label and weights are for models with several attributes; this one has a single output")
    asked = {str(label): 1.0} if weights is None else weights
    if not isinstance(asked, Mapping):
        given = list(asked)
        if len(given) != len(names):
            raise InputError(f"weights has {len(given)} numbers, the model {len(names)} attributes: {shown(names)}")
        asked = dict(zip(names, given, strict=True))
    strays = [name for name in asked if name not in names]
    if strays:
        raise InputError(f"the model has no attribute {strays[0]!r}; it has {shown(names)}")
    for name, weight in asked.items():
        if not isinstance(weight, Real) or isinstance(weight, bool) or not math.isfinite(weight):
            raise InputError(f"the weight of {name!r} must be a finite number, found {weight!r}")
    return head.weighed([float(asked.get(name, 0.0)) for name in names])


def shown(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
