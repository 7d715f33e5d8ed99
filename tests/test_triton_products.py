"""Triton's products against their twins, on ugly shapes: in the interpreter, or on the card where there is one.

Whole numbers by equality, floats within what their own sums allow. Outputs start as NaN.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from benchmarks import rounding
from benchmarks.rounding import Bounded
from lightrm.kernels import gemm, integer, products
from lightrm.kernels.cuda import cuda_passes, cuda_products
from lightrm.kernels.operands import Rows, Sums
from lightrm.schemes import grouped, int4, int8, tiled
from lightrm.schemes.grouped import Grouped
from lightrm.schemes.int4 import Int4
from lightrm.schemes.int8 import Rowwise
from tests.test_integer_kernels import int8s, normal
from tests.test_kernels import assert_within

pytestmark = pytest.mark.usefixtures("poisoned")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
UGLY = (1, 15, 16, 17, 63, 65, 127, 1000)


def here(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


def cut(dtype: torch.dtype) -> bool:
    """Whether a number that leaves in this dtype is cut off, not rounded: in bfloat16, by Triton's interpreter."""
    return DEVICE.type == "cpu" and dtype == torch.bfloat16


def leaving(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A float32 tensor in another dtype, as a kernel makes it here."""
    return (x.view(torch.int32) & -(2**16)).view(torch.float32).to(dtype) if cut(dtype) else x.to(dtype)


def wrong(dtype: torch.dtype) -> float | None:
    """A factor that must be seen; what is cut off hides one that rounding would not."""
    return 1.02 if cut(dtype) else None


def ones(count: int) -> torch.Tensor:
    return torch.ones(count, device=DEVICE)


def int4_weight(outputs: int, inputs: int, group: int, seed: int = 3) -> Int4:
    made = int4.quantize(normal(outputs, inputs, seed=seed) * torch.logspace(-2, 2, outputs)[:, None], group)
    return Int4(*here(made.packed, made.multiplier_OG, made.scale_O))


@pytest.mark.parametrize("tokens", UGLY)
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (15, 17), (64, 127), (65, 63), (127, 65), (1000, 16)])
def test_int8_sums_are_exact(tokens: int, inputs: int, outputs: int) -> None:
    values, weight = here(int8s(tokens, inputs), int8s(outputs, inputs, seed=1))
    values[0], weight[0] = 127, -127  # the largest sums there are
    found = cuda_products.product(values, ones(tokens), Rowwise(weight, ones(outputs)), None, torch.float32)
    assert torch.equal(found, integer.product(values, weight).float())


@pytest.mark.parametrize("tokens", [1, 17, 65, 130])
@pytest.mark.parametrize(
    ("inputs", "group"), [(128, 128), (384, 128), (256, 64), (256, 32), (192, 64), (64, 8), (48, 16)]
)
@pytest.mark.parametrize("outputs", [1, 63, 130])
def test_int4_sums_are_exact(tokens: int, inputs: int, group: int, outputs: int) -> None:
    values, weight = here(int8s(tokens, inputs))[0], int4_weight(outputs, inputs, group)
    assert (weight.multiplier_OG < 0).any() or outputs == 1
    truth = integer.product(values, int4.widen(weight.packed, weight.multiplier_OG)).float()
    unscaled = Int4(weight.packed, weight.multiplier_OG, ones(outputs))
    assert torch.equal(cuda_products.product(values, ones(tokens), unscaled, None, torch.float32), truth)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 140), st.integers(1, 140), st.integers(1, 9), st.sampled_from([8, 16, 32, 64, 128]), st.booleans()
)
def test_sums_of_any_shape(tokens: int, outputs: int, blocks: int, group: int, narrow: bool) -> None:
    inputs = blocks * group
    values = here(int8s(tokens, inputs))[0]
    if narrow:
        weight: Rowwise | Int4 = int4_weight(outputs, inputs, int4.group_for(inputs, group))
        whole = int4.widen(weight.packed, weight.multiplier_OG)
        weight = Int4(weight.packed, weight.multiplier_OG, ones(outputs))
    else:
        whole = here(int8s(outputs, inputs - blocks + 1, seed=1))[0]
        values, weight = values[:, : inputs - blocks + 1], Rowwise(whole, ones(outputs))
    found = cuda_products.product(values, ones(tokens), weight, None, torch.float32)
    assert torch.equal(found, integer.product(values, whole).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize(("biased", "residual"), [(False, False), (True, False), (True, True)])
def test_what_happens_on_the_way_out(dtype: torch.dtype, kind: str, biased: bool, residual: bool) -> None:
    """Row scale, column scale, bias, the sum with the residual, and the rounding to what leaves."""
    tokens, inputs, outputs = 65, 256, 70
    values, row_scale = here(int8s(tokens, inputs), normal(tokens, seed=1).abs() / 50)  # float16 ends at 65504
    bias, stream = here(normal(outputs, seed=2), normal(tokens, outputs, seed=4).to(dtype))
    weight: Rowwise | Int4 = int4_weight(outputs, inputs, 64)
    if kind == "int8":
        weight = Rowwise(*here(*int8.quantize_rows(normal(outputs, inputs, seed=3))))
    whole = weight.values_OI if isinstance(weight, Rowwise) else int4.widen(weight.packed, weight.multiplier_OG)
    target = stream.clone() if residual else None
    found = cuda_products.product(values, row_scale, weight, bias if biased else None, dtype, target)
    assert found.dtype == dtype
    assert not residual or found is target
    bound = rounding.scaled(integer.product(values, whole), row_scale, weight.scale_O, bias if biased else None)
    bound = bound + Bounded.of(stream) if residual else bound
    assert_within(found, bound, cut=cut(dtype), factor=wrong(dtype))


def test_rows_may_lie_apart() -> None:
    """Columns of a wider tensor, a transposed tensor, and a stream that is part of another one."""
    values, weight = here(int8s(20, 96), int8s(33, 64, seed=1))
    held = Rowwise(weight, ones(33))
    truth = integer.product(values[:, 16:80], weight).float()
    assert torch.equal(cuda_products.product(values[:, 16:80], ones(20), held, None, torch.float32), truth)
    across = values[:, 16:80].T.contiguous().T
    assert torch.equal(cuda_products.product(across, ones(20), held, None, torch.float32), truth)
    wide = torch.zeros(20, 50, device=DEVICE)
    cuda_products.product(values[:, 16:80], ones(20), held, None, torch.float32, wide[:, 5:38])
    assert torch.equal(wide[:, 5:38], truth)
    assert not wide[:, :5].any()
    assert not wide[:, 38:].any()
    assert cuda_products.product(values[:0, :64], ones(0), held, None, torch.float16).shape == (0, 33)
    spaced = normal(40, seed=2).to(DEVICE)[::2]
    scaled = cuda_products.product(across, spaced, held, None, torch.float32)
    assert torch.equal(scaled, Sums(truth.int(), spaced, ones(33), torch.zeros(33, device=DEVICE)).float())
    with pytest.raises(ValueError, match=r"needs its rows whole, found strides \(1, 20\)"):
        cuda_products.product(across, ones(20), held, None, torch.float32, torch.zeros(33, 20, device=DEVICE).T)


def test_sums_that_could_overflow_are_refused() -> None:
    inputs = products.MOST_INPUTS + 1
    weight = Rowwise(torch.zeros(1, inputs, dtype=torch.int8), torch.ones(1))
    with pytest.raises(ValueError, match="131072 inputs may overflow int32 sums, which hold 131071"):
        products.product(Rows(torch.zeros(1, inputs, dtype=torch.int8), torch.ones(1)), weight, None)


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="needs memory that is not there until it is touched")
def test_offsets_beyond_32_bits() -> None:
    """Row 2 of a tensor whose rows lie 2^30 bytes apart: its offset does not fit into int32."""
    far = 2**30 + 16
    storage = torch.empty(2 * far + 64, dtype=torch.int8, device=DEVICE)
    apart = storage.as_strided((3, 64), (far, 1))
    values, weight = here(int8s(3, 64), int8s(3, 64, seed=1))
    apart.copy_(values)
    truth = integer.product(values, weight).float()
    assert torch.equal(cuda_products.product(apart, ones(3), Rowwise(weight, ones(3)), None, torch.float32), truth)
    apart.copy_(weight)
    assert torch.equal(cuda_products.product(values, ones(3), Rowwise(apart, ones(3)), None, torch.float32), truth)


def test_a_row_does_not_see_its_neighbours() -> None:
    """Bit for bit, through every size of tile."""
    values, weight = here(int8s(300, 256), int8s(40, 256, seed=1))
    scale = normal(300, seed=2).to(DEVICE)
    held = Rowwise(weight, normal(40, seed=3).to(DEVICE))
    grid = tiled.tiled_int4(int4_weight(40, 256, 128), torch.float16)
    x = normal(300, 256, seed=4).half().to(DEVICE)
    together = cuda_products.product(values, scale, held, None, torch.float16)
    floats = cuda_products.grouped_product(x, grid, None)
    for rows in (slice(0, 1), slice(250, 251), slice(10, 60)):
        assert torch.equal(cuda_products.product(values[rows], scale[rows], held, None, torch.float16), together[rows])
        assert torch.equal(cuda_products.grouped_product(x[rows], grid, None), floats[rows])


def asymmetric(outputs: int, inputs: int, group: int, dtype: torch.dtype, shuffled: bool) -> Grouped:
    """A grid with zero points of its own, its groups in any order."""
    generator = torch.Generator().manual_seed(7)
    groups = inputs // group
    words = torch.randint(-(2**31), 2**31, (inputs // 8, outputs), generator=generator).to(torch.int32)
    zero = torch.randint(1, 17, (groups, outputs), generator=generator, dtype=torch.int16)
    scale = torch.rand(groups, outputs, generator=generator) * 0.1 + 0.01
    group_I = torch.arange(inputs) // group
    if shuffled:
        group_I = group_I[torch.randperm(inputs, generator=generator)]
    return Grouped(words, zero, scale.to(dtype), group_I, 4).to(DEVICE)


@pytest.mark.parametrize("tokens", [1, 50, 65])
@pytest.mark.parametrize(("inputs", "group"), [(256, 128), (256, 32), (96, 48), (128, 128), (640, 320), (384, 24)])
@pytest.mark.parametrize(("dtype", "of_scales"), [
    (torch.float16, torch.float16), (torch.bfloat16, torch.float16), (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32),
])  # fmt: skip
@pytest.mark.parametrize("shuffled", [False, True])
def test_grouped_product(tokens, inputs, group, dtype, of_scales, shuffled) -> None:
    """GPTQ's grid with zero points, any group size, activation order."""
    weight = asymmetric(63, inputs, group, of_scales, shuffled)
    laid_out = tiled.tiled(weight)
    assert torch.equal(laid_out.rows(0, 63), weight.rows(0, 63)), "the layout loses nothing"
    assert (laid_out.order_I is not None) == (shuffled and group < inputs)
    x, bias = here(normal(tokens, inputs).to(dtype), normal(63, seed=1).to(dtype))
    found = cuda_products.grouped_product(x, laid_out, bias)
    exact = Grouped(weight.packed, weight.zero_GO, weight.scale_GO.float(), weight.group_I, 4).rows(0, 63)
    weight_OI = leaving(leaving(exact, of_scales).float(), dtype)
    bound = Bounded.of(x).product(Bounded.of(weight_OI.T), more=1) + Bounded.of(bias)
    assert found.dtype == dtype
    assert_within(found, bound, cut=cut(dtype), factor=0 if tokens == 1 else wrong(dtype))


def test_int4_as_a_float_grid() -> None:
    """w4a16 of our own grid: multipliers exact in half precision, the channel's scale in float32 at the end."""
    weight = int4_weight(70, 256, 32)
    laid_out = tiled.tiled_int4(weight, torch.float16)
    torch.testing.assert_close(laid_out.rows(0, 70), weight.float())
    x = normal(33, 256).half().to(DEVICE)
    bound = Bounded.of(x).product(Bounded.of(weight.float().T), more=2)
    assert_within(cuda_products.grouped_product(x, laid_out, None), bound)


def test_grids_that_the_kernel_does_not_take() -> None:
    """Left as they are, and widened by the plain way."""
    weight = asymmetric(16, 128, 32, torch.float16, False)
    uneven = weight.group_I.clone()
    uneven[0] = 1
    assert tiled.tiled(Grouped(weight.packed, weight.zero_GO, weight.scale_GO, uneven, 4)) is None
    assert tiled.tiled(Grouped(weight.packed, weight.zero_GO, weight.scale_GO, weight.group_I[:64], 8)) is None
    assert tiled.tiled(grouped.quantize(normal(8, 40), 8).to(DEVICE)) is None, "8 inputs share bytes"
    assert tiled.tiled_int4(int4_weight(4, 48, 16), torch.float16) is None


@pytest.mark.parametrize(("inputs", "group"), [(256, 128), (256, 32), (48, 16), (4096, 64)])
@pytest.mark.parametrize("outputs", [1, 17])
def test_widen(inputs: int, group: int, outputs: int) -> None:
    weight = int4_weight(outputs, inputs, group)
    found = cuda_passes.widen(weight.packed, weight.multiplier_OG)
    assert torch.equal(found, int4.widen(weight.packed, weight.multiplier_OG))


def test_the_library_product_of_older_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch._int_mm within what cuBLAS takes: 17 rows and more, widths in whole eights; the rest goes by blocks."""
    seen = []
    monkeypatch.setattr(gemm, "int_mm", lambda x, w: seen.append((x.shape, w.shape)) or integer.product(x, w))
    for tokens, inputs, outputs in ((1, 64, 24), (40, 64, 24), (5, 60, 24), (5, 64, 20)):
        values, weight = here(int8s(tokens, inputs), int8s(outputs, inputs, seed=1))
        assert torch.equal(gemm.card_product(values, weight), integer.product(values, weight))
    assert seen == [((32, 64), (24, 64)), ((40, 64), (24, 64))]
