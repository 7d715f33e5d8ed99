"""Memory for the large tensors between two products on a CPU, kept while a model computes.

For an ordinary large tensor the system hands out new pages each time, fills them with zeros, and takes them back
afterwards. An arena is one piece of memory that is allocated once and reused, in huge pages if the system has them.
Large tensors are parts of it; what does not fit becomes an ordinary tensor.
"""

from __future__ import annotations

import math
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch

LEAST = 2**19  # bytes: smaller tensors are the allocator's own business
PAGE = mmap.PAGESIZE
PRIVATE: Any = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
CPU = torch.device("cpu")
IN_USE = threading.local()


class Arena:
    """One piece of memory. size: in bytes; a page takes memory only once it is written.

    A tensor gets the lowest free place that fits. The place is free again when the last tensor on it is gone.
    """

    def __init__(self, size: int) -> None:
        self.size = rounded_up(size)
        memory = mmap.mmap(-1, self.size, **PRIVATE)
        with suppress(AttributeError, OSError):  # systems without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = np.frombuffer(memory, np.uint8)
        self.free = [(0, self.size)]  # places from start to end, in order, none next to another
        self.returned: deque[tuple[int, int]] = deque()  # by whichever thread lets go of a tensor

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
        """Return an uninitialized tensor in the arena; None if it does not fit."""
        count = math.prod(shape) * dtype.itemsize
        while self.returned:
            self.merge(*self.returned.popleft())
        need = rounded_up(count)
        k = next((k for k, (start, end) in enumerate(self.free) if end - start >= need), None)
        if k is None:
            return None
        start, end = self.free[k]
        self.free[k : k + 1] = [(start + need, end)] if start + need < end else []
        part = self.bytes[start : start + count]
        weakref.finalize(part, self.returned.append, (start, start + need)).atexit = False
        return torch.from_numpy(part).view(dtype).view(*shape)

    def merge(self, start: int, end: int) -> None:
        before = [place for place in self.free if place[1] < start]
        after = [place for place in self.free if place[0] > end]
        touching = self.free[len(before) : len(self.free) - len(after)]
        ends = [start, end, *(edge for place in touching for edge in place)]
        self.free = [*before, (min(ends), max(ends)), *after]


def rounded_up(count: int) -> int:
    return max(-(-count // PAGE), 1) * PAGE


def reserved(size: int) -> Arena | None:
    """Return an arena of `size` bytes; None if the system cannot give so much."""
    try:
        return Arena(size)
    except OSError:
        return None


@contextmanager
def use_arena(arena: Arena | None) -> Iterator[None]:
    """Within this context, `empty` takes memory from the arena, in this thread."""
    IN_USE.arena = arena
    try:
        yield
    finally:
        IN_USE.arena = None


def empty(*shape: int, dtype: torch.dtype, device: torch.device = CPU) -> torch.Tensor:
    """As torch.empty, from the arena that is in use in this thread, if any."""
    arena: Arena | None = getattr(IN_USE, "arena", None) if device == CPU else None
    found = None if arena is None or math.prod(shape) * dtype.itemsize < LEAST else arena.empty(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=device) if found is None else found
