"""Which tokens each token of a pack sees. A pack holds the ids of many sequences, one after the other, without padding.

A pack is a forest of segments. A segment is a run of tokens that sees its ancestors in full and itself causally. A
plain sequence is one segment without a parent; a prompt with n answers is one parent with n children. `engine.packing`
makes segments; attention follows the path from each root.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

ROOT = -1
Ranges = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens start .. end of a pack, after those of all earlier segments. parent: index of the segment that this one
    continues, or ROOT."""

    start: int
    end: int
    parent: int = ROOT


def key_ranges(segments: Sequence[Segment], index: int) -> Ranges:
    """Return the token ranges that a segment may see: its oldest ancestor first, itself last."""
    ranges = []
    while index != ROOT:
        segment = segments[index]
        ranges.append((segment.start, segment.end))
        if segment.parent >= index:
            raise ValueError(f"segment {index} names parent {segment.parent}: parents come before their children")
        index = segment.parent
    return ranges[::-1]


def views(segments: Sequence[Segment], picked: Sequence[int] | None = None) -> Iterator[tuple[int, int, Ranges]]:
    """Yield query rows start .. end, and the token ranges that the last of them sees; each row before it sees one token
    less.

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
