"""The fast path and the reference against the formula in float64, on ugly shapes: each number within what its own sum
allows (`benchmarks.rounding`), so that no run depends on another one's luck, nor on the CPU. And the checks themselves:
a kernel that is wrong by a factor in one column does not pass them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import rounding
from benchmarks.rounding import Bounded
from lightrm.kernels import arena, integer, library, passes, products, reference
from lightrm.kernels.arena import LEAST, PAGE, Arena
from lightrm.kernels.operands import ScoreRule, Sums
from lightrm.kernels.segments import ROOT, Segment
from lightrm.model.positions import alibi_slopes
from tests.conftest import UNCLEARED

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = (torch.float32, torch.bfloat16)
LENGTHS = ((1,), (5, 1, 3), (63, 65), (127, 128, 129), (1, 260, 2))


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def flat(lengths: tuple[int, ...]) -> tuple[Segment, ...]:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return tuple(Segment(end - length, end) for end, length in zip(ends, lengths, strict=True))


def forest_of(nodes: list[tuple[int, int]]) -> list[Segment]:
    """Segments of (length, how many before it its parent stands, 0 for a root)."""
    segments: list[Segment] = []
    start = 0
    for index, (length, back) in enumerate(nodes):
        parent = index - back if 0 < back <= index else ROOT
        segments.append(Segment(start, start + length, parent))
        start += length
    return segments


def seen_by(segments) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens each token sees, (T, T), and its position on its path, (T,): drawn without the code under test."""
    tokens = segments[-1].end
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    place = torch.zeros(tokens, dtype=torch.float64)
    for segment in segments:
        at = segment
        while at.parent != ROOT:
            at = segments[at.parent]
            seen[segment.start : segment.end, at.start : at.end] = True
            place[segment.start : segment.end] += at.end - at.start
        length = segment.end - segment.start
        seen[segment.start : segment.end, segment.start : segment.end] = torch.ones(length, length).tril().bool()
        place[segment.start : segment.end] += torch.arange(length)
    return seen, place


KINDS = ("plain", "alibi", "capped", "windowed", "capped and windowed")


def rule_of(width: int, heads: int = 0, kind: str = "plain", device: str = "cpu") -> ScoreRule:
    """Attention's rule for heads of a width; caps that bend the scores, windows that most sequences leave."""
    slopes_H = alibi_slopes(heads).to(device) if kind == "alibi" else None
    return ScoreRule(width**-0.5, slopes_H, 2.5 if "capped" in kind else None, 21 if "windowed" in kind else None)


def bounded_attention(q, k, v, segments, rule, bias_dtype=torch.float32, cut=False) -> Bounded:
    """Softmax attention in float64 over an explicit (T, T) mask, and what a kernel may be off by."""
    seen, place = (x.to(q.device) for x in seen_by(segments))
    return rounding.attention(q, k, v, seen, place, rule, bias_dtype, cut)


def assert_within(found: torch.Tensor, bound: Bounded, *, cut: bool = False, factor: float | None = None) -> None:
    """Each number within its bound; and the bound is worth something: a factor would be seen in each column. factor: by
    itself 1.001 in float32, 1.01 in half precision, four times as far from 1 where a column has few numbers; 0 where
    they cannot tell."""
    assert found.shape == bound.exact.shape
    excess = rounding.excess(found, bound, cut)
    if not bool((excess <= 1).all()):
        at = int(excess.argmax())
        number, exact = found.reshape(-1)[at].item(), bound.exact.reshape(-1)[at].item()
        raise AssertionError(f"{number} for {exact}, {float(excess.max()):.3g} times what its sum allows, at {at}")
    if factor is None:
        few = found.numel() < 8 * found.shape[-1]
        factor = 1 + (rounding.FACTORS[found.dtype] - 1) * (4 if few else 1)
    if factor:
        blind = rounding.blind(found, bound, factor, cut)
        assert blind == 0, f"a factor would not be seen in {100 * blind:.1f} % of the columns"


def assert_rows_within(
    values: torch.Tensor, scale_T: torch.Tensor, bound: Bounded, scale: Bounded | None = None
) -> None:
    """int8 rows and their scales: the scale within its bound, each value the rounding of what it stands for.

    scale: where it is not simply the row's largest magnitude over 127."""
    assert values.dtype == torch.int8
    assert_within(scale_T, rounding.scale_of(bound) if scale is None else scale, factor=0)
    off = float(rounding.off_rows(values, scale_T, bound).max())
    assert off <= 1, f"a value is {off:.3g} times as far from its number as half a step"


def seen(module: Any, segments: Sequence[Segment], picked: Sequence[int] | None = None) -> Any:
    """What a module is told of a pack: the truth reads the segments themselves."""
    return segments if module is reference else module.paths(segments, torch.device("cpu"), picked)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 8), (6, 2, 16), (5, 5, 80)])
