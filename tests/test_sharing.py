"""Cost follows distinct tokens: what several sequences begin with is computed once, and no score moves by it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lightrm
from benchmarks.rounding import Bounded
from lightrm.engine.packing import LEAST_SHARED, SHARE_NOTHING, pack, packs
from lightrm.kernels import library, passes, reference
from lightrm.kernels.segments import ROOT, views
from lightrm.model.decoder import Decoder, Flow, Layer
from lightrm.model.packed_batch import PackedBatch
from tests.conftest import DATA
from tests.test_kernels import KINDS, assert_within, bounded_attention, flat, forest_of, rows, rule_of

cpu = pytest.importorskip("lightrm.kernels.cpu.cpu_attention")
PAIRS = pytest.importorskip("lightrm.kernels.cpu.simd").PAIRS
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("poisoned")


def path(batch: PackedBatch, last: int) -> list[int]:
    """Tokens from a root to token `last`."""
    ((_, _, ranges),) = views(batch.segments, [last])
    return [token for start, end in ranges for token in range(start, end)]


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), max_size=12),
    st.integers(1, 30),
    st.sampled_from([1, 2, 4, SHARE_NOTHING]),
)
def test_every_sequence_is_a_path(sequences: list[list[int]], budget: int, least: int) -> None:
    """Ids and positions along the path are the sequence's own; each is in one pack; budgets hold."""
    seen = []
    for group, batch in packs(sequences, budget, least):
        seen += group
        for index, last in zip(group, batch.last_S.tolist(), strict=True):
            tokens = path(batch, last)
            assert batch.token_ids_T[tokens].tolist() == sequences[index]
            assert batch.position_ids_T[tokens].tolist() == list(range(len(sequences[index])))
        distinct = {tuple(sequences[index]) for index in group}
        longest = max(distinct, key=len)
        path_alone = all(ids == longest[: len(ids)] for ids in distinct)
        assert len(batch) <= budget or (path_alone if least != SHARE_NOTHING else len(distinct) == 1)
        assert len(batch) <= sum(len(ids) for ids in distinct), "never more than alone"
    assert sorted(seen) == list(range(len(sequences)))


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=12))
def test_one_pack_holds_each_prefix_once(sequences: list[list[int]]) -> None:
    prefixes = {tuple(ids[: k + 1]) for ids in sequences for k in range(len(ids))}
    assert len(pack(sequences, least_shared=1)) == len(prefixes)


def test_answers_share_their_prompt() -> None:
    prompts = [list(range(100, 160)), list(range(200, 240))]
    sequences = [prompts[k % 2] + [k] * 20 for k in range(6)]
    batch = pack(sequences)
    assert len(batch) == 60 + 40 + 6 * 20
    assert sum(segment.parent == ROOT for segment in batch.segments) == 2
    assert len(pack(sequences, SHARE_NOTHING)) == 3 * 80 + 3 * 60
    few = [[7] * (LEAST_SHARED - 1) + [k] * 5 for k in range(4)]
    assert all(segment.parent == ROOT for segment in pack(few).segments), "not worth a segment"


def test_a_group_too_large_for_one_pack_repeats_only_its_prompt() -> None:
    sequences = [list(range(100, 200)) + [k] * 20 for k in range(20)]
    sizes = [len(batch) for _, batch in packs(sequences, 300)]
    assert sizes == [300, 300]
    other = [[9] * 150, *sequences[:9]]  # the second group would not fit behind the first
    assert [len(batch) for _, batch in packs(other, 300)] == [150, 280]


def test_steps_of_a_dialogue_are_one_path() -> None:
    whole = list(range(3, 203))
    batch = pack([whole[:end] for end in range(20, 201, 20)])
    assert len(batch) == 200
    assert batch.last_S.tolist() == list(range(19, 200, 20))


def test_the_steps_of_an_answer_longer_than_the_budget_stay_together() -> None:
    answers = [[*range(100, 160), *([1 + answer] * 300)] for answer in range(3)]
    sequences = [ids[:end] for ids in answers for end in range(70, 361, 10)]
    sizes = [len(batch) for _, batch in packs(sequences, 200)]
    assert sizes == [360, 360, 360]


def test_many_nested_sequences() -> None:
    """Each one token longer than the last: all are read inside the longest."""
    sequences = [[5] * length for length in range(1, 1500)]
    batch = pack(sequences)
    assert len(batch) == 1499
    assert batch.last_S.tolist() == list(range(1499))


