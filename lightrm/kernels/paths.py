"""Which tokens each query of a pack sees, as tables for the attention kernels. `cuda.triton_attention` draws their
layout.

Made once per pack on the host, for all layers. Adjacent ranges of a path are joined, so that a plain sequence has one
range, and an answer to a shared prompt has two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightrm.kernels.segments import Segment, views

# A product needs 16 rows, even where one query is picked. Fewer than 128 queries, and Triton lays the two products of
# heads of 128 out differently and carries every score from one layout to the other.
QUERIES, PICKED_QUERIES = 128, 16
HEADER = 4


@dataclass(frozen=True, slots=True)
class Paths:
    """tables: int32 (tiles, 4 + 2 depth) on the device. rows: number of queries. depth: the most ranges that a path
    has. picked: the tokens whose queries these are, None for all."""

    tables: torch.Tensor
    rows: int
    depth: int
    segments: tuple[Segment, ...]
    picked: tuple[int, ...] | None = None
    queries: int = QUERIES

    @property
    def tiles(self) -> int:
        return len(self.tables)


def paths_of(
    segments: Sequence[Segment],
    device: torch.device,
    picked: Sequence[int] | None = None,
    queries: int | None = None,
) -> Paths:
    """Return the paths of every token, or of the picked tokens, in which case query row s is that of token picked[s].

    queries: rows of a tile; the default is a card's. Raises ValueError if a picked token lies in no segment.
    """
    queries = queries or (QUERIES if picked is None else PICKED_QUERIES)
    rows, count = [], 0
    found = [(first, end, joined(ranges)) for first, end, ranges in views(segments, picked)]
    depth = max((len(ranges) for _, _, ranges in found), default=1)
    for first, end, ranges in found:
        seen = sum(last - start for start, last in ranges)
        begins = seen - (end - first)
        table = turns(ranges, depth)
        rows += [[at, min(queries, end - at), begins + at - first, 0, *table] for at in range(first, end, queries)]
        count += end - first
    tables = torch.tensor(rows, dtype=torch.int32).view(-1, HEADER + 2 * depth)
    return Paths(tables.to(device), count, depth, tuple(segments), None if picked is None else tuple(picked), queries)


def joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the ranges without empty ones, adjacent ones joined."""
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
    """Return where each range begins on the path, and the difference from a position to its token. Missing ranges never
    begin."""
    found, position = [], 0
    for start, end in ranges:
        found += [position, start - position]
        position += end - start
    return found + [2**31 - 1, 0] * (depth - len(ranges))


def heads_side_by_side(x_THE: torch.Tensor) -> torch.Tensor:
    """Return the tensor with a token's heads in adjacent memory; tokens may lie apart."""
    width = x_THE.shape[2]
    fits = x_THE.stride(2) == 1 and (x_THE.stride(1) == width or x_THE.shape[1] == 1)
    return x_THE if fits else x_THE.contiguous()
