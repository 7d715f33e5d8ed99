"""Token ids -> PackedBatch: sequences laid end to end, no padding anywhere.

A pack is a forest of segments. A segment is a run of tokens that sees its ancestors in full and itself causally.
A plain sequence is one segment without a parent; a prompt with n answers is one parent with n children.
`pack` makes plain ones today; positions, attention and the pooling already read the forest.

T tokens in a pack, S sequences, N segments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

ROOT = -1


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens start..end of a pack; `parent` is the index of the segment it continues, or ROOT."""

    start: int
    end: int
    parent: int = ROOT


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """token_ids_T and position_ids_T int64 (T,); last_S int64 (S,): where each sequence ends."""

    token_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    segments: tuple[Segment, ...]
    last_S: torch.Tensor

    def to(self, device: torch.device) -> PackedBatch:
        return PackedBatch(
            self.token_ids_T.to(device), self.position_ids_T.to(device), self.segments, self.last_S.to(device)
        )


def key_ranges(segments: Sequence[Segment], index: int) -> list[tuple[int, int]]:
    """Token ranges that segment `index` may see, oldest ancestor first, itself last."""
    ranges = []
    while index != ROOT:
        segment = segments[index]
        ranges.append((segment.start, segment.end))
        if segment.parent >= index:
            raise ValueError(f"segment {index} names parent {segment.parent}: parents come before their children")
        index = segment.parent
    return ranges[::-1]


def pack(sequences: Sequence[Sequence[int]]) -> PackedBatch:
    """Lay sequences end to end, one segment each. Every sequence has at least one token."""
    segments, start = [], 0
    for ids in sequences:
        segments.append(Segment(start, start + len(ids)))
        start += len(ids)
    return PackedBatch(
        token_ids_T=torch.tensor([i for ids in sequences for i in ids], dtype=torch.int64),
        position_ids_T=torch.cat([torch.arange(len(ids)) for ids in sequences]),
        segments=tuple(segments),
        last_S=torch.tensor([segment.end - 1 for segment in segments]),
    )


def batches(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Groups of indices, longest sequences first, at most `token_budget` tokens a group.

    Sorted by length, so that a progress bar slows down never and memory peaks at once; a sequence longer than
    the budget goes alone.
    """
    group: list[int] = []
    used = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if group and used + lengths[index] > token_budget:
            yield group
            group, used = [], 0
        group.append(index)
        used += lengths[index]
    if group:
        yield group
