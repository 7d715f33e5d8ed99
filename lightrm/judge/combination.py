"""One reward from a helpfulness and a safety model, as in Llama 2 (arXiv 2307.09288, section 3.2.2)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit

from lightrm.errors import InputError
from lightrm.judge.calibration import Array, matched

UNSAFE_BELOW = 0.15  # on the sigmoid scale: Llama 2's, calibrated for its own safety model


def combine(
    helpful: ArrayLike, safe: ArrayLike, *, risky: Sequence[bool] | None = None, unsafe_below: float = UNSAFE_BELOW,
    whiten: bool = True,
) -> Array:  # fmt: skip
    """Combine the scores that two models gave to n answers into one reward each, float64 (n,).

    helpful, safe: raw scores (n,); their sigmoids are the paper's R_h and R_s. risky: whether the prompt asks for
    something unsafe. The reward is the safety model's if the prompt is risky or R_s is below `unsafe_below`, otherwise
    the helpfulness model's. The logit of the sigmoid is the raw score again. whiten: shift and scale rewards to mean 0
    and standard deviation 1 over the batch (0 if all are equal).

    0.15 is -1.73 as a raw score. It was found for Meta's model. Bradley-Terry scores have no zero of their own, so find
    yours on labelled answers, for instance with `Platt`. Raises InputError if lengths differ.
    """
    h, s = matched(helpful, safe)
    if not 0 <= unsafe_below <= 1:
        raise InputError(f"unsafe_below is a probability between 0 and 1, found {unsafe_below}")
    asked = np.zeros(len(h), bool) if risky is None else np.asarray(risky, bool)
    if asked.shape != h.shape:
        raise InputError(f"risky must say something of each of the {len(h)} answers, found {asked.size}")
    combined: Array = np.where(asked | (expit(s) < unsafe_below), s, h)
    if whiten:
        combined = (combined - combined.mean()) / (float(combined.std()) or 1.0)
    return combined