def test_short_steps_of_several_answers_are_computed_once() -> None:
    """Steps shorter than what is worth a segment: each answer costs its own tokens, however many steps are read."""
    answers = [[*range(100, 160), *(k for k in (1 + answer, 7, 9) for _ in range(10))] for answer in range(3)]
    sequences = [ids[:end] for ids in answers for end in range(63, 91, 3)]
    batch = pack(sequences)
    assert len(batch) == 60 + 3 * 30
    assert sum(segment.parent == ROOT for segment in batch.segments) == 1


@pytest.mark.parametrize("lengths", [(1,), (5, 1, 3), (63, 65), (127, 128, 129), (1, 260, 2)])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 8), (6, 2, 16), (5, 5, 80), (2, 1, 100), (2, 2, 128)])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_attention(lengths, heads, kv_heads, width, kind) -> None:
    tokens = sum(lengths)
    q, k, v = rows(tokens, heads, width), rows(tokens, kv_heads, width, seed=1), rows(tokens, kv_heads, width, seed=2)
    rule = rule_of(width, heads, kind)
    found = cpu.attention(q, k, v, cpu.paths(flat(lengths), CPU, None), rule)
    assert_within(found, bounded_attention(q, k, v, flat(lengths), rule))
    if PAIRS:
        k, v = k.bfloat16(), v.bfloat16()
        found = cpu.attention(q, k, v, cpu.paths(flat(lengths), CPU, None), rule)
        assert_within(found, bounded_in_half(q, k, v, flat(lengths), rule), factor=1.01)


def bounded_in_half(q, k, v, segments, rule) -> Bounded:
    """Of products in bfloat16: the query is scaled, then rounded; the weights are rounded too."""
    scaled = (q * np.float32(rule.scale)).bfloat16()
    return bounded_attention(scaled, k, v, segments, replace(rule, scale=1.0))


NODES = st.lists(st.tuples(st.integers(1, 90), st.integers(0, 3)), min_size=1, max_size=6)


@settings(deadline=None, max_examples=40)
@given(NODES, st.sampled_from(KINDS), st.booleans())
def test_attention_does_not_see_who_shares(nodes: list[tuple[int, int]], kind: str, in_half: bool) -> None:
    """A path alone gives the bits that it gives in a forest, and picked queries those that they have among all."""
    segments = forest_of(nodes)
    tokens = segments[-1].end
    q, k, v = rows(tokens, 4, 24, seed=4), rows(tokens, 2, 24, seed=5), rows(tokens, 2, 24, seed=6)
    rule, bounded = rule_of(24, 4, kind), bounded_attention
    if in_half and PAIRS:
        k, v, bounded = k.bfloat16(), v.bfloat16(), bounded_in_half
    shared = cpu.attention(q, k, v, cpu.paths(segments, CPU, None), rule)
    bound = bounded(q, k, v, segments, rule)
    assert_within(shared, bound, factor=0)
    picked = [segment.end - 1 for segment in segments][::-1]
    assert torch.equal(cpu.attention(q[picked], k, v, cpu.paths(segments, CPU, picked), rule), shared[picked])
    for slow in (library, reference) if k.dtype == torch.float32 else ():
        told = (library.paths(segments, CPU, picked), rule) if slow is library else (segments, rule, picked)
        found = slow.attention(q[picked], k, v, *told)
        assert_within(found, bound[picked], factor=0)
    for start, end, ranges in views(segments):
        along = [token for first, last in ranges for token in range(first, last)]
        alone = cpu.attention(q[along], k[along], v[along], cpu.paths(flat((len(along),)), CPU, None), rule)
        assert torch.equal(alone[start - end :], shared[start:end])


def test_attention_keeps_far_and_large_scores_apart() -> None:
    """Scores far below the largest vanish, those of hidden tokens count for nothing, NaN stays NaN."""
    q, k, v = (rows(70, 1, 16, seed=s) * 30 for s in (1, 2, 3))
    paths = cpu.paths(flat((70,)), CPU, None)
    found = cpu.attention(q, k, v, paths, rule_of(16))
    assert_within(found, bounded_attention(q, k, v, flat((70,)), rule_of(16)), factor=1.01)  # far scores are large sums
    for dtype in (torch.float32, torch.bfloat16) if PAIRS else (torch.float32,):
        for bad in (float("nan"), float("inf")):
            keys = k.to(dtype)
            keys[40] = bad
            found = cpu.attention(q, keys, v.to(dtype), paths, rule_of(16))
            assert bool(found[:40].isfinite().all())
            assert bool(found[40:].isnan().all())


def test_a_token_of_no_segment_is_named() -> None:
    with pytest.raises(ValueError, match="token 5 lies in no segment"):
        passes.paths(flat((5,)), CPU, [5])


