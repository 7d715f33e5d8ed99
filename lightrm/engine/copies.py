"""Equal sequences are computed once, and all of them get that score.

Otherwise equal answers could score differently: the rounding of a float product may depend on the row of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightrm.display.progress import Advance
from lightrm.engine.scoring_engine import Scored
from lightrm.text.conversation import together


class Copies:
    """Which of some sequences of ids are equal. firsts: the position of the first of each."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self.lengths = [len(ids) for ids in sequences]
        self.equal = {same[0]: same for same in together([tuple(ids) for ids in sequences])}
        self.firsts = list(self.equal)

    def scored(self, firsts: Sequence[int], scores: np.ndarray, advance: Advance) -> Scored:
        """Return the scores (n,) or (n, K) of n firsts with those of all their copies, whose tokens are reported to
        advance."""
        groups = [self.equal[k] for k in firsts]
        if copied := sum(self.lengths[same[0]] * (len(same) - 1) for same in groups):
            advance(copied)
        return [k for same in groups for k in same], scores.repeat([len(same) for same in groups], axis=0)