@pytest.mark.parametrize("kind", KINDS)
def test_attention(dtype, lengths, heads, kv_heads, width, kind) -> None:
    tokens = sum(lengths)
    q = rows(tokens, heads, width, seed=1, dtype=dtype)
    k, v = rows(tokens, kv_heads, width, seed=2, dtype=dtype), rows(tokens, kv_heads, width, seed=3, dtype=dtype)
    rule = rule_of(width, heads, kind)
    segments = flat(lengths)
    for module, bias_dtype in ((library, dtype), (reference, torch.float32)):
        found = module.attention(q, k, v, seen(module, segments), rule)
        assert found.dtype == dtype
        assert_within(found, bounded_attention(q, k, v, segments, rule, bias_dtype))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3)), min_size=1, max_size=6), st.sampled_from(KINDS))
def test_attention_over_a_forest(nodes: list[tuple[int, int]], kind: str) -> None:
    """Prompts, their answers, and answers to those: each segment sees its ancestors and itself, nothing else."""
    segments = forest_of(nodes)
    start = segments[-1].end
    q, k, v = rows(start, 4, 8, seed=4), rows(start, 2, 8, seed=5), rows(start, 2, 8, seed=6)
    rule = rule_of(8, 4, kind)
    bound = bounded_attention(q, k, v, segments, rule)
    for module in (reference, library):
        assert_within(module.attention(q, k, v, seen(module, segments), rule), bound, factor=0)


def test_absolute_bias_is_the_published_half_precision_table() -> None:
    """slope * j rounded to bf16 and added to bf16 scores: far from the exact function at a long distance."""
    q, k, v = (rows(300, 4, 16, seed=s, dtype=torch.bfloat16) for s in (1, 2, 3))
    rule = rule_of(16, 4, "alibi")
    paths = passes.paths(flat((300,)), q.device)
    found = passes.attention_by_table(q, k, v, paths, rule).values_TI.unflatten(1, (4, 16))
    score = (q.float().transpose(0, 1) @ k.float().permute(1, 2, 0) / 4.0).to(torch.bfloat16)
    table = (alibi_slopes(4)[:, None, None] * torch.arange(300)).to(torch.bfloat16)
    future = torch.ones(300, 300).triu(1).bool()
    weights = (score + table).float().masked_fill(future, float("-inf")).softmax(-1)
    expected = (weights @ v.float().transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0.02)
    exact = passes.attention(q, k, v, paths, rule).values_TI.unflatten(1, (4, 16))
    assert (exact.float() - expected).abs().max() > 0.02
    wide = q.float(), k.float(), v.float(), paths, rule
    table, exact = passes.attention_by_table(*wide).values_TI, passes.attention(*wide).values_TI
    torch.testing.assert_close(table, exact, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 15, 17, 63, 65, 1000])
def test_row_kernels(dtype: torch.dtype, tokens: int) -> None:
    x, weight = rows(tokens, 40, dtype=dtype), rows(40, seed=1, dtype=dtype)
    twice = 1.02 if dtype == torch.bfloat16 else 1.001  # where it is rounded twice
    wide = Bounded.of(x)
    normed = rounding.norm(wide, 1e-6).rounded(dtype) * Bounded.of(weight)  # rounded before the weight, as published
    gated = rounding.gated(wide)
    gate, up = (Bounded.of(part) for part in x.chunk(2, -1))
    gated_twice = gate.silu().rounded(dtype) * up
    weight_OI, bias = rows(24, 40, seed=2, dtype=dtype), rows(24, seed=3, dtype=dtype)
    product = wide.product(Bounded.of(weight_OI.T)) + Bounded.of(bias)
    for module in (library, reference):
        assert_within(module.rms_norm(x, weight, 1e-6), normed, factor=twice)
        assert_within(module.rms_norm(x, None, 1e-6), rounding.norm(wide, 1e-6))
        assert_within(module.gated(x), gated if module is reference else gated_twice, factor=twice)
        assert_within(module.linear(x, weight_OI, bias), product)


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"linear.*x \(3, 4\) float32, weight \(2, 5\) float32"):
        products.linear(torch.zeros(3, 4), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"attention"):
        passes.attention(
            torch.zeros(3, 4, 8),
            torch.zeros(3, 3, 8),
            torch.zeros(3, 3, 8),
            passes.paths(flat((3,)), torch.device("cpu")),
            rule_of(8),
        )


def test_alibi_slopes() -> None:
    """The values that the Baichuan-13B code gives for 40 heads (models with a power of two are the paper's)."""
    assert alibi_slopes(8).tolist() == [2.0**-k for k in range(1, 9)]
    forty = alibi_slopes(40)
    assert torch.allclose(forty[:4], torch.tensor([0.8409, 0.7071, 0.5946, 0.5]), atol=1e-4)
    assert float(forty[31]) == 0.00390625
    assert abs(float(forty[32]) - 0.9170) < 1e-4
    assert abs(float(forty[39]) - 0.27263) < 1e-4


