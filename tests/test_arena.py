"""Memory between the layers on a CPU: parts never overlap, come back, and change no score."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch

import lightrm
from lightrm.kernels import arena
from lightrm.kernels.arena import LEAST, PAGE, Arena

pytestmark = pytest.mark.usefixtures("poisoned")
BYTES = 64 * PAGE


def part(memory: Arena, pages: float) -> torch.Tensor | None:
    return memory.empty((int(pages * PAGE),), torch.uint8)


@pytest.mark.parametrize("seed", range(4))
def test_parts_do_not_overlap_and_come_back(seed: int) -> None:
    """Each living part keeps what was written into it, whatever is taken and let go of around it."""
    chance, memory, living = random.Random(seed), Arena(BYTES), {}
    refused = 0
    for k in range(600):
        made = part(memory, chance.choice([0.3, 1, 2.5, 7, 20]))
        if made is None:
            refused += 1
        else:
            living[k] = made.fill_(k % 251)
        del made
        for old in chance.sample(sorted(living), chance.randrange(0, 2) * len(living) // 2):
            del living[old]
        assert all(bool((x == i % 251).all()) for i, x in living.items())
    assert refused, "a run that never fills it tests little"
    living.clear()
    whole = part(memory, 64)
    assert whole is not None, "all that was given back is one place again"
    assert part(memory, 1) is None


def test_tensors_have_their_shape_and_outlive_the_arena() -> None:
    memory = Arena(BYTES)
    x = memory.empty((5, 7, 3), torch.int32)
    assert x is not None
    assert (x.shape, x.dtype, x.is_contiguous()) == ((5, 7, 3), torch.int32, True)
    middle = x.fill_(9)[2:3].transpose(0, 1)
    del x
    assert part(memory, 64) is None, "a view keeps the whole part"
    del memory
    assert middle.tolist() == [[[9, 9, 9]]] * 7
    memory = Arena(PAGE + 1)
    made = [part(memory, 1), part(memory, 1)]
    assert made[1] is not None, "a size is rounded up to whole pages"
    assert part(memory, 0.1) is None


def test_only_large_tensors_of_the_thread_that_opened_it() -> None:
    taken: list[tuple[int, ...]] = []

    class Watching(Arena):
        def empty(self, shape, dtype):
            taken.append(tuple(shape))
            return super().empty(shape, dtype)

    with arena.use_arena(Watching(2 * LEAST)):
        assert arena.empty(3, 5, dtype=torch.int8).shape == (3, 5)
        assert arena.empty(0, LEAST, dtype=torch.int8).shape == (0, LEAST)
        assert arena.empty(LEAST, dtype=torch.int8, device=torch.device("meta")).is_meta
        other = threading.Thread(target=lambda: arena.empty(LEAST, dtype=torch.int8))
        other.start()
        other.join()
        assert taken == []
        large = [arena.empty(LEAST, dtype=torch.int8) for _ in range(3)]
        assert taken == [(LEAST,)] * 3
        assert [x.shape for x in large] == [(LEAST,)] * 3, "what does not fit is an ordinary tensor"
    arena.empty(LEAST, dtype=torch.int8)
    assert len(taken) == 3


def test_no_memory_for_it_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(size: int) -> Arena:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(arena, "Arena", none)
    with arena.use_arena(arena.reserved(2**60)):
        assert arena.empty(LEAST, dtype=torch.int8).shape == (LEAST,)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "fp32"])
def test_scores_are_the_same_without_it(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor of the bundled model's small packs is taken from the arena; then from one that is too small."""
    monkeypatch.setattr(arena, "LEAST", 1)
    rm = lightrm.load("demo", scheme=scheme, device="cpu")
    ids = [[1, *range(5, 5 + length), 2] for length in (3, 90, 41, 200, 7)]
    found, real = rm.score_ids(ids), arena.Arena.empty
    given: list[bool] = []

    def counted(self: Arena, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        made = real(self, shape, dtype)
        given.append(made is not None)
        return made

    monkeypatch.setattr(arena.Arena, "empty", counted)
    assert np.array_equal(rm.score_ids(ids), found)
    assert all(given), "the plan's activations are room enough"
    assert len(given) >= len(rm.engine.decoder.layers)
    given.clear()
    reserved = arena.reserved
    monkeypatch.setattr(arena, "reserved", lambda size: reserved(PAGE))
    assert np.array_equal(rm.score_ids(ids), found)
    assert not all(given)
    monkeypatch.setattr(arena, "reserved", lambda size: None)
    assert np.array_equal(rm.score_ids(ids), found)
    assert rm.engine.arena is None, "nothing is kept between calls"
