"""From token ids to scores: packs through decoder and head, within a budget of tokens, one caller at a time.

If the device runs out of memory, the budget is halved, and sequences that have no score yet are packed anew. This
changes no score, since a score does not depend on its pack.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch

from lightrm.architecture import Architecture, GateForm
from lightrm.display.progress import Advance, ignored
from lightrm.display.sizes import size_text
from lightrm.engine.copies import Copies
from lightrm.engine.memory import activation_bytes
from lightrm.engine.packing import Run, pack, packs, tokens_at
from lightrm.engine.residence import Residence
from lightrm.engine.scoring_engine import Scored, ScoreHead
from lightrm.errors import InputError, MemoryLimitError, NumericsError
from lightrm.kernels import arena, forks
from lightrm.model.decoder import Decoder
from lightrm.model.head import ValueHead
from lightrm.model.packed_batch import PackedBatch
from lightrm.schemes.grammar import Scheme


class MemoryWarning(UserWarning):
    """The device ran out of memory; packs are smaller from now on."""


def layer_progress(
    window: list[Run], sequences: Sequence[Sequence[int]], advance: Advance, layers: int
) -> Callable[[], None]:
    """Return a function that reports, each time a layer is done, a layer's share of the tokens of a window. Tokens that
    several sequences share count once for each."""
    tokens = sum(len(sequences[i]) for group, _ in window for i in group)
    return lambda: advance(tokens / layers)


class Engine:
    """A model that scores token ids. tokens: size of a pack, lowered if memory runs out.

    Any number of threads may call `scores` at the same time. Windows of packs are computed one after the other; only
    the thread whose turn it is touches the layers, the arena and the budget.
    """

    name = "lightrm"

    def __init__(self, decoder: Decoder, head: ValueHead, scheme: Scheme, residence: Residence) -> None:
        self.decoder, self.head, self.scheme, self.residence = decoder, head, scheme, residence
        self.device = decoder.embedding_VD.device
        self.tokens = residence.tokens
        self.arena: arena.Arena | None = None
        self.callers: set[object] = set()  # of `scores`, while the arena is kept for them
        self.warned = False
        self.forked()
        forks.call_after_fork(self)

    def forked(self) -> None:
        """In a forked child, as in a new engine: nobody computes."""
        self.turn = threading.Lock()
        self.callers.clear()
        self.arena = None

    @property
    def architecture(self) -> Architecture:
        return self.decoder.architecture

    def scores(
        self, sequences: Sequence[Sequence[int]], advance: Advance = ignored, head: ValueHead | None = None
    ) -> Iterator[Scored]:
        """Yield scores as soon as they are computed, a group of sequences at a time, in no order; each sequence once.

        advance: called after each layer with its share of the tokens. head: another one than the model's own. Raises
        NumericsError if a score is NaN or Inf, MemoryLimitError if a single sequence does not fit, InputError if the
        model has several attributes and nobody said which of them is the score.
        """
        head = self.head if head is None else head
        if head.undecided and not head.each:
            raise InputError(undecided(head))
        copies = Copies(sequences)
        waiting = copies.firsts
        caller = object()
        self.callers.add(caller)
        try:
            while waiting:
                done: set[int] = set()
                for group, found in self.score_packs([sequences[i] for i in waiting], advance, head):
                    done.update(group)
                    positions = [waiting[k] for k in group]
                    self.check_finite(positions, found, sequences)
                    yield copies.scored(positions, found, advance)
                waiting = [i for k, i in enumerate(waiting) if k not in done]  # some, where memory ran out on the way
        finally:  # at any moment, and in any thread, where a caller let go of its results in the middle: no lock
            self.callers.discard(caller)
            if not self.callers:
                self.arena = None

    def all_scores(
        self, sequences: Sequence[Sequence[int]], advance: Advance = ignored, head: ValueHead | None = None
    ) -> np.ndarray:
        """Return the scores of all sequences, float32 (n,), in input order; (n, K) of a head that gives each output by
        itself. Arguments and errors as in `scores`."""
        shape = (len(sequences), head.outputs) if head is not None and head.each else len(sequences)
        scores = np.empty(shape, dtype=np.float32)
        for group, found in self.scores(sequences, advance, head):
            scores[group] = found
        return scores

    @property
    def window(self) -> int:
        """How many tokens to pass at once, at least, if there are many: two packs, or all that are streamed
        together."""
        return self.residence.window or 2 * self.tokens

    def score_packs(self, sequences: Sequence[Sequence[int]], advance: Advance, head: ValueHead) -> Iterator[Scored]:
        """Compute one pack after the other; of a streamed model, one window of packs after the other. Stops early if
        memory ran out."""
        window: list[Run] = []
        tokens = 0
        for run in packs(sequences, self.tokens, apart=self.decoder.architecture.scaled_from):
            if window and tokens + len(run[1]) > self.residence.window:
                found = self.compute(window, sequences, advance, head)
                yield from found
                if not found:
                    return
                window, tokens = [], 0
            window.append(run)
            tokens += len(run[1])
        if window:
            yield from self.compute(window, sequences, advance, head)

    def compute(
        self, window: list[Run], sequences: Sequence[Sequence[int]], advance: Advance, head: ValueHead
    ) -> list[Scored]:
        """Return the scores of a window, or an empty list if it did not fit into memory; later packs are then
        smaller."""
        for _, batch in window:
            self.check_room(batch)
        if (gate := head.gate) is not None and gate.form.pattern:
            window = [(group, with_prompts(batch, [sequences[i] for i in group], gate.form)) for group, batch in window]
        largest = max((batch for _, batch in window), key=len)
        with self.turn:
            if self.warned and len(largest) > self.tokens and not is_path(largest):
                return []  # another thread found out, while this one waited, that such packs do not fit
            with arena.use_arena(self.arena_for(largest)):
                found = self.attempt(window, head, layer_progress(window, sequences, advance, len(self.decoder.layers)))
            if found is None:
                self.arena = None
                self.halve(largest)
        return found or []

    def arena_for(self, largest: PackedBatch) -> arena.Arena | None:
        """Return the memory for tensors between layers on a CPU. On a card PyTorch's own allocator keeps it: None."""
        if self.device.type != "cpu":
            return None
        size = activation_bytes(self.decoder.architecture, self.scheme, len(largest))
        kept = self.arena  # read once: the last of other callers may let go of it now
        if kept is None or kept.size < size:
            kept = self.arena = arena.reserved(size)
        return kept

    def attempt(self, window: list[Run], head: ValueHead, after: Callable[[], None]) -> list[Scored] | None:
        """Return None if memory ran out; everything that the attempt allocated is free again by then."""
        try:
            hidden = self.decoder.last_hiddens([batch.to(self.device) for _, batch in window], after=after)
            found = ((group, x.split(len(group))) for (group, _), x in zip(window, hidden, strict=True))
            return [(group, head(*read).cpu().numpy()) for group, read in found]
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return None

    def distinct_tokens(self, sequences: Sequence[Sequence[int]]) -> int:
        """Tokens that scoring these computes, a shared beginning once."""
        apart = self.decoder.architecture.scaled_from
        return sum(len(batch) for _, batch in packs(sequences, self.tokens, apart=apart))

    def warm_up(self, sequences: Sequence[Sequence[int]]) -> None:
        """Compile what scoring these sequences will run.

        Runs the largest and the smallest pack through one layer of each kind, twice, since the last layer of a model
        has kernels of its own: layers with a window of attention have other kernels, and other positions, than layers
        without. The results are not scores, and may overflow. The budget is lower afterwards if the memory did not
        suffice.
        """
        if not sequences:
            return
        every = sorted(packs(sequences, self.tokens, apart=self.architecture.scaled_from), key=lambda run: len(run[1]))
        for i in kinds_of_layers(self.architecture):
            engine = self.twice(i)
            for group in {tuple(group) for group, _ in (every[-1], every[0])}:
                with suppress(NumericsError):
                    list(engine.scores([sequences[k] for k in group]))
            self.tokens = min(self.tokens, engine.tokens)

    def twice(self, i: int) -> Engine:
        """Return an engine whose model has one layer of this one, two times."""
        a, decoder, layer = self.architecture, self.decoder, self.decoder.layers[i]
        alone = replace(a, layers=2, windows=(a.window(i),) * 2 if a.windows else ())
        short = Decoder(alone, decoder.embedding_VD, [layer, layer], decoder.final_norm_D, decoder.dtype)
        return Engine(short, self.head, self.scheme, self.residence)

    def check_room(self, batch: PackedBatch) -> None:
        """On a CPU, where the system ends a process that takes too much. Raises MemoryLimitError."""
        if self.device.type != "cpu" or len(batch) <= self.residence.tokens:
            return
        need = activation_bytes(self.decoder.architecture, self.scheme, len(batch))
        if need > self.residence.room:
            raise MemoryLimitError(
                f"{len(batch)} tokens at once take {size_text(need)} while they are computed, and there are "
                f"{size_text(self.residence.room)} beside the weights: lower max_length or token_budget, or give it "
                "more memory"
            )

    def halve(self, batch: PackedBatch) -> None:
        """Halve the budget after a window did not fit; batch: its largest pack. Raises MemoryLimitError if that is a
        single sequence."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if is_path(batch):
            raise MemoryLimitError(
                f"{self.device} has no memory for a sequence of {len(batch)} tokens alone: set max_length lower, take "
                "a smaller scheme, or pass memory=... to load, so that layers are streamed"
            )
        self.tokens = min(self.tokens, len(batch) // 2)
        if not self.warned:
            self.warned = True
            warnings.warn(
                f"{self.device} ran out of memory at {len(batch)} tokens at once: packs are halved until they fit, and "
                "stay so; scores are the same",
                MemoryWarning,
                stacklevel=2,
            )

    def check_finite(self, positions: list[int], found: np.ndarray, sequences: Sequence[Sequence[int]]) -> None:
        """Raise NumericsError, which says where the overflow is, if a score is NaN or Inf."""
        for k in np.flatnonzero(~np.isfinite(found.reshape(len(found), -1)).all(1))[:1]:
            raise NumericsError(
                f"the score of sequence {positions[k]} is {found[k]}: {self.first_overflow(sequences[positions[k]])} "
                f"under {self.scheme}; load with scheme='bf16' or 'fp32'; if those overflow too, the weights are bad"
            )

    def first_overflow(self, sequence: Sequence[int]) -> str:
        """Compute a sequence again and say in words where NaN or Inf first appears."""
        found: list[str] = []

        def watch(name: str, x_TD: torch.Tensor) -> None:
            if not found and not bool(torch.isfinite(x_TD).all()):
                found.append(name)

        with self.turn:
            self.decoder.last_hidden(pack([sequence]).to(self.device), watch)
        return f"activations overflow in {found[0]}" if found else "the head overflows"


def kinds_of_layers(a: Architecture) -> list[int]:
    """Return the first layer of each kind: of those with one window of attention, and one scheme of positions."""
    return sorted({(a.window(i), a.positions_in(i)): i for i in reversed(range(a.layers))}.values())


def with_prompts(batch: PackedBatch, sequences: Sequence[Sequence[int]], form: GateForm) -> PackedBatch:
    """Return a pack that is also read where the prompt of each sequence ends, behind where the sequences end. Raises
    InputError."""
    ends = [(int(last), form.prompt_end(ids)) for last, ids in zip(batch.last_S, sequences, strict=True)]
    return replace(batch, last_S=torch.cat([batch.last_S, torch.tensor(tokens_at(batch, ends))]))


def undecided(head: ScoreHead) -> str:
    """Return what to do about several attributes of which none is the score, for a message."""
    names = ", ".join(map(repr, head.names))
    return (
        f"this model gives {len(head.names)} numbers, and nobody said which is the score: {names}. Load it with "
        "label=NAME, or with weights= and a number for each; score_attributes gives them all"
    )


def is_path(batch: PackedBatch) -> bool:
    """Whether a pack is one single sequence, with its prefixes if any, which a smaller budget cannot divide."""
    return len(batch) == int(batch.position_ids_T[-1]) + 1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out. PyTorch's CPU allocator has no exception class for it."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
