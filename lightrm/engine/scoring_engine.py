"""What RewardModel, jobs and measurements ask of an engine: from token ids to scores, whoever runs the layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from lightrm.display.progress import Advance, ignored
from lightrm.engine.residence import Residence

Scored = tuple[list[int], np.ndarray]  # which sequences, and their scores


Head = TypeVar("Head", bound="ScoreHead")


class ScoreHead(Protocol):
    """What makes scores of a model's outputs. names: of its attributes, empty if it gives one score. weights: what a
    caller's choice of attributes was multiplied into."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def weights(self) -> tuple[torch.Tensor, ...]: ...
    @property
    def undecided(self) -> bool:
        """Whether there are several attributes, and nothing makes one score of them."""

    def attributes(self: Head) -> Head:
        """Return the head that gives every attribute by itself."""

    def weighed(self: Head, weights: Sequence[float], /) -> Head:
        """Return the head with one output: the sum of the attributes, each times its weight."""


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
    def head(self) -> ScoreHead: ...

    @property
    def window(self) -> int:
        """How many tokens to pass at once, at least, if there are many."""

    def scores(
        self, sequences: Sequence[Sequence[int]], advance: Advance = ignored, head: Any = None
    ) -> Iterator[Scored]:
        """Yield scores as soon as they are computed, a group of sequences at a time, in no order; each sequence once.

        advance: called with numbers of tokens as they are done. head: another of this engine's own kind of heads.
        Raises NumericsError if a score is NaN or Inf, MemoryLimitError if a single sequence does not fit, InputError if
        nobody said which of several attributes is the score.
        """

    def all_scores(
        self, sequences: Sequence[Sequence[int]], advance: Advance = ignored, head: Any = None
    ) -> np.ndarray:
        """Return the scores of all sequences, float32 (n,), or (n, k) of attributes, in input order. Errors, advance
        and head as in `scores`."""

    def distinct_tokens(self, sequences: Sequence[Sequence[int]]) -> int:
        """Tokens that scoring these computes."""

    def warm_up(self, sequences: Sequence[Sequence[int]]) -> None:
        """Run what scoring these will run for the first time, so that only scoring is timed afterwards."""
