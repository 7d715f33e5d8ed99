"""Triton's passes and attention against their twins, in the interpreter or on the card: see test_triton_products."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from lightrm.kernels import cuda, integer, reference
from lightrm.kernels.paths import paths_of
from lightrm.packing import ROOT, Segment
from lightrm.positions import alibi_slopes
from lightrm.schemes.hadamard import hadamard
from tests.test_centered import assert_biased_gate
from tests.test_integer_kernels import hadamard_matrix, normal, product_of
from tests.test_kernels import assert_twice, exact_attention, flat, forest_of
from tests.test_triton_products import DEVICE, here

pytestmark = pytest.mark.usefixtures("poisoned")
TOKENS = (1, 2, 17, 65)
FOREST = (Segment(0, 70), Segment(70, 200, 0), Segment(200, 201, 0), Segment(201, 330), Segment(330, 333, 1))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("width", [1, 15, 63, 64, 127, 1000])
def test_norm_and_quantize(tokens: int, width: int) -> None:
    x = (normal(tokens, width) * torch.logspace(-6, 6, tokens)[:, None]).to(DEVICE)
    x[0] = 0
    values, scale = cuda.quantize(x)
    slow, slow_scale = integer.quantize(x)
    assert torch.equal(values, slow)
    assert torch.equal(scale, slow_scale)
    values, scale = cuda.norm_quantize(x, 1e-5)
    slow, slow_scale = integer.norm_quantize(x, 1e-5)
    assert torch.equal(values, slow)
    wide = x.double()
    exact = wide.abs().amax(1).clamp(min=1e-30) / 127 * (wide.square().mean(1) + 1e-5).rsqrt()
    assert_twice(scale, slow_scale, exact)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("sums", [True, False])
def test_add_norm_quantize(tokens: int, sums: bool) -> None:
    """What waits is added in place, sums with their scales or floats as they are."""
    acc, row_scale, scale, bias = here(*product_of(tokens, 100), normal(100, seed=8))
    x = normal(tokens, 100, seed=7).to(DEVICE)
    found, slow = x.clone(), x.clone()
    slow_values, slow_scale = integer.add_norm_quantize(slow, acc, row_scale, scale, bias, 1e-6)
    exact = x.double() + acc.double() * row_scale.double()[:, None] * scale.double() + bias.double()
    waiting = acc if sums else integer.dequantize(acc, row_scale, scale, bias)
    values, found_scale = cuda.add_norm_quantize(found, waiting, row_scale, scale, bias, 1e-6)
    assert_twice(found, slow, exact)
    assert_twice(found_scale, slow_scale, exact.abs().amax(1) / 127 * (exact.square().mean(1) + 1e-6).rsqrt())
    assert (values.int() - slow_values.int()).abs().max() <= 1, "a rounding may tip over, no more"
    assert (values != slow_values).float().mean() < 2e-3


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("shifted", [False, True])
def test_a_norm_whose_squares_overflow_is_nan(shifted: bool) -> None:
    x = here(normal(4, 40))[0]
    x[1] *= 1e19
    x[3, 2] = 3e38
    shift = here(normal(40, seed=3))[0] if shifted else None
    assert torch.isnan(cuda.norm_quantize(x, 1e-6, shift)[1]).tolist() == [False, True, False, True]
    assert torch.isnan(cuda.rms_norm(x, None, 1e-6)).all(1).tolist() == [False, True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", TOKENS)
def test_float_norm(dtype: torch.dtype, tokens: int) -> None:
    """Of all rows, and of some."""
    x, weight = here(normal(tokens, 40).to(dtype), normal(40, seed=1).to(dtype))
    wide = x.double()
    exact = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    assert_twice(cuda.rms_norm(x, None, 1e-6), reference.rms_norm(x, None, 1e-6), exact)
    exact = exact * weight.double()
    assert_twice(cuda.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6), exact)
    rows = torch.tensor([tokens - 1, 0, tokens // 2], device=DEVICE)
    some, _ = cuda.norm(x, 1e-6, weight_D=weight, rows_S=rows)
    assert torch.equal(some, cuda.rms_norm(x, weight, 1e-6)[rows])


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("width", "block"), [(48, 16), (48, 1), (1536, 256), (344, 8), (256, 256), (129, 1), (43, 1)])
@pytest.mark.parametrize("sums", [True, False])
def test_silu_mul_quantize(tokens: int, width: int, block: int, sums: bool) -> None:
    acc, row_scale, scale = here(*product_of(tokens, 2 * width))
    scale = scale * 30  # gates far from zero on both sides
    if sums:
        values, found_scale = cuda.silu_mul_quantize(acc, row_scale, scale, block)
        gate_up = acc.double() * (row_scale.double()[:, None] * scale.double())
        slow_values, slow_scale = integer.silu_mul_quantize(acc, row_scale, scale, block)
    else:
        half = (acc.float() * (row_scale[:, None] * scale)).half()
        values, found_scale = cuda.silu_mul_quantize(half, None, None, block)
        gate_up = half.double()
        slow_values, slow_scale = integer.quantize(hadamard(reference.silu_mul(half.float()), block))
    gate, up = gate_up.chunk(2, 1)
    hidden = torch.nn.functional.silu(gate) * up
    matrix = torch.kron(hadamard_matrix(block), torch.eye(width // block).double()).to(DEVICE)
    turned = hidden if block == 1 else hidden @ matrix
    assert_twice(found_scale, slow_scale, turned.abs().amax(1).clamp(min=1e-30) / 127)
    assert (values.int() - slow_values.int()).abs().max() <= 1, "a rounding may tip over, no more"
    assert (values != slow_values).float().mean() < 2e-3
    if not sums:
        assert_twice(cuda.silu_mul(half.float(), block), hadamard(reference.silu_mul(half.float()), block), turned)


def test_bad_numbers_show() -> None:
    """NaN and Inf make the scale of their row NaN or Inf, and of no other row."""
    x = normal(4, 64).to(DEVICE)
    x[1, 3], x[2, 5] = float("nan"), float("-inf")
    for kernel in (cuda.quantize, lambda y: cuda.norm_quantize(y, 1e-6)):
        assert torch.isfinite(kernel(x)[1]).tolist() == [True, False, False, True]
    half = normal(4, 128).half().to(DEVICE)
    half[3, 7] = float("inf")
    assert torch.isfinite(cuda.silu_mul_quantize(half, None, None, 32)[1]).tolist() == [True] * 3 + [False]


@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 8), (6, 2, 10), (5, 1, 80), (3, 3, 64), (2, 1, 128)])
@pytest.mark.parametrize("rope", [True, False])
def test_split_heads(tokens: int, heads: int, kv_heads: int, width: int, rope: bool) -> None:
    """From sums, by the 2x rule; from floats, turned where they lie, what the twin makes of them."""
    widths = (heads * width, kv_heads * width)
    acc, row_scale, scale = here(*product_of(tokens, widths[0] + 2 * widths[1]))
    bias, angle = here(normal(len(scale), seed=5), normal(tokens, width // 2, seed=6))
    rotation = (angle.cos(), angle.sin()) if rope else None
    found = cuda.split_heads(acc, row_scale, scale, bias, widths, rotation, torch.float32, width)
    slow, wide = (
        [part.flatten(1) for part in integer.split_heads(acc, row_scale, scale, bias, widths, turned, width)]
        for turned in (rotation, None)
    )
    wide = [part.double() for part in wide]
    if rotation is not None:
        wide = [reference_turn(part, rotation, width) if k < 2 else part for k, part in enumerate(wide)]
    for fast_part, slow_part, exact_part in zip(found, slow, wide, strict=True):
        assert_twice(fast_part, slow_part, exact_part)
    floats = integer.dequantize(acc, row_scale, scale, bias)
    again = cuda.split_heads(floats, None, None, None, widths, rotation, torch.float32, width)
    assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))
    assert again[0].untyped_storage().data_ptr() == floats.untyped_storage().data_ptr()


def reference_turn(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], width: int) -> torch.Tensor:
    cos, sin = (table.double()[:, None] for table in rotation)
    a, b = x.view(len(x), -1, width).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).flatten(1)


@pytest.mark.parametrize(("count", "outputs", "width"), [(1, 1, 40), (9, 1, 100), (5, 3, 64)])
def test_value_head(count: int, outputs: int, width: int) -> None:
    x, weight, bias = here(normal(12, width), normal(outputs, width, seed=1), normal(outputs, seed=2))
    rows = torch.arange(count, device=DEVICE) % 7 + 3
    exact = x[rows].double() @ weight.double().T
    assert_twice(cuda.value_head(x, rows, weight, None), x[rows] @ weight.T, exact)
    assert_twice(cuda.value_head(x, rows, weight, bias), x[rows] @ weight.T + bias, exact + bias.double())
    assert cuda.value_head(x, rows[:0], weight, bias).shape == (0, outputs)


def qkv(tokens: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    shapes = ((tokens, heads, width), (tokens, kv_heads, width), (tokens, kv_heads, width))
    return here(*(normal(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(1,), (5, 1, 65), (63, 65), (127, 128, 129)])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 8), (3, 1, 64), (2, 2, 80), (2, 1, 96), (2, 2, 128)])
@pytest.mark.parametrize("alibi", [False, True])
def test_attention(dtype, lengths, heads, kv_heads, width, alibi) -> None:
    q, k, v = qkv(sum(lengths), heads, kv_heads, width, dtype)
    slopes = alibi_slopes(heads).to(DEVICE) if alibi else None
    segments = flat(lengths)
    found = cuda.attention(q, k, v, paths_of(segments, DEVICE), slopes)[0]
    slow = reference.attention(q, k, v, segments, slopes)
    exact = exact_attention(q.cpu(), k.cpu(), v.cpu(), segments, None if slopes is None else slopes.cpu()).to(DEVICE)
    assert_twice(found, slow, exact)


@pytest.mark.parametrize("alibi", [False, True])
def test_attention_leaves_as_int8(alibi: bool) -> None:
    """The last head to arrive rounds the rows of its tile, as `quantize` rounds what the kernel wrote."""
    q, k, v = qkv(333, 6, 2, 80, torch.float16)
    slopes = alibi_slopes(6).to(DEVICE) if alibi else None
    mixed, values, scale = cuda.attention(q, k, v, paths_of(FOREST, DEVICE), slopes, quantized=True)
    assert torch.equal(mixed, cuda.attention(q, k, v, paths_of(FOREST, DEVICE), slopes)[0])
    expected, expected_scale = integer.quantize(mixed.flatten(1).float())
    assert torch.equal(values, expected)
    assert torch.equal(scale, expected_scale)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 90), st.integers(0, 3)), min_size=1, max_size=6), st.booleans())
def test_attention_over_a_forest(nodes: list[tuple[int, int]], alibi: bool) -> None:
    """Prompts, their answers, and answers to those, some of them empty: each sees its ancestors and itself."""
    segments = forest_of(nodes)
    start = segments[-1].end
    q, k, v = qkv(start, 4, 2, 8, torch.float32)
    slopes = alibi_slopes(4).to(DEVICE) if alibi else None
    found = cuda.attention(q, k, v, paths_of(segments, DEVICE), slopes)[0]
    exact = exact_attention(q.cpu(), k.cpu(), v.cpu(), segments, None if slopes is None else slopes.cpu())
    torch.testing.assert_close(found.cpu().double(), exact, atol=1e-6, rtol=1e-5)


def test_picked_queries() -> None:
    """The last token of each sequence alone: what it gets among all the others, bit for bit."""
    q, k, v = qkv(333, 4, 2, 64, torch.float16)
    last = [segment.end - 1 for segment in FOREST]
    everything = cuda.attention(q, k, v, paths_of(FOREST, DEVICE), None)[0]
    picked = cuda.attention(q[last], k, v, paths_of(FOREST, DEVICE, last), None)[0]
    torch.testing.assert_close(picked, everything[last], atol=0, rtol=0)
    with pytest.raises(ValueError, match="token 333 lies in no segment"):
        paths_of(FOREST, DEVICE, [333])


def test_sharing_and_neighbours_change_nothing() -> None:
    """An answer behind a shared prompt gets, bit for bit, what it gets in a sequence of its own, alone in a pack."""
    q, k, v = qkv(333, 4, 2, 64, torch.float16)
    slopes = alibi_slopes(4).to(DEVICE)
    shared = cuda.attention(q, k, v, paths_of(FOREST, DEVICE), slopes)[0]
    for index, segment in enumerate(FOREST):
        path, at = [], index
        while at != ROOT:
            path = [*range(FOREST[at].start, FOREST[at].end), *path]
            at = FOREST[at].parent
        alone = cuda.attention(q[path], k[path], v[path], paths_of(flat((len(path),)), DEVICE), slopes)[0]
        assert torch.equal(alone[-(segment.end - segment.start) :], shared[segment.start : segment.end])


def test_heads_may_be_columns_of_one_tensor() -> None:
    """Query, key and value as a fused product leaves them: rows far apart, heads side by side. Or heads far apart."""
    whole = normal(150, 8 * 64).half().to(DEVICE)
    q, k, v = (part.unflatten(1, (-1, 64)) for part in whole.split([256, 128, 128], 1))
    paths = paths_of(flat((150,)), DEVICE)
    found = cuda.attention(q, k, v, paths, None)[0]
    assert torch.equal(found, cuda.attention(q.contiguous(), k.contiguous(), v.contiguous(), paths, None)[0])
    by_head = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    assert torch.equal(found, cuda.attention(*by_head, paths, None)[0])


def test_rows_may_lie_apart() -> None:
    """Columns of a wider tensor, a transposed tensor; what is added to in place must have its rows whole."""
    wide = normal(9, 80).to(DEVICE)
    part, across = wide[:, 8:72], wide[:, 8:72].T.contiguous().T
    expected = cuda.norm_quantize(part.contiguous(), 1e-6)
    for x in (part, across):
        assert all(torch.equal(a, b) for a, b in zip(cuda.norm_quantize(x, 1e-6), expected, strict=True))
        assert torch.equal(cuda.silu_mul(x), cuda.silu_mul(part.contiguous()))
    acc, row_scale, scale, bias = here(*product_of(9, 64), normal(64, seed=8))
    alone, among = part.contiguous(), wide.clone()
    cuda.add_norm_quantize(alone, acc, row_scale, scale, bias, 1e-6)
    cuda.add_norm_quantize(among[:, 8:72], acc, row_scale, scale, bias, 1e-6)
    assert torch.equal(among[:, 8:72], alone)
    assert torch.equal(among[:, :8], wide[:, :8])
    with pytest.raises(ValueError, match="needs its rows whole"):
        cuda.add_norm_quantize(across, acc, row_scale, scale, bias, 1e-6)


def test_a_row_does_not_see_its_neighbours() -> None:
    acc, row_scale, scale = here(*product_of(37, 96))
    x = normal(37, 48, seed=3).to(DEVICE)
    together = (*cuda.norm_quantize(x, 1e-6), *cuda.silu_mul_quantize(acc, row_scale, scale, 16))
    for t in (0, 20, 36):
        rows = slice(t, t + 1)
        alone = (*cuda.norm_quantize(x[rows], 1e-6), *cuda.silu_mul_quantize(acc[rows], row_scale[rows], scale, 16))
        assert all(torch.equal(a[rows], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("width", [1, 63, 100])
def test_shifted_rows_and_biased_gates(tokens: int, width: int) -> None:
    """A vector taken off the normed rows, and what the bias gives back, as their twins have them."""
    acc, row_scale, scale, bias, shift = here(*product_of(tokens, width), normal(width, seed=8), normal(width, seed=9))
    x = 3 * normal(tokens, width, seed=7).to(DEVICE)
    wide = x.double()
    exact = wide * (wide.square().mean(1, keepdim=True) + 1e-6).rsqrt() - shift.double()
    values, found_scale = cuda.norm_quantize(x, 1e-6, shift)
    slow_values, slow_scale = integer.norm_quantize(x, 1e-6, shift)
    assert_twice(found_scale, slow_scale, exact.abs().amax(1).clamp(min=1e-30) / 127)
    assert (values.int() - slow_values.int()).abs().max() <= 1
    assert ((values.double() * found_scale[:, None] - exact).abs() <= 0.51 * found_scale[:, None]).all()
    alone = x + integer.dequantize(acc, row_scale, scale, bias)
    added = x.clone()
    both = cuda.add_norm_quantize(added, acc, row_scale, scale, bias, 1e-6, shift)
    for a, b in zip(both, cuda.norm_quantize(alone, 1e-6, shift), strict=True):
        torch.testing.assert_close(a.float(), b.float(), atol=1, rtol=1e-5)
    acc, row_scale, scale, bias = here(*product_of(tokens, 2 * width), normal(2 * width, seed=8))
    assert_biased_gate(cuda, acc, row_scale, scale, bias)
