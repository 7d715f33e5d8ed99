"""Sequences of token ids that a caller passed, checked against a model's vocabulary and positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lightrm.engine.scoring_engine import Shape
from lightrm.errors import InputError
from lightrm.text.columns import items, kind


def checked_ids(sequences: Sequence[Sequence[int]], a: Shape) -> list[list[int]]:
    """Return sequences of ids as lists. Each may be a list, an array or a tensor. Raises InputError on an empty one, an
    id outside the vocabulary, or more tokens than positions."""
    given = items(sequences, "sequences must be a list of lists of whole numbers")
    return [checked(ids, k, a) for k, ids in enumerate(given)]


def checked(ids: Sequence[int], k: int, a: Shape) -> list[int]:
    array = np.asarray(ids.cpu() if isinstance(ids, torch.Tensor) else ids)
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
        raise InputError(f"sequence {k} must be a non-empty list of whole numbers, found {kind(ids)}")
    if array.min() < 0 or array.max() >= a.vocabulary:
        wrong = array[(array < 0) | (array >= a.vocabulary)][0]
        raise InputError(f"sequence {k} holds id {wrong}, this model has ids 0 to {a.vocabulary - 1}")
    if len(array) > a.max_positions:
        raise InputError(f"sequence {k} has {len(array)} tokens, this model has {a.max_positions} positions")
    return [int(i) for i in array]
