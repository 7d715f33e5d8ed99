"""What some families need of the passes, in every implementation: a transform after the norm, a norm of what is added,
GELU, norms of the heads, and RoPE on a part of each head. Against what their own sums allow."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import rounding
from benchmarks.rounding import Bounded
from lightrm.kernels import integer, library, reference
from lightrm.kernels.cpu import cpu_passes
from lightrm.kernels.cuda import cuda_passes
from lightrm.kernels.operands import HeadNorms, Sums
from tests.test_integer_kernels import normal, product_of, turned_by
from tests.test_kernels import assert_rows_within, assert_within
from tests.test_triton_products import here

pytestmark = pytest.mark.usefixtures("poisoned")
MODULES = (integer, cpu_passes, cuda_passes)


def lent(module: Any, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """On a card, if there is one and the kernels are a card's."""
    return list(here(*tensors)) if module is cuda_passes else list(tensors)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(("width", "block"), [(37, 1), (48, 16), (344, 8), (256, 256), (768, 256)])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_norm_of_int8_rows(module: Any, width: int, block: int, shifted: bool, weighted: bool) -> None:
    acc, row_scale, scale, bias, x = lent(module, *product_of(9, width), normal(width, seed=8), normal(9, width))
    shift = lent(module, normal(width, seed=9))[0] if shifted else None
    weight = lent(module, 1 + 0.3 * normal(width, seed=6))[0] if weighted else None

    def bound(stream: Bounded) -> Bounded:
        normed = rounding.norm(stream, 1e-6)
        turned = turned_by(normed if weight is None else normed * Bounded.of(weight), block)
        return turned if shift is None else turned - Bounded.of(shift)

    assert_norm_rows(module.norm_quantize(x, 1e-6, weight, shift, block), bound(Bounded.of(x)))
    stream = x.clone()
    rows = module.add_norm_quantize(stream, Sums(acc, row_scale, scale, bias), 1e-6, weight, shift, block)
    added = Bounded.of(x) + rounding.scaled(acc, row_scale, scale, bias)
    assert_within(stream, added)
    assert_norm_rows(rows, bound(added))


def assert_norm_rows(rows: Any, bound: Bounded) -> None:
    """A norm without a shift goes into the scale: half a step more may come from there."""
    assert_rows_within(*rows, Bounded(bound.exact, 1.01 * bound.off + 4 * rounding.U * bound.exact.abs()))


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("sums", [True, False])
def test_a_norm_of_what_is_added(module: Any, sums: bool) -> None:
    acc, row_scale, scale, bias, x = lent(module, *product_of(17, 100), normal(100, seed=8), normal(17, 100, seed=7))
    (weight,) = lent(module, 1 + 0.3 * normal(100, seed=6))
    product = rounding.scaled(acc, row_scale, scale, bias)
    waiting = Sums(acc, row_scale, scale, bias)
    if not sums:
        waiting = Sums(waiting.float())
        product = Bounded.of(waiting.acc_TO)
    found = x.clone()
    module.add_normed(found, waiting, weight, 1e-6)
    assert_within(found, Bounded.of(x) + rounding.norm(product, 1e-6) * Bounded.of(weight))


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(("width", "block"), [(48, 16), (129, 1)])
def test_gelu(module: Any, width: int, block: int) -> None:
    acc, row_scale, scale = lent(module, *product_of(9, 2 * width))
    sums = Sums(acc, row_scale, scale * 30)  # gates far from zero on both sides
    bound = turned_by(rounding.gated(rounding.scaled(acc, row_scale, scale * 30, None), "gelu_tanh"), block)
    assert_rows_within(*module.gated_quantize(sums, block, "gelu_tanh"), bound)
    float_module = reference if module is integer else module
    if block == 1:
        x = sums.float()
        arguments = (x, "gelu_tanh") if float_module is reference else (x, 1, "gelu_tanh")
        bound = rounding.gated(Bounded.of(x), "gelu_tanh")
        if module is cpu_passes:  # PyTorch's: 1 + tanh(z) is off by a unit of 1, where it should be nearly 0
            gate, up = x.double().chunk(2, 1)
            bound = Bounded(bound.exact, bound.off + 4 * rounding.U * (gate * up).abs())
        assert_within(float_module.gated(*arguments), bound, factor=0)


def test_gelu_is_the_one_of_pytorch() -> None:
    """Over the whole range, through each implementation; the bound above is of our own formula."""
    gate = torch.linspace(-20, 20, 4000).view(8, 500)
    both = torch.cat([gate, torch.ones_like(gate)], 1)
    expected = torch.nn.functional.gelu(gate.double(), approximate="tanh")
    for found in (
        reference.gated(both, "gelu_tanh"), library.gated(both, 1, "gelu_tanh"), cuda_passes.gated(both, 1,
        "gelu_tanh"),
    ):  # fmt: skip
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(("heads", "kv_heads", "width", "pairs"), [(6, 2, 10, 5), (5, 1, 80, 30), (3, 3, 64, 1)])
@pytest.mark.parametrize("normed", [False, True])
def test_heads(module: Any, heads: int, kv_heads: int, width: int, pairs: int, normed: bool) -> None:
    """Norms before RoPE, and RoPE on the first channels alone."""
    widths = (heads * width, kv_heads * width)
    acc, row_scale, scale = lent(module, *product_of(17, widths[0] + 2 * widths[1]))
    bias, angle = lent(module, normal(len(scale), seed=5), normal(17, pairs, seed=6))
    query_E, key_E = lent(module, 1 + 0.3 * normal(width, seed=3), 1 + 0.3 * normal(width, seed=4))
    norms, rotation = HeadNorms(query_E, key_E, 1e-6) if normed else None, (angle.cos(), angle.sin())
    sums = Sums(acc, row_scale, scale, bias)
    if module is cuda_passes:
        parts = cuda_passes.split(sums, widths, width, rotation, torch.float32, norms)
        found = tuple(part.unflatten(1, (-1, width)) for part in parts)
    else:
        found = module.split_heads(sums, widths, width, rotation, norms)
    whole = rounding.scaled(acc, row_scale, scale, bias).each(lambda x: x.unflatten(1, (-1, width)))
    query, key, value = whole[:, :heads], whole[:, heads : heads + kv_heads], whole[:, heads + kv_heads :]
    if normed:
        query = rounding.norm(query, 1e-6) * Bounded.of(query_E)
        key = rounding.norm(key, 1e-6) * Bounded.of(key_E)
    for part, bound in zip(
        found, (rounding.turned(query, *rotation), rounding.turned(key, *rotation), value), strict=True
    ):
        assert_within(part, bound)
    floats = module.split_heads(Sums(sums.float()), widths, width, rotation, norms)
    for part, expected in zip(floats, found, strict=True):
        rtol = 1e-5 if expected.dtype == torch.float32 else torch.finfo(expected.dtype).eps
        torch.testing.assert_close(part, expected.float(), atol=1e-4, rtol=rtol)
