"""One model under many threads: each gets the scores that it would get alone, however their steps fall between each
other's. Every attribute that threads share is made to hand over to another thread whenever it is read or written."""

from __future__ import annotations

import asyncio
import copy
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch

import lightrm
from lightrm.engine.residence import Residence
from lightrm.errors import CopyError
from lightrm.kernels import dispatch, gemm, integer
from lightrm.kernels.cpu import cpu_passes
from lightrm.model.decoder import Decoder, Flow, Layer
from tests.test_residence import IDS
from tests.test_scoring import write_model

ANSWERS = ["it is", "天气很好", "a b c", "x", "the weather", "no", "yes yes yes", "?"]
SHARED = {"engine": ("arena", "tokens", "turn", "callers", "warned"), "reference": ("opened", "opening")}


class HandOver:
    """Whoever comes to a point waits there until another thread has come to one; for a moment, if none does."""

    def __init__(self) -> None:
        self.changed, self.count, self.met = threading.Condition(), 0, 0

    def point(self) -> None:
        with self.changed:
            self.count += 1
            mine = self.count
            self.changed.notify_all()
            self.met += self.changed.wait_for(lambda: self.count != mine, timeout=0.003)

    def watch(self, holder: object, names: tuple[str, ...]) -> None:
        """A point before and after each read and each write of these attributes."""

        def watched(name: str) -> property:
            def read(self_: object) -> object:
                self.point()
                value = vars(self_)[name]
                self.point()
                return value

            def write(self_: object, value: object) -> None:
                self.point()
                vars(self_)[name] = value
                self.point()

            return property(read, write)

        assert set(names) <= set(vars(holder)), "an attribute that is no longer there"
        kind = type(holder)
        holder.__class__ = type(kind.__name__, (kind,), {name: watched(name) for name in names})


