"""Rewards that are asked for one by one, computed together. Knows nothing of models, trainers or HTTP.

A trainer asks for the reward of each rollout by itself, from many threads or coroutines at once. One pack of 64 costs a
fraction of 64 packs of one, so what waits while a pack is computed becomes the next pack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Generic, TypeVar

Asked = TypeVar("Asked")
Scores = Callable[[list[Asked]], Sequence[float]]
MOST = 512  # answers in one pack of requests: the engine divides them further by its token budget


class Gathered(Generic[Asked]):
    """Computes in one thread of its own. Any thread may ask."""

    def __init__(self, open_scores: Callable[[], Scores[Asked]], most: int = MOST) -> None:
        """open_scores: gives what scores a list, such as by loading a model; called in the thread, before the first
        pack, and again after it failed. most: how many are computed together."""
        self._open, self._most = open_scores, most
        self._scores: Scores[Asked] | None = None
        self._waiting: list[tuple[Asked, Future[float]]] = []
        self._lock = Lock()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lightrm-rewards")

    def ask(self, asked: Sequence[Asked]) -> list[Future[float]]:
        """Return a future for each of them, at once. `result()` raises what scoring that one raised; `asyncio`'s
        `wrap_future` makes it awaitable. A future that is cancelled before its turn costs nothing."""
        futures: list[Future[float]] = [Future() for _ in asked]
        with self._lock:
            self._waiting += zip(asked, futures, strict=True)
        for _ in range(0, len(futures), self._most):
            self._worker.submit(self._turn)
        return futures

    def _turn(self) -> None:
        """Compute what waits. A turn that finds nothing does nothing: an earlier one took it along."""
        with self._lock:
            taken, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
        taken = [(one, future) for one, future in taken if future.set_running_or_notify_cancel()]
        if not taken:
            return
        try:
            if self._scores is None:
                self._scores = self._open()
        except BaseException as error:  # whoever asked must hear of it
            for _, future in taken:
                future.set_exception(error)
            return
        self._settle(self._scores, taken)

    def _settle(self, scores: Scores[Asked], taken: list[tuple[Asked, Future[float]]]) -> None:
        """Give each future its score. If the pack fails, each is scored alone, so that one that cannot be scored harms
        no other."""
        try:
            found = scores([one for one, _ in taken])
        except BaseException as error:
            if len(taken) == 1:
                taken[0][1].set_exception(error)
                return
            for one in taken:
                self._settle(scores, [one])
            return
        for (_, future), score in zip(taken, found, strict=True):
            future.set_result(score)
