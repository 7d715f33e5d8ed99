"""Triton's passes and attention against their twins, in the interpreter or on the card: see test_triton_products."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from benchmarks import rounding
from benchmarks.rounding import Bounded
from lightrm.kernels import integer
from lightrm.kernels.cuda import cuda_attention, cuda_passes
from lightrm.kernels.operands import Sums
from lightrm.kernels.paths import paths_of
from lightrm.kernels.segments import ROOT, Segment
from tests.test_centered import assert_biased_gate
from tests.test_integer_kernels import assert_normed_within, bounded_heads, normal, product_of, turned_by
from tests.test_kernels import (
    KINDS,
    assert_rows_within,
    assert_within,
    bounded_attention,
    flat,
    forest_of,
    rule_of,
)  # fmt: skip
from tests.test_triton_products import DEVICE, cut, here, wrong

pytestmark = pytest.mark.usefixtures("poisoned")
TOKENS = (1, 2, 17, 65)
FOREST = (Segment(0, 70), Segment(70, 200, 0), Segment(200, 201, 0), Segment(201, 330), Segment(330, 333, 1))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("width", [1, 15, 63, 64, 127, 1000])
def test_norm_and_quantize(tokens: int, width: int) -> None:
    x = (normal(tokens, width) * torch.logspace(-6, 6, tokens)[:, None]).to(DEVICE)
    x[0] = 0
    values, scale = cuda_passes.quantize(x)
    slow, slow_scale = integer.quantize(x)
    assert torch.equal(values, slow)
    assert torch.equal(scale, slow_scale)
    values, scale = cuda_passes.norm_quantize(x, 1e-5)
    assert torch.equal(values, integer.norm_quantize(x, 1e-5)[0])
    assert_normed_within(values, scale, Bounded.of(x), 1e-5)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("sums", [True, False])
def test_add_norm_quantize(tokens: int, sums: bool) -> None:
    """What waits is added in place, sums with their scales or floats as they are."""
    acc, row_scale, scale, bias = here(*product_of(tokens, 100), normal(100, seed=8))
    x = normal(tokens, 100, seed=7).to(DEVICE)
    found = x.clone()
    bound = Bounded.of(x) + rounding.scaled(acc, row_scale, scale, bias)
    waiting = acc if sums else Sums(acc, row_scale, scale, bias).float()
    values, found_scale = cuda_passes.add_norm_quantize(found, Sums(waiting, row_scale, scale, bias), 1e-6)
    assert_within(found, bound)
    assert_normed_within(values, found_scale, bound, 1e-6)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("shifted", [False, True])
def test_a_norm_whose_squares_overflow_is_nan(shifted: bool) -> None:
    x = here(normal(4, 40))[0]
    x[1] *= 1e19
    x[3, 2] = 3e38
    shift = here(normal(40, seed=3))[0] if shifted else None
    assert torch.isnan(cuda_passes.norm_quantize(x, 1e-6, None, shift)[1]).tolist() == [False, True, False, True]
    assert torch.isnan(cuda_passes.rms_norm(x, None, 1e-6)).all(1).tolist() == [False, True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", TOKENS)
def test_float_norm(dtype: torch.dtype, tokens: int) -> None:
    """Of all rows, and of some."""
    x, weight = here(normal(tokens, 40).to(dtype), normal(40, seed=1).to(dtype))
    normed = rounding.norm(Bounded.of(x), 1e-6)
    assert_within(cuda_passes.rms_norm(x, None, 1e-6), normed, cut=cut(dtype), factor=wrong(dtype))
    twice = normed.rounded(dtype, cut(dtype)) * Bounded.of(weight)
    factor = 1.04 if dtype == torch.bfloat16 else None
    assert_within(cuda_passes.rms_norm(x, weight, 1e-6), twice, cut=cut(dtype), factor=factor)
    rows = torch.tensor([tokens - 1, 0, tokens // 2], device=DEVICE)
    some, _ = cuda_passes.norm(x, 1e-6, weight_D=weight, rows_S=rows)
    assert torch.equal(some, cuda_passes.rms_norm(x, weight, 1e-6)[rows])


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("width", "block"), [(48, 16), (48, 1), (1536, 256), (344, 8), (256, 256), (129, 1), (43, 1)])
@pytest.mark.parametrize("sums", [True, False])
def test_gated_quantize(tokens: int, width: int, block: int, sums: bool) -> None:
    acc, row_scale, scale = here(*product_of(tokens, 2 * width))
    scale = scale * 30  # gates far from zero on both sides
    if sums:
        values, found_scale = cuda_passes.gated_quantize(Sums(acc, row_scale, scale), block)
        gate_up = rounding.scaled(acc, row_scale, scale, None)
    else:
        half = (acc.float() * (row_scale[:, None] * scale)).half()
        values, found_scale = cuda_passes.gated_quantize(Sums(half), block)
        gate_up = Bounded.of(half)
    bound = turned_by(rounding.gated(gate_up), block)
    assert_rows_within(values, found_scale, bound)
    if not sums:
        assert_within(cuda_passes.gated(half.float(), block), bound, factor=1.01 if tokens > 2 else 0)


def test_bad_numbers_show() -> None:
    """NaN and Inf make the scale of their row NaN or Inf, and of no other row."""
    x = normal(4, 64).to(DEVICE)
    x[1, 3], x[2, 5] = float("nan"), float("-inf")
    for kernel in (cuda_passes.quantize, lambda y: cuda_passes.norm_quantize(y, 1e-6)):
        assert torch.isfinite(kernel(x)[1]).tolist() == [True, False, False, True]
    half = normal(4, 128).half().to(DEVICE)
    half[3, 7] = float("inf")
    assert torch.isfinite(cuda_passes.gated_quantize(Sums(half), 32)[1]).tolist() == [True] * 3 + [False]


@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 8), (6, 2, 10), (5, 1, 80), (3, 3, 64), (2, 1, 128)])
@pytest.mark.parametrize("rope", [True, False])
def test_split_heads(tokens: int, heads: int, kv_heads: int, width: int, rope: bool) -> None:
    """From sums, within what they allow; from floats, turned where they lie, what the twin makes of them."""
    widths = (heads * width, kv_heads * width)
    acc, row_scale, scale = here(*product_of(tokens, widths[0] + 2 * widths[1]))
    bias, angle = here(normal(len(scale), seed=5), normal(tokens, width // 2, seed=6))
    rotation = (angle.cos(), angle.sin()) if rope else None
    found = cuda_passes.split(Sums(acc, row_scale, scale, bias), widths, width, rotation, torch.float32)
    for part, bound in zip(found, bounded_heads(acc, row_scale, scale, bias, widths, rotation, width), strict=True):
        assert_within(part.unflatten(1, (-1, width)), bound)
    floats = Sums(acc, row_scale, scale, bias).float()
    again = cuda_passes.split(Sums(floats), widths, width, rotation, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))
    assert again[0].untyped_storage().data_ptr() == floats.untyped_storage().data_ptr()


@pytest.mark.parametrize(("count", "outputs", "width"), [(1, 1, 40), (9, 1, 100), (5, 3, 64)])
def test_value_head(count: int, outputs: int, width: int) -> None:
    x, weight, bias = here(normal(12, width), normal(outputs, width, seed=1), normal(outputs, seed=2))
    rows = torch.arange(count, device=DEVICE) % 7 + 3
    bound = Bounded.of(x[rows]).product(Bounded.of(weight.T))
    assert_within(cuda_passes.value_head(x, weight, None, rows), bound)
    assert_within(cuda_passes.value_head(x, weight, bias, rows), bound + Bounded.of(bias))
    assert cuda_passes.value_head(x, weight, bias, rows[:0]).shape == (0, outputs)


def qkv(tokens: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    shapes = ((tokens, heads, width), (tokens, kv_heads, width), (tokens, kv_heads, width))
    return here(*(normal(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(1,), (5, 1, 65), (63, 65), (127, 128, 129)])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 8), (3, 1, 64), (2, 2, 80), (2, 1, 96), (2, 2, 128)])
@pytest.mark.parametrize("kind", ["plain", "alibi", "capped and windowed"])
def test_attention(dtype, lengths, heads, kv_heads, width, kind) -> None:
    q, k, v = qkv(sum(lengths), heads, kv_heads, width, dtype)
    rule = rule_of(width, heads, kind, DEVICE)
    segments = flat(lengths)
    found = cuda_attention.attend(q, k, v, paths_of(segments, DEVICE), rule)[0]
    bound = bounded_attention(q, k, v, segments, rule, cut=cut(dtype))
    assert_within(found, bound, cut=cut(dtype), factor=wrong(dtype))


@pytest.mark.parametrize("kind", ["alibi", "capped and windowed"])
def test_attention_leaves_as_int8(kind: str) -> None:
    """The last head to arrive rounds the rows of its tile, as `quantize` rounds what the kernel wrote."""
    q, k, v = qkv(333, 6, 2, 80, torch.float16)
    rule = rule_of(80, 6, kind, DEVICE)
    mixed, values, scale = cuda_attention.attend(q, k, v, paths_of(FOREST, DEVICE), rule, quantized=True)
    assert torch.equal(mixed, cuda_attention.attend(q, k, v, paths_of(FOREST, DEVICE), rule)[0])
    expected, expected_scale = integer.quantize(mixed.flatten(1).float())
    assert torch.equal(values, expected)
    assert torch.equal(scale, expected_scale)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 90), st.integers(0, 3)), min_size=1, max_size=6), st.sampled_from(KINDS))
def test_attention_over_a_forest(nodes: list[tuple[int, int]], kind: str) -> None:
    """Prompts, their answers, and answers to those, some of them empty: each sees its ancestors and itself."""
    segments = forest_of(nodes)
    start = segments[-1].end
    q, k, v = qkv(start, 4, 2, 8, torch.float32)
    rule = rule_of(8, 4, kind, DEVICE)
    found = cuda_attention.attend(q, k, v, paths_of(segments, DEVICE), rule)[0]
    assert_within(found, bounded_attention(q, k, v, segments, rule), factor=0)


def test_picked_queries() -> None:
    """The last token of each sequence alone: what it gets among all the others, bit for bit."""
    q, k, v = qkv(333, 4, 2, 64, torch.float16)
    last = [segment.end - 1 for segment in FOREST]
    everything = cuda_attention.attend(q, k, v, paths_of(FOREST, DEVICE), rule_of(64))[0]
    picked = cuda_attention.attend(q[last], k, v, paths_of(FOREST, DEVICE, last), rule_of(64))[0]
    torch.testing.assert_close(picked, everything[last], atol=0, rtol=0)
    with pytest.raises(ValueError, match="token 333 lies in no segment"):
        paths_of(FOREST, DEVICE, [333])


@pytest.mark.parametrize("kind", ["alibi", "capped and windowed"])
def test_sharing_and_neighbours_change_nothing(kind: str) -> None:
    """An answer behind a shared prompt gets, bit for bit, what it gets in a sequence of its own, alone in a pack."""
    q, k, v = qkv(333, 4, 2, 64, torch.float16)
    rule = rule_of(64, 4, kind, DEVICE)
    shared = cuda_attention.attend(q, k, v, paths_of(FOREST, DEVICE), rule)[0]
    for index, segment in enumerate(FOREST):
        path, at = [], index
        while at != ROOT:
            path = [*range(FOREST[at].start, FOREST[at].end), *path]
            at = FOREST[at].parent
        alone = cuda_attention.attend(q[path], k[path], v[path], paths_of(flat((len(path),)), DEVICE), rule)[0]
        assert torch.equal(alone[-(segment.end - segment.start) :], shared[segment.start : segment.end])


def test_heads_may_be_columns_of_one_tensor() -> None:
    """Query, key and value as a fused product leaves them: rows far apart, heads side by side. Or heads far apart."""
    whole = normal(150, 8 * 64).half().to(DEVICE)
    q, k, v = (part.unflatten(1, (-1, 64)) for part in whole.split([256, 128, 128], 1))
    paths, rule = paths_of(flat((150,)), DEVICE), rule_of(64)
    found = cuda_attention.attend(q, k, v, paths, rule)[0]
    assert torch.equal(found, cuda_attention.attend(q.contiguous(), k.contiguous(), v.contiguous(), paths, rule)[0])
    by_head = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    assert torch.equal(found, cuda_attention.attend(*by_head, paths, rule)[0])


def test_rows_may_lie_apart() -> None:
    """Columns of a wider tensor, a transposed tensor; what is added to in place must have its rows whole."""
    wide = normal(9, 80).to(DEVICE)
    part, across = wide[:, 8:72], wide[:, 8:72].T.contiguous().T
    expected = cuda_passes.norm_quantize(part.contiguous(), 1e-6)
    for x in (part, across):
        assert all(torch.equal(a, b) for a, b in zip(cuda_passes.norm_quantize(x, 1e-6), expected, strict=True))
        assert torch.equal(cuda_passes.gated(x), cuda_passes.gated(part.contiguous()))
    acc, row_scale, scale, bias = here(*product_of(9, 64), normal(64, seed=8))
    alone, among = part.contiguous(), wide.clone()
    cuda_passes.add_norm_quantize(alone, Sums(acc, row_scale, scale, bias), 1e-6)
    cuda_passes.add_norm_quantize(among[:, 8:72], Sums(acc, row_scale, scale, bias), 1e-6)
    assert torch.equal(among[:, 8:72], alone)
    assert torch.equal(among[:, :8], wide[:, :8])
    with pytest.raises(ValueError, match="needs its rows whole"):
        cuda_passes.add_norm_quantize(across, Sums(acc, row_scale, scale, bias), 1e-6)


def test_a_row_does_not_see_its_neighbours() -> None:
    acc, row_scale, scale = here(*product_of(37, 96))
    x = normal(37, 48, seed=3).to(DEVICE)
    together = (*cuda_passes.norm_quantize(x, 1e-6), *cuda_passes.gated_quantize(Sums(acc, row_scale, scale), 16))
    for t in (0, 20, 36):
        rows = slice(t, t + 1)
        alone = (
            *cuda_passes.norm_quantize(x[rows], 1e-6),
            *cuda_passes.gated_quantize(Sums(acc[rows], row_scale[rows], scale), 16),
        )
        assert all(torch.equal(a[rows], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("width", [1, 63, 100])
def test_shifted_rows_and_biased_gates(tokens: int, width: int) -> None:
    """A vector taken off the normed rows, and what the bias gives back, as their twins have them."""
    acc, row_scale, scale, bias, shift = here(*product_of(tokens, width), normal(width, seed=8), normal(width, seed=9))
    x = 3 * normal(tokens, width, seed=7).to(DEVICE)
    bound = rounding.norm(Bounded.of(x), 1e-6) - Bounded.of(shift)
    assert_rows_within(*cuda_passes.norm_quantize(x, 1e-6, None, shift), bound)
    alone = x + Sums(acc, row_scale, scale, bias).float()
    added = x.clone()
    both = cuda_passes.add_norm_quantize(added, Sums(acc, row_scale, scale, bias), 1e-6, None, shift)
    for a, b in zip(both, cuda_passes.norm_quantize(alone, 1e-6, None, shift), strict=True):
        torch.testing.assert_close(a.float(), b.float(), atol=1, rtol=1e-5)
    acc, row_scale, scale, bias = here(*product_of(tokens, 2 * width), normal(2 * width, seed=8))
    assert_biased_gate(cuda_passes, acc, row_scale, scale, bias)