def together(*work: Callable[[], object]) -> list[object]:
    """Each in a thread of its own, all at once; what they return, or raise."""
    found: list[object] = [None] * len(work)
    begin = threading.Barrier(len(work))

    def run(k: int) -> None:
        begin.wait()
        try:
            found[k] = work[k]()
        except BaseException as error:  # shown by the comparison
            found[k] = error

    threads = [threading.Thread(target=run, args=(k,), daemon=True) for k in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "threads wait for each other"
    return found


def uses(rm: lightrm.RewardModel) -> list[Callable[[], list]]:
    """All ways to a score, twice each; what they give can be compared by ==."""
    ids = [[1, *range(3, 3 + n)] for n in (5, 90, 40, 61, 7, 30)]

    def half_a_stream() -> list:
        """Left in the middle."""
        results = rm.stream(["why?"] * 8, ANSWERS)
        next(results)
        results.close()
        return rm.score_ids(ids[:3]).tolist()

    return [
        lambda: rm.score("what?", ANSWERS).tolist(),
        lambda: rm.rank("what?", ANSWERS, exact=True, bound=0.3),
        lambda: sorted(rm.stream(["and now?"] * 8, ANSWERS)),
        lambda: rm.score_ids(ids).tolist(),
        half_a_stream,
        lambda: rm.score_batch(["one", "two"], ANSWERS[:2]).tolist(),
        lambda: rm.rank_batch(["who?", "why?"], [ANSWERS, ANSWERS[3:]], exact=True, bound=0.2),
        lambda: [rm.explain("what?", "it is").score, repr(rm)],
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@contextmanager
def counted_references(rm: lightrm.RewardModel) -> Iterator[list[str]]:
    opened: list[str] = []
    inner = rm._reference.opens
    assert inner is not None
    rm._reference.opens = lambda scheme: (opened.append(scheme), inner(scheme))[1]
    yield opened


@pytest.mark.parametrize("streamed", [False, True])
def test_eight_threads_get_the_scores_of_one(streamed: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if streamed:
        residence = Residence(tokens=50, window=130, room=2**30, bytes=0, reason="of the test")
        monkeypatch.setattr("lightrm.loading.sources.choose_residence", lambda *_, **__: residence)
    expected = [use() for use in uses(lightrm.load(folder, scheme="w8a8", token_budget=50))]
    rm, hand_over = lightrm.load(folder, scheme="w8a8", token_budget=50), HandOver()
    with counted_references(rm) as opened:
        hand_over.watch(rm.engine, SHARED["engine"])
        hand_over.watch(rm._reference, SHARED["reference"])
        if streamed:
            hand_over.watch(rm.engine.decoder.layers, ("held", "coming"))
        assert together(*uses(rm)) == expected
    assert opened == ["fp32"], "one reference is opened, and no second one"
    assert hand_over.met > 5, "threads did hand over to each other"
    assert rm.engine.arena is None, "the last one lets go of the memory"
    assert not rm.engine.callers


def test_calls_from_an_event_loop(folder: Path) -> None:
    """`asyncio.to_thread`, as the documents show it: the scores of one call alone, and the loop goes on meanwhile."""
    rm = lightrm.load(folder, scheme="w8a8")
    answers = ["it is", "the weather is sunny", "no", "天气很好"]
    ticks = 0

    async def ticking() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    async def several() -> list[np.ndarray]:
        clock = asyncio.create_task(ticking())
        found = await asyncio.gather(*(asyncio.to_thread(rm.score, f"what {k}?", answers) for k in range(16)))
        clock.cancel()
        return found

    found = asyncio.run(several())
    assert ticks > 16
    for k, scores in enumerate(found):
        assert scores.tobytes() == rm.score(f"what {k}?", answers).tobytes()


def test_three_threads_open_one_reference(folder: Path) -> None:
    rm, hand_over = lightrm.load(folder, scheme="w8a8"), HandOver()
    with counted_references(rm) as opened:
        hand_over.watch(rm._reference, SHARED["reference"])
        first, *others = together(*[rm._exact] * 3)
    assert opened == ["fp32"]
    assert isinstance(first, lightrm.RewardModel)
    assert all(other is first for other in others)


def test_a_reference_that_fails_to_open_is_tried_again(folder: Path) -> None:
    rm = lightrm.load(folder, scheme="w8a8")
    inner, fails = rm._reference.opens, [True]

    def opens(scheme: str) -> lightrm.RewardModel:
        if fails:
            fails.pop()
            raise lightrm.CheckpointError("the disk is away")
        assert inner is not None
        return inner(scheme)

    rm._reference.opens = opens
    found = together(*[lambda: rm.rank("what?", ANSWERS, exact=True, bound=1e9)] * 3)
    assert [isinstance(one, lightrm.CheckpointError) for one in found].count(True) == 1
    assert rm._exact() is rm._exact()


def test_threads_that_run_out_of_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget only falls, it is told once, and a pack that was made before it fell is not tried."""
    rm = lightrm.load(folder, scheme="w8a8")
    work = [[[k % 50 + 3 + j] * (10 + k) for k in range(20)] for j in range(4)]
    expected = [rm.score_ids(ids).tolist() for ids in work]
    tried: list[int] = []
    most = 60
    mlp = Decoder.mlp

    def limited(self: Decoder, layer: Layer, flow: Flow) -> None:
        tokens = len(flow.residual.x_TD)
        tried.append(tokens)
        if tokens > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        mlp(self, layer, flow)

    monkeypatch.setattr(Decoder, "mlp", limited)
    hand_over, budgets = HandOver(), []
    hand_over.watch(rm.engine, SHARED["engine"])
    halve = rm.engine.halve
    rm.engine.halve = lambda batch: (halve(batch), budgets.append(rm.engine.tokens))[0]
    with pytest.warns(lightrm.MemoryWarning) as told:
        assert together(*[lambda ids=ids: rm.score_ids(ids).tolist() for ids in work]) == expected
    assert len(told) == 1
    assert budgets == sorted(budgets, reverse=True), "no thread raises what another one lowered"
    assert rm.token_budget == budgets[-1]
    failed = [tokens for tokens in tried if tokens > most]
    assert failed == sorted(failed, reverse=True)
    assert len(failed) == len(set(failed)) == len(budgets), "what did not fit once is not tried by the next thread"


def test_what_is_found_out_or_compiled_once() -> None:
    """The first call of several threads at once, of everything that is kept from its first call."""
    for kept in (gemm.cpu_product, gemm.chosen_product, dispatch.imported):
        kept.cache_clear()
    here = torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (7, 48), generator=generator, dtype=torch.uint8)
    multiplier = torch.randint(1, 16, (7, 12), generator=generator, dtype=torch.int8)
    found = together(
        *[lambda: gemm.cpu_product()[1]] * 3,
        *[lambda: dispatch.passes(here).__name__] * 3,
        *[lambda: cpu_passes.widen(packed, multiplier).tolist()] * 3,
    )
    truth = integer.widen(packed, multiplier).tolist()
    assert found == [gemm.cpu_product()[1]] * 3 + ["lightrm.kernels.cpu.cpu_passes"] * 3 + [truth] * 3


COUNT = """
import sys, torch, lightrm
torch.set_num_threads(1)
lightrm.load(sys.argv[1], scheme="w8a8").score("why?", ["a", "b c"])
print(torch.get_num_threads())
"""


def test_the_number_of_threads_stays_the_callers(folder: Path) -> None:
    """numba's OpenMP is PyTorch's: when it starts its threads, it sets their number for both."""
    command = [sys.executable, "-c", COUNT, str(folder)]
    environment = os.environ | {"NUMBA_NUM_THREADS": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]


def test_one_iterator_is_one_threads(folder: Path) -> None:
    """Results that are let go of in another thread than they were asked for in."""
    rm = lightrm.load(folder, scheme="w8a8", token_budget=50)
    results = rm.stream(["why?"] * 8, ANSWERS)
    next(results)
    assert rm.engine.callers
    together(results.close)
    assert not rm.engine.callers
    assert rm.engine.arena is None


@pytest.mark.parametrize("how", [pickle.dumps, copy.copy, copy.deepcopy, ForkingPickler.dumps])
def test_a_model_is_neither_pickled_nor_copied(how: Callable[[object], object], folder: Path) -> None:
    rm = lightrm.load(folder, scheme="w8a8")
    with pytest.raises(CopyError, match=r"pass its path and options to the other process and call lightrm\.load there"):
        how(rm)
    with pytest.raises(TypeError):  # what pickle's users catch
        how(rm)
    assert np.isfinite(rm.score("what?", ANSWERS)).all()


@pytest.mark.parametrize("tokens", [0, -5, 2.5, "100", True, None])
def test_a_budget_that_is_none(tokens: object, folder: Path) -> None:
    rm = lightrm.load(folder, scheme="w8a8")
    before = rm.token_budget
    with pytest.raises(lightrm.InputError, match="token_budget must be a positive whole number, found"):
        rm.token_budget = tokens  # type: ignore[assignment]
    assert rm.token_budget == before
    rm.token_budget = 64
    assert rm.score_ids(IDS[:2]).shape == (2,)
