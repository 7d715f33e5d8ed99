"""Token ids -> rectangular batches, for models that are not ours: sorted by length and padded at the end.

A class of transformers decides by itself where the score is read, and not all of them find that place in a padded row.
So each model is asked once, with a few sequences alone and together:

    padded          the scores of padded rows are those of the sequences alone
    equal lengths   they are not, but several sequences of one length may share a batch
    alone           neither; transformers refuses a batch, for example, if the config names no pad token
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Literal

import torch

Grouping = Literal["padded", "equal lengths", "alone"]
# Ids (B, T), mask (B, T) with 1 for tokens, token types (B, T) or None -> outputs (B, labels), in float32.
Forward = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]
Ids = Sequence[int]

PROBE_LENGTHS = (5, 8, 11)
SPREAD_SHARE = 0.05  # of the spread of the probes' scores that rounding may move one of them
ROUNDINGS = 4


def batches(lengths: Sequence[int], budget: int, grouping: Grouping) -> Iterator[list[int]]:
    """Divide sequences, by position, into batches of at most `budget` tokens with padding, the longest first. A longer
    sequence gets a batch of its own."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    same = groupby(order, key=lambda i: lengths[i] if grouping == "equal lengths" else 0)
    for _, group in same:
        members = list(group)
        while members:
            count = 1 if grouping == "alone" else max(1, budget // lengths[members[0]])
            yield members[:count]
            members = members[count:]


def padded(
    sequences: Sequence[Ids], types: Sequence[Ids] | None, pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return ids (B, T), mask and token types of some sequences on a device."""
    longest = max(map(len, sequences))

    def filled(rows: Sequence[Ids], value: int) -> torch.Tensor:
        return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], device=device)

    mask = filled([[1] * len(row) for row in sequences], 0)
    return filled(sequences, pad), mask, None if types is None else filled(types, 0)


def find_grouping(
    forward: Forward, vocabulary: int, avoided: Sequence[int], pad: int, types: bool, device: torch.device,
    rounding: float, length_matters: bool = False,
) -> Grouping:  # fmt: skip
    """Return how sequences of a model may share a batch.

    avoided: ids that mean something to a class, such as pad. rounding: the relative step of the compute dtype.
    length_matters: whether a longer row may change the score of another. Raises what the model raises for a sequence
    alone, ValueError if it gives one sequence two scores.
    """
    usable = [i for i in range(vocabulary) if i not in avoided][-(2**16) :]
    draw = torch.Generator().manual_seed(0)
    probes = [[usable[k] for k in torch.randint(len(usable), (n,), generator=draw).tolist()] for n in PROBE_LENGTHS]

    def scores(rows: list[list[int]]) -> torch.Tensor:
        zeros = [[0] * len(row) for row in rows] if types else None
        return forward(*padded(rows, zeros, pad, device)).float().cpu()

    def together(rows: list[list[int]]) -> bool:
        alone = torch.cat([scores([row]) for row in rows])
        try:
            found = scores(rows)
        except (ValueError, RuntimeError, IndexError, AssertionError):  # how classes say that they take no such batch
            return False
        spread = float((alone.max(0).values - alone.min(0).values).max())
        allowed = SPREAD_SHARE * spread + ROUNDINGS * rounding * float(alone.abs().max())
        return found.shape == alone.shape and bool((found - alone).abs().max() <= allowed)

    once, again = (scores(probes[:1]) for _ in range(2))
    if float((once - again).abs().max()) > ROUNDINGS * rounding * float(once.abs().max()):
        raise ValueError("it gives one text two scores, one after the other: it draws numbers at random")
    if not length_matters and together(probes):
        return "padded"
    return "equal lengths" if together([row[: PROBE_LENGTHS[0]] for row in probes]) else "alone"
