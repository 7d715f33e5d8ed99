"""A process forked off one in which lightrm has run: what it must make anew, and with how many threads it computes.

Of all threads only the one that forked is copied, and each lock as it stood. GNU's OpenMP, under PyTorch and under
numba on Linux, then waits for threads that are not there, or ends the process. So such a child computes with one thread
of its own, which is right in any child, and what a pool of workers wants: they share the cores by being many.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol

import torch


class Forked(Protocol):
    """Something with locks or threads of its own."""

    def forked(self) -> None:
        """Called in a child: makes them anew."""


STARTED = threading.Event()  # lightrm has run here: OpenMP may have threads
ALONE = threading.Event()  # this process was forked off one that had them
HOLDERS: weakref.WeakSet[Forked] = weakref.WeakSet()


def started() -> None:
    STARTED.set()


def alone() -> bool:
    """Whether this process may compute with one thread only."""
    return ALONE.is_set()


def renew(holder: Forked) -> None:
    """From now on, a forked child calls `holder.forked()`."""
    started()
    HOLDERS.add(holder)


def in_child() -> None:
    for holder in list(HOLDERS):
        holder.forked()
    if STARTED.is_set():
        ALONE.set()
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=in_child)
