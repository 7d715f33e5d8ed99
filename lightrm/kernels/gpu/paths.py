"""What each query of a pack sees, as tables for the attention kernel; their layout is drawn in `gpu.attention`.

Made once a pack, on the host, for all layers. Neighbouring ranges of a path are joined, so that a plain sequence has
one range and an answer to a shared prompt two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightrm.packing import Segment, key_ranges

# A product needs 16 rows, even where one query is picked. Fewer than 128 queries, and Triton lays the two products of
# heads of 128 out differently and carries every score from one layout to the other.
QUERIES, PICKED_QUERIES = 128, 16
HEADER = 4


@dataclass(frozen=True, slots=True)
class Paths:
    """tables int32 (tiles, 4 + 2 depth) on the device; rows: queries in all; depth: most ranges of a path."""

    tables: torch.Tensor
    rows: int
    depth: int
    segments: tuple[Segment, ...]
    queries: int = QUERIES

    @property
    def tiles(self) -> int:
        return len(self.tables)


def paths_of(segments: Sequence[Segment], device: torch.device, picked: Sequence[int] | None = None) -> Paths:
    """Paths of every token, or of the picked tokens: query row s is then that of token picked[s].

    Raises ValueError if a picked token lies in no segment.
    """
    ranges = [joined(key_ranges(segments, index)) for index in range(len(segments))]
    spans = [
        (row, min(QUERIES, segment.end - row), index, row - segment.start)
        for index, segment in enumerate(segments)
        for row in range(segment.start, segment.end, QUERIES)
    ]
    if picked is not None:
        spans = [(s, 1, *home(segments, token)) for s, token in enumerate(picked)]
    depth = max((len(part) for part in ranges), default=1)
    tables = torch.zeros(len(spans), HEADER + 2 * depth, dtype=torch.int32)
    rows = []
    for row, count, index, offset in spans:
        own = segments[index].end - segments[index].start
        before = sum(end - start for start, end in ranges[index]) - own
        rows.append([row, count, before + offset, 0, *turns(ranges[index], depth)])
    if rows:
        tables = torch.tensor(rows, dtype=torch.int32)
    total = sum(segment.end - segment.start for segment in segments) if picked is None else len(picked)
    queries = QUERIES if picked is None else PICKED_QUERIES
    return Paths(tables.to(device), total, depth, tuple(segments), queries)


def joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Without empty ranges, neighbours made one."""
    found: list[tuple[int, int]] = []
    for start, end in ranges:
        if start == end:
            continue
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return found


def turns(ranges: list[tuple[int, int]], depth: int) -> list[int]:
    """Where each range begins on the path, and what leads from a position to its token; absent ranges begin nowhere."""
    found, position = [], 0
    for start, end in ranges:
        found += [position, start - position]
        position += end - start
    return found + [2**31 - 1, 0] * (depth - len(ranges))


def home(segments: Sequence[Segment], token: int) -> tuple[int, int]:
    """The segment that holds a token, and the token's place in it."""
    for index, segment in enumerate(segments):
        if segment.start <= token < segment.end:
            return index, token - segment.start
    raise ValueError(f"token {token} lies in no segment of this pack")
