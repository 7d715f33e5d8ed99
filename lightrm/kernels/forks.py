"""What a process must do if it was forked off one in which lightrm has run.

A fork copies only the thread that forks, and every lock in its current state. GNU's OpenMP, which PyTorch and numba use
on Linux, then waits forever for threads that do not exist, or ends the process. So a forked child computes with one
thread. That is always correct, and it suits a pool of workers, which share the cores anyway.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol

import torch


class Forked(Protocol):
    """An object with locks or threads of its own."""

    def forked(self) -> None:
        """Called in a forked child, to create them anew."""


STARTED = threading.Event()  # lightrm has run here: OpenMP may have threads
ALONE = threading.Event()  # this process was forked off one that had them
HOLDERS: weakref.WeakSet[Forked] = weakref.WeakSet()


def started() -> None:
    STARTED.set()


def alone() -> bool:
    """Whether this process may compute with one thread only."""
    return ALONE.is_set()


def call_after_fork(holder: Forked) -> None:
    """Register an object whose `forked()` is called in every child that is forked from now on."""
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
