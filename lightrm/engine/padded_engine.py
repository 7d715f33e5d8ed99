"""From token ids to scores through a class of transformers: one padded batch after the other, one caller at a time.

The score of a sequence is what the class gives for that sequence alone. Batches change it by float rounding at most. If
memory runs out, the budget of tokens is halved, and sequences that have no score yet are batched anew.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from lightrm.display.progress import Advance, ignored
from lightrm.display.sizes import size_text
from lightrm.engine.class_head import ClassHead
from lightrm.engine.copies import Copies
from lightrm.engine.engine import MemoryWarning, is_out_of_memory, undecided
from lightrm.engine.padded_batches import Forward, Grouping, batches, padded
from lightrm.engine.residence import Residence
from lightrm.engine.scoring_engine import Scored, Shape
from lightrm.errors import InputError, MemoryLimitError, NumericsError
from lightrm.kernels import forks
from lightrm.schemes.grammar import Scheme
from lightrm.text.pair_texts import Segments


class PaddedEngine:
    """A model that scores token ids. tokens: of a batch with its padding, lowered if memory runs out.

    forward: the model. head: makes scores of its outputs. each: bytes that a token takes while it is computed. pad: the
    id that fills rows. types: whether the model takes token types; segments: how they follow from ids, None if all are
    0.
    """

    name = "transformers"

    def __init__(
        self,
        forward: Forward,
        architecture: Shape,
        head: ClassHead,
        scheme: Scheme,
        device: torch.device,
        residence: Residence,
        each: int,
        grouping: Grouping,
        pad: int,
        types: bool,
        segments: Segments | None,
    ) -> None:
        self.forward, self.architecture, self.head, self.scheme = forward, architecture, head, scheme
        self.device, self.residence, self.each, self.grouping, self.pad = device, residence, each, grouping, pad
        self.types, self.segments = types, segments
        self.tokens = residence.tokens
        self.warned = False
        self.forked()
        forks.call_after_fork(self)

    def forked(self) -> None:
        """In a forked child, as in a new engine: nobody computes."""
        self.turn = threading.Lock()

    @property
    def window(self) -> int:
        return 2 * self.tokens

    def scores(
        self, sequences: Sequence[Sequence[int]], advance: Advance = ignored, head: ClassHead | None = None
    ) -> Iterator[Scored]:
        """As in `scoring_engine`. advance: called after each batch with its tokens, without padding."""
        head = self.head if head is None else head
        if head.undecided and not head.each:
            raise InputError(undecided(head))
        copies = Copies(sequences)
        waiting = copies.firsts
        while waiting:
            done: set[int] = set()
            for group in batches([len(sequences[i]) for i in waiting], self.tokens, self.grouping):
                positions = [waiting[k] for k in group]
                found = self.compute([sequences[i] for i in positions], head)
                if found is None:
                    break  # memory ran out: what is left is batched anew
                done.update(positions)
                advance(sum(len(sequences[i]) for i in positions))
                self.check_finite(positions, found)
                yield copies.scored(positions, found, advance)
            waiting = [i for i in waiting if i not in done]

    def all_scores(
        self, sequences: Sequence[Sequence[int]], advance: Advance = ignored, head: ClassHead | None = None
    ) -> np.ndarray:
        columns = (len(head.names),) if head is not None and head.each else ()
        scores = np.empty((len(sequences), *columns), dtype=np.float32)
        for group, found in self.scores(sequences, advance, head):
            scores[group] = found
        return scores

    def compute(self, rows: Sequence[Sequence[int]], head: ClassHead) -> np.ndarray | None:
        """Return the scores of a batch, or None if it did not fit into memory; later batches are then smaller."""
        size = len(rows) * max(map(len, rows))
        self.check_room(size)
        with self.turn:
            if len(rows) > 1 and size > self.tokens:
                return None  # another thread found out, while this one waited, that such batches do not fit
            try:
                outputs = self.forward(*padded(rows, self.types_of(rows), self.pad, self.device))
                return np.asarray(head(outputs).numpy())
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            self.halve(len(rows), size)
        return None

    def types_of(self, rows: Sequence[Sequence[int]]) -> list[list[int]] | None:
        if not self.types:
            return None
        return [[0] * len(row) if self.segments is None else self.segments.types(row) for row in rows]

    def distinct_tokens(self, sequences: Sequence[Sequence[int]]) -> int:
        """Tokens that scoring these computes, with padding."""
        lengths = [len(sequences[k]) for k in Copies(sequences).firsts]
        return sum(len(group) * lengths[group[0]] for group in batches(lengths, self.tokens, self.grouping))

    def warm_up(self, sequences: Sequence[Sequence[int]]) -> None:
        """Run the largest batch."""
        largest = next(batches([len(ids) for ids in sequences], self.tokens, self.grouping), [])
        if largest:
            self.compute([sequences[i] for i in largest], self.head)

    def check_room(self, size: int) -> None:
        """On a CPU, where the system ends a process that takes too much. Raises MemoryLimitError."""
        need = size * self.each
        if self.device.type == "cpu" and size > self.residence.tokens and need > self.residence.room:
            raise MemoryLimitError(
                f"{size} tokens at once take {size_text(need)} while they are computed, and there are "
                f"{size_text(self.residence.room)} beside the weights: lower max_length, or give it more memory"
            )

    def halve(self, rows: int, size: int) -> None:
        """Halve the budget after a batch did not fit. Raises MemoryLimitError if it was a single sequence."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if rows == 1:
            raise MemoryLimitError(
                f"{self.device} has no memory for a sequence of {size} tokens alone: set max_length lower, or take a "
                "smaller scheme"
            )
        self.tokens = min(self.tokens, size // 2)
        if not self.warned:
            self.warned = True
            warnings.warn(
                f"{self.device} ran out of memory at {size} tokens at once: batches are halved until they fit, and "
                "stay so; scores are the same but for rounding",
                MemoryWarning,
                stacklevel=2,
            )

    def check_finite(self, positions: list[int], found: np.ndarray) -> None:
        for k in np.flatnonzero(~np.isfinite(found))[:1]:
            raise NumericsError(
                f"the score of sequence {positions[k]} is {found[k]} under {self.scheme}; load with scheme='bf16' or "
                "'fp32'; if those overflow too, the weights are bad"
            )
