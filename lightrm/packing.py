"""PackedBatch: token ids end to end, no padding anywhere, and what each token sees.

A pack is a forest of segments. A segment is a run of tokens that sees its ancestors in full and itself causally.
A plain sequence is one segment without a parent; a prompt with n answers is one parent with n children. `prefixes`
makes them; attention walks the paths from the roots.

T tokens in a pack, S sequences, N segments.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

ROOT = -1
Ranges = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens start..end of a pack, after those of the segments before it; `parent` is the index of the segment it
    continues, or ROOT."""

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

    def __len__(self) -> int:
        return len(self.token_ids_T)

    def to(self, device: torch.device) -> PackedBatch:
        return PackedBatch(
            self.token_ids_T.to(device), self.position_ids_T.to(device), self.segments, self.last_S.to(device)
        )


def key_ranges(segments: Sequence[Segment], index: int) -> Ranges:
    """Token ranges that segment `index` may see, oldest ancestor first, itself last."""
    ranges = []
    while index != ROOT:
        segment = segments[index]
        ranges.append((segment.start, segment.end))
        if segment.parent >= index:
            raise ValueError(f"segment {index} names parent {segment.parent}: parents come before their children")
        index = segment.parent
    return ranges[::-1]


def views(segments: Sequence[Segment], picked: Sequence[int] | None = None) -> Iterator[tuple[int, int, Ranges]]:
    """Query rows start..end and the token ranges that the last of them sees; each row before it sees one token less.

    picked: tokens, one query row each, instead of a row for every token. Raises ValueError if one lies in no segment.
    """
    if picked is None:
        for index, segment in enumerate(segments):
            yield segment.start, segment.end, key_ranges(segments, index)
        return
    starts = [segment.start for segment in segments]
    for row, token in enumerate(picked):
        index = bisect_right(starts, token) - 1
        if index < 0 or token >= segments[index].end:
            raise ValueError(f"token {token} lies in no segment of this pack")
        ranges = key_ranges(segments, index)
        yield row, row + 1, [*ranges[:-1], (ranges[-1][0], token + 1)]