def groups(vocabulary: int, seed: int) -> list[list[int]]:
    """Prompts with answers, a dialogue by steps, twins, loners; in mixed order."""
    generator = np.random.default_rng(seed)

    def some(length: int) -> list[int]:
        return generator.integers(3, vocabulary, length).tolist()

    made = [some(length) for length in (1, 2, 90)]
    for length in (20, 64, 100):
        prompt = some(length)
        made += [prompt + some(int(answer)) for answer in generator.integers(1, 70, 4)] + [prompt, prompt]
    dialogue = some(150)
    made += [dialogue[:step] for step in (17, 50, 51, 130)]
    return [made[k] for k in generator.permutation(len(made))]


@pytest.mark.parametrize("scheme", ["fp32", "bf16", "w8a8", "w4a8"])
@pytest.mark.parametrize("model", ["demo", "baichuan-13b-value-head"])
def test_scores_do_not_move(scheme: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Integer schemes to the last bit, under every budget; fp32 to 1e-5; bf16 within its own noise."""
    rm = lightrm.load(model if model == "demo" else DATA / model, scheme=scheme)
    sequences = groups(min(rm.engine.decoder.architecture.vocabulary, 6000), seed=1)
    alone = np.array([rm.score_ids([ids])[0] for ids in sequences])
    for budget in (150, 4096) if model == "demo" else (1, 150, 4096):
        rm.token_budget = budget
        together = rm.score_ids(sequences)
        if rm.report.scheme.integer:
            assert np.array_equal(together, alone), budget
        else:
            np.testing.assert_allclose(together, alone, atol=0.05 if scheme == "bf16" else 1e-5)


def test_each_token_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal prompts anywhere in a batch; in the last layer, the MLP sees one row a sequence."""
    rm = lightrm.load("demo", scheme="fp32")
    seen: list[int] = []
    mlp = type(rm.engine.decoder).mlp

    def counted(decoder: Decoder, layer: Layer, flow: Flow) -> None:
        seen.append(len(flow.residual.x_TD))
        mlp(decoder, layer, flow)

    monkeypatch.setattr(type(rm.engine.decoder), "mlp", counted)
    prompts = ["Why is the sky blue? Explain it so that a child of eight would like it."] * 3
    answers = ["Sunlight is scattered.", "Because.", "No idea, ask somebody else."]
    scores = rm.score_batch([prompts[0], "What is rain?", *prompts[1:]], [answers[0], "Water.", *answers[1:]])
    ids = rm.encode([*prompts, "What is rain?"], [*answers, "Water."])
    assert seen == [len(pack(ids))] * (len(rm.engine.decoder.layers) - 1) + [4]
    assert seen[0] < sum(map(len, ids)) - 2 * LEAST_SHARED
    np.testing.assert_allclose(rm.score(prompts[0], answers), scores[[0, 2, 3]], atol=1e-5)


@pytest.mark.parametrize("fused", [True, False], ids=["with FMA", "without"])
@pytest.mark.parametrize(("rows_", "lanes", "onto"), [(16, 16, False), (4, 16, True), (1, 1, True), (1, 16, False)])
def test_a_tile_of_any_machine(rows_: int, lanes: int, onto: bool, fused: bool, monkeypatch) -> None:
    """The tiles of CPUs with more and with fewer registers, with and without fused multiply-adds."""
    numba = pytest.importorskip("numba")
    from lightrm.kernels.cpu import simd

    monkeypatch.setattr(simd, "FUSED", fused)
    multiply = simd.tile(rows_, lanes, onto)

    @numba.njit
    def run(a, b, c):  # of larger matrices, transposed where numpy says so
        rows, steps, wide, tall = a.strides[0] // 4, a.strides[1] // 4, b.strides[0] // 4, c.strides[0] // 4
        multiply(a.ctypes.data, b.ctypes.data, c.ctypes.data, rows, steps, wide, tall, a.shape[1])

    generator = np.random.default_rng(0)
    a = generator.standard_normal((7, rows_ + 3), dtype=np.float32)[:, :rows_].T
    b = generator.standard_normal((7, lanes + 5), dtype=np.float32)[:, :lanes]
    c = generator.standard_normal((rows_, lanes + 2), dtype=np.float32)
    before = c.copy()
    run(a, b, c)
    np.testing.assert_allclose(c[:, :lanes], a @ b + (before[:, :lanes] if onto else 0), atol=1e-5)
    assert np.array_equal(c[:, lanes:], before[:, lanes:]), "nothing beside the tile"
