"""What RewardModel, jobs and measurements ask of an engine: from token ids to scores, whoever runs the layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from lightrm.display.progress import Advance, ignored
from lightrm.engine.residence import Residence

Scored = tuple[list[int], np.ndarray]  # which sequences, and their scores


class Shape(Protocol):
    """What is known of a model's layers. positions: what they mean, as text. vocabulary: rows of its embedding."""

    @property
    def layers(self) -> int: ...
    @property
    def positions(self) -> object: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def max_positions(self) -> int: ...


class ScoringEngine(Protocol):
    """A model that scores token ids. tokens: computed at once, lowered if memory runs out."""

    tokens: int
    residence: Residence

    @property
    def name(self) -> str:
        """As `load(engine=...)` names it."""

    @property
    def device(self) -> torch.device: ...
    @property
    def architecture(self) -> Shape: ...
    @property
    def head(self) -> object:
        """The value head, to be shown as text."""

    @property
    def window(self) -> int:
        """How many tokens to pass at once, at least, if there are many."""

    def scores(self, sequences: Sequence[Sequence[int]], advance: Advance = ignored) -> Iterator[Scored]:
        """Yield scores as soon as they are computed, a group of sequences at a time, in no order; each sequence once.

        advance: called with numbers of tokens as they are done. Raises NumericsError if a score is NaN or Inf,
        MemoryLimitError if a single sequence does not fit.
        """

    def all_scores(self, sequences: Sequence[Sequence[int]], advance: Advance = ignored) -> np.ndarray:
        """Return the scores of all sequences, float32 (n,), in input order. Errors and advance as in `scores`."""

    def distinct_tokens(self, sequences: Sequence[Sequence[int]]) -> int:
        """Tokens that scoring these computes."""

    def warm_up(self, sequences: Sequence[Sequence[int]]) -> None:
        """Run what scoring these will run for the first time, so that only scoring is timed afterwards."""
