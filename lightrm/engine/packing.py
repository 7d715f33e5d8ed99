"""Token ids -> packs in which a common beginning of several sequences is computed once.

Sequences are sorted lexicographically, so that neighbours share the longest prefixes. A run of neighbours becomes one
pack: a tree of segments, where an inner segment is the common beginning of several sequences. Deeper sharing (a
dialogue scored turn by turn, a system prompt that all texts have) is the same tree with more levels.

A sequence that is the beginning of another one, such as an answer up to one of its steps, needs no segment: it is read
inside the other one, and costs nothing.

The cost of a pack is the number of its distinct tokens. A pack ends where the token budget does, or slightly earlier if
then fewer tokens are computed again in the next pack.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch

from lightrm.kernels.segments import ROOT, Segment
from lightrm.model.packed_batch import PackedBatch

SHARE_NOTHING = 2**31  # as `least_shared`: nothing is shared
LEAST_SHARED = 8  # tokens that a segment of its own saves; fewer are computed again
Ids = Sequence[int]
Run = tuple[list[int], PackedBatch]  # which sequences, and their pack; last_S in the same order


def packs(
    sequences: Sequence[Ids], budget: int, least_shared: int = LEAST_SHARED, apart: int | None = None
) -> Iterator[Run]:
    """Divide sequences into packs of at most `budget` distinct tokens. A longer sequence gets a pack of its own, with
    its beginnings. No sequence may be empty.

    least_shared: share a prefix only if it has so many tokens or more; SHARE_NOTHING shares none. apart: sequences of
    more tokens than this get no pack together with others: their positions are computed in another way.
    """
    if apart is not None:
        long = [len(ids) > apart for ids in sequences]
        for kind in (False, True):
            group = [k for k, is_long in enumerate(long) if is_long == kind]
            for order, batch in packs([sequences[k] for k in group], budget, least_shared):
                yield [group[k] for k in order], batch
        return
    arrays = [np.asarray(ids, dtype=np.int64) for ids in sequences]
    order = sorted(range(len(arrays)), key=[ids.astype(">u4").tobytes() for ids in arrays].__getitem__)
    arrays = [arrays[i] for i in order]
    shared = [0] + [common_prefix(a, b) for a, b in pairwise(arrays)]
    lengths = [len(ids) for ids in arrays]
    first = 0
    while first < len(arrays):
        end = run_end(lengths, shared, first, budget)
        batch = woods(arrays[first:end], shared[first:end], least_shared)
        while len(batch) > max(budget, *lengths[first:end]):  # prefixes too short to be shared were counted once
            end = max(first + 1, first + (end - first) * budget // len(batch))
            batch = woods(arrays[first:end], shared[first:end], least_shared)
        yield order[first:end], batch
        first = end


def pack(sequences: Sequence[Ids], least_shared: int = LEAST_SHARED) -> PackedBatch:
    """Return all sequences in one pack, last_S in their order."""
    ((order, batch),) = packs(sequences, sum(len(ids) for ids in sequences), least_shared)
    return PackedBatch(batch.token_ids_T, batch.position_ids_T, batch.segments, batch.last_S[np.argsort(order)])


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Return the length of the longest common prefix."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length


def run_end(lengths: list[int], shared: list[int], first: int, budget: int) -> int:
    """Return the end of the run that begins at `first`. shared[k]: length of the prefix that sequences k - 1 and k
    share.

    If the budget ends a run, it is cut in its second half, where the next sequence shares least with the one before.
    """
    ahead = [0, lengths[first]]  # ahead[m]: distinct tokens of the first m members
    for k in range(first + 1, len(lengths)):
        added = lengths[k] - shared[k]
        continues = ahead[-1] == lengths[k - 1] == shared[k]  # all so far are beginnings of k: it is no larger alone
        if added and ahead[-1] + added > budget and not continues:
            late = [c for c in range(first + 1, k + 1) if c == k or ahead[c - first] >= budget / 2]
            return min(late, key=lambda c: (shared[c], -c))
        ahead.append(ahead[-1] + added)
    return len(lengths)


def woods(sequences: list[np.ndarray], shared: list[int], least_shared: int) -> PackedBatch:
    """Make the pack of one run, sequences that are the beginning of the next one read inside it. Arguments as in
    `forest`."""
    if least_shared == SHARE_NOTHING:
        return forest(sequences, shared, least_shared)
    lengths = [len(ids) for ids in sequences]
    whole = [k for k in range(len(sequences)) if k + 1 == len(sequences) or shared[k + 1] < lengths[k]]
    if len(whole) == len(sequences):
        return forest(sequences, shared, least_shared)
    # What two of them share is the least that any neighbours between them share.
    apart = [min(shared[a + 1 : b + 1], default=0) for a, b in pairwise([-1, *whole])]
    batch = forest([sequences[k] for k in whole], apart, least_shared)
    around = np.searchsorted(whole, np.arange(len(sequences)))  # the one that each begins
    ends = [(int(batch.last_S[k]), length) for k, length in zip(around, lengths, strict=True)]
    return replace(batch, last_S=torch.tensor(tokens_at(batch, ends)))


def tokens_at(batch: PackedBatch, ends: Sequence[tuple[int, int]]) -> list[int]:
    """Return the index of the last token of some beginnings. ends: the index of a sequence's last token, and how many
    tokens its beginning has."""
    starts = [segment.start for segment in batch.segments]
    positions = batch.position_ids_T.tolist()
    found = []
    for last, length in ends:
        token, segment = last, batch.segments[bisect_right(starts, last) - 1]
        while length <= positions[segment.start]:
            segment = batch.segments[segment.parent]
            token = segment.end - 1
        found.append(token - (positions[token] - (length - 1)))
    return found


def forest(sequences: list[np.ndarray], shared: list[int], least_shared: int) -> PackedBatch:
    """Make the pack of one run. sequences: in lexicographic order; shared: as in `run_end`."""
    lengths = [len(ids) for ids in sequences]
    segments: list[Segment] = []
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    last = [0] * len(sequences)
    total = 0
    waiting = [(0, len(sequences), 0, ROOT)]  # members first..end continue segment `parent`, which ends at `depth`
    while waiting:
        first, end, depth, parent = waiting.pop()
        reach = min(shared[first + 1 : end], default=lengths[first])
        whole = reach == lengths[end - 1]  # all members are the same sequence
        if whole or reach - depth >= least_shared:
            if reach > depth:
                segments.append(Segment(total, total + reach - depth, parent))
                ids.append(sequences[first][depth:reach])
                positions.append(np.arange(depth, reach))
                total, depth, parent = total + reach - depth, reach, len(segments) - 1
            while first < end and lengths[first] == reach:
                last[first] = segments[parent].end - 1
                first += 1
        parts = [k for k in range(first + 1, end) if shared[k] == reach and not lengths[k - 1] == lengths[k] == reach]
        starts = [first, *parts, end] if first < end else []
        waiting += [(a, b, depth, parent) for a, b in pairwise(starts)][::-1]
    return PackedBatch(
        token_ids_T=torch.from_numpy(np.concatenate(ids)),
        position_ids_T=torch.from_numpy(np.concatenate(positions)),
        segments=tuple(segments),
        last_S=torch.tensor(last),
    )