@pytest.mark.parametrize(("holder", "name"), [(holder, name) for holder, name in UNCLEARED], ids=lambda x: str(x)[-30:])
def test_memory_that_is_not_written_shows(holder: object, name: str) -> None:
    """Whichever way a kernel takes it, from the arena too."""
    given = torch.zeros(2, 3)
    ways = {
        "empty": ((2, 3),), "empty_like": (given,), "new_empty": (given, (2, 3)),
        "empty_strided": ((2, 3), (3, 1)), "new_empty_strided": (given, (2, 3), (3, 1)),
    }  # fmt: skip
    arguments = (Arena(PAGE), (2, 3), torch.float32) if holder is Arena else ways[name]
    made = getattr(holder, name)(*arguments)
    assert made.shape == (2, 3)
    assert made.isnan().all()
    with arena.use_arena(Arena(4 * LEAST)):
        assert (arena.empty(LEAST, dtype=torch.int8) == 99).all()
    assert arena.empty(LEAST, dtype=torch.float32).isnan().all()


def column_of_ones(width: int, at: int, factor: float) -> torch.Tensor:
    found = torch.ones(width)
    found[at] = factor
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["attention", "norm", "gate", "product", "scales", "heads", "value head"])
def test_a_column_that_is_wrong_by_a_factor_fails(kind: str, dtype: torch.dtype) -> None:
    """Of every kind of kernel: right as it is; a column 0.1 % off in float32, 1 % in half precision, is found, and so
    is one that is not written."""
    x, weight = rows(65, 40, dtype=dtype), rows(24, 40, seed=2, dtype=dtype)
    product = Bounded.of(x).product(Bounded.of(weight.T))
    q, k, v = (rows(65, 2, 16, seed=seed, dtype=dtype) for seed in range(3))
    acc, scale_T, scale, bias = (rows(65, 40) * 1e6).int(), rows(65, seed=1).abs(), rows(40, seed=2) * 1e-5, rows(40)
    turn = (rows(65, 10, seed=6).cos(), rows(65, 10, seed=6).sin())
    flat_heads = reference.rotate(x.view(65, 2, 20), *turn)
    made = {
        "attention": lambda: (
            reference.attention(q, k, v, flat((63, 2)), rule_of(16)), bounded_attention(q, k, v, flat((63, 2)),
            rule_of(16))
        ),
        "norm": lambda: (reference.rms_norm(x, None, 1e-6), rounding.norm(Bounded.of(x), 1e-6)),
        "gate": lambda: (reference.gated(x), rounding.gated(Bounded.of(x))),
        "product": lambda: (reference.linear(x, weight, None), product),
        "scales": lambda: (
            Sums(acc, scale_T, scale, bias).float().to(dtype), rounding.scaled(acc, scale_T, scale, bias)
        ),
        "heads": lambda: (flat_heads, rounding.turned(Bounded.of(x.view(65, 2, 20)), *turn)),
        "value head": lambda: (passes.value_head(x, weight.float(), None).to(dtype), product),
    }  # fmt: skip
    found, bound = made[kind]()
    assert_within(found, bound)
    width = found.shape[-1]
    for at in (0, width // 2, width - 1):
        for wrong in (rounding.FACTORS[dtype], 2 - rounding.FACTORS[dtype], float("nan")):
            planted = (found.double() * column_of_ones(width, at, wrong)).to(dtype)
            with pytest.raises(AssertionError, match="times what its sum allows"):
                assert_within(planted, bound)


@pytest.mark.parametrize("wrong", [1.03, 0.97, -1.0])
def test_a_wrong_column_of_int8_rows_fails(wrong: float) -> None:
    """Half a step of 127 hides little: 3 % in one column of what is rounded."""
    x = rows(65, 40)
    values, scale = integer.quantize(x)
    assert_rows_within(values, scale, Bounded.of(x))
    for at in (0, 39):
        planted, _ = integer.quantize(x * column_of_ones(40, at, wrong))
        with pytest.raises(AssertionError):
            assert_rows_within(planted, scale, Bounded.of(x))
    with pytest.raises(AssertionError):
        assert_rows_within(values, scale * 1.0001, Bounded.of(x))


def test_any_order_of_whole_numbers_gives_the_same_sum() -> None:
    """A bound grows with the sum's length. Sums that float32 holds exactly show a wrong factor at any length."""
    generator = torch.Generator().manual_seed(3)
    x, weight = (torch.randint(-15, 16, shape, generator=generator).float() for shape in ((9, 13696), (5, 13696)))
    exact = (x.double() @ weight.double().T).float()
    assert torch.equal(library.linear(x, weight, None), exact)
    assert torch.equal(reference.linear(x, weight, None), exact)
    assert torch.equal(passes.value_head(x, weight, None), exact)
