"""What waits, from all requests, goes through the model together: one call shares prompts and fills its packs.

The event loop puts requests in; one thread takes all that wait, runs the model, and gives the scores back. While it
computes, the next requests gather by themselves. A request whose text lightrm refuses is found by halving: refusals
come before anything is computed, so its neighbours are computed once and lose nothing.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from lightrm.scorer import RewardModel
from lightrm.serving.refusals import RefusedError
from lightrm.text.conversation import together
from lightrm.text.templates import Turn

AT_ONCE = 1024  # texts that go through the model in one call
CHARACTERS = 2**22  # in one call, unless one request has more: tokenizing takes about a hundred bytes for each
PAUSE = 0.003  # seconds without a new request, after which no more are waited for
LONGEST_PAUSE = 0.05
Outcome = list[float] | Exception


@dataclass(frozen=True, slots=True)
class Asking:
    """A prompt. key: the same for equal prompts, and about as long."""

    turns: list[Turn]
    key: str = field(repr=False)


def asking(turns: list[Turn]) -> Asking:
    return Asking(turns, json.dumps(turns, ensure_ascii=False))


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers to score. pairs: each prompt with one response."""

    pairs: Sequence[tuple[Asking, str]]

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def characters(self) -> int:
        """Of the answers, each with its prompt."""
        return sum(len(prompt.key) + len(text) for prompt, text in self.pairs)

    @property
    def longest(self) -> int:
        return max((len(prompt.key) + len(text) for prompt, text in self.pairs), default=0)


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts to score that a chat template made."""

    texts: Sequence[str]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def characters(self) -> int:
        return sum(map(len, self.texts))

    @property
    def longest(self) -> int:
        return max(map(len, self.texts), default=0)


@dataclass(eq=False, slots=True)
class Waiting:
    """A request that waits. outcome: where its scores go, or what the model raised: an exception that is set in a
    future is logged with its message if nobody asks for it any more. It is cancelled when the client hangs up."""

    work: Answers | Texts
    outcome: asyncio.Future[Outcome]


@dataclass(eq=False)
class Gatherer:
    """most: texts that may wait. computed: called with the number of texts of each call of the model."""

    rm: RewardModel
    most: int
    computed: Callable[[int], None]
    waiting: deque[Waiting] = field(default_factory=deque)
    texts: int = 0  # that wait
    closed: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)
    thread: threading.Thread | None = None

    def start(self) -> None:
        self.thread = threading.Thread(target=self.run, name="lightrm-scores", daemon=True)
        self.thread.start()

    @property
    def alive(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def close(self) -> None:
        """Finish what waits, and end the thread."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        if self.thread is not None:
            self.thread.join()

    async def scores(self, work: Answers | Texts) -> list[float]:
        """Return the scores of one request. Raises RefusedError if too much waits already, or what the model raises."""
        if not len(work):
            return []
        one = Waiting(work, asyncio.get_running_loop().create_future())
        with self.changed:
            if self.texts + len(work) > self.most:
                raise RefusedError(
                    429, "Busy", f"{self.texts} texts wait already, of at most {self.most}: ask again", 1
                )
            self.waiting.append(one)
            self.texts += len(work)
            self.changed.notify()
        outcome = await one.outcome
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def run(self) -> None:
        while group := self.taken():
            loop = group[0].outcome.get_loop()
            for kind in (Answers, Texts):
                some = [one for one in group if isinstance(one.work, kind) and not one.outcome.cancelled()]
                done = list(self.outcomes(some))
                if done and not loop.is_closed():
                    loop.call_soon_threadsafe(deliver, done)

    def taken(self) -> list[Waiting]:
        """Wait for requests, and return as many as go through the model at once; none when the gatherer is closed."""
        with self.changed:
            while True:
                self.changed.wait_for(lambda: self.waiting or self.closed)
                if not self.waiting:
                    return []
                self.gather()
                group: list[Waiting] = []
                texts = characters = 0
                while self.waiting:
                    one = self.waiting[0]
                    texts, characters = texts + len(one.work), characters + one.work.characters
                    if group and (texts > AT_ONCE or characters > CHARACTERS):
                        break
                    self.waiting.popleft()
                    self.texts -= len(one.work)
                    if not one.outcome.cancelled():
                        group.append(one)
                if group:
                    return group

    def gather(self) -> None:
        """Wait as long as further requests keep coming in. Holding the lock, as `taken` does."""
        end = time.monotonic() + LONGEST_PAUSE
        known = 0
        while len(self.waiting) > known and self.texts < AT_ONCE and not self.closed and time.monotonic() < end:
            known = len(self.waiting)
            self.changed.release()
            time.sleep(PAUSE)
            self.changed.acquire()

    def outcomes(self, group: Sequence[Waiting]) -> Iterator[tuple[Waiting, Outcome]]:
        """Yield what each request gets: all from one call, or each half by itself if the model refuses a text."""
        if not group:
            return
        try:
            found = self.call([one.work for one in group])
        except Exception as error:
            if len(group) == 1:
                yield group[0], error
                return
            half = len(group) // 2
            yield from self.outcomes(group[:half])
            yield from self.outcomes(group[half:])
            return
        for one in group:
            yield one, found[: len(one.work)]
            del found[: len(one.work)]

    def call(self, works: Sequence[Answers | Texts]) -> list[float]:
        """Run the model over several requests of one kind."""
        self.computed(sum(map(len, works)))
        if isinstance(works[0], Texts):
            texts = [text for work in works if isinstance(work, Texts) for text in work.texts]
            return [float(score) for score in self.rm.score_text(texts)]
        pairs = [pair for work in works if isinstance(work, Answers) for pair in work.pairs]
        order = [k for positions in together([prompt.key for prompt, _ in pairs]) for k in positions]
        found = self.rm.score_batch([pairs[k][0].turns for k in order], [pairs[k][1] for k in order])
        scores = [0.0] * len(pairs)
        for k, score in zip(order, found, strict=True):
            scores[k] = float(score)
        return scores


def deliver(done: Sequence[tuple[Waiting, Outcome]]) -> None:
    """In the event loop: hand over what came out. A client that hung up meanwhile gets nothing."""
    for one, outcome in done:
        if not one.outcome.cancelled():
            one.outcome.set_result(outcome)
