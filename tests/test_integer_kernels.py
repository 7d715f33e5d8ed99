"""The integer path against its truth in plain PyTorch: whole numbers by equality, floats within what their own sums
allow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import rounding
from benchmarks.rounding import Bounded
from lightrm.kernels import gemm, integer, library_products, passes, products, reference
from lightrm.kernels.cpu import cpu_passes
from lightrm.kernels.operands import Residual, Sums
from lightrm.schemes.hadamard import hadamard
from lightrm.schemes.int4 import Int4
from tests.test_kernels import assert_rows_within, assert_within

pytestmark = pytest.mark.usefixtures("poisoned")
TOKENS = (1, 2, 17, 65)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int8s(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def product_of(tokens: int, outputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """acc, row scale and channel scale as a layer would leave them; some rows are zeros."""
    acc = torch.randint(-(2**20), 2**20, (tokens, outputs), generator=torch.Generator().manual_seed(seed))
    acc[::7] = 0
    row_scale, scale = normal(tokens, seed=seed + 1).abs(), normal(outputs, seed=seed + 2).abs() * 1e-6
    return acc.to(torch.int32), row_scale, scale


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("width", [1, 63, 64, 1000])
def test_quantize(tokens: int, width: int) -> None:
    x = normal(tokens, width) * torch.logspace(-6, 6, tokens)[:, None]
    x[0] = 0
    for found, truth in zip(cpu_passes.quantize(x), integer.quantize(x), strict=True):
        assert torch.equal(found, truth)
    values, scale = cpu_passes.norm_quantize(x, 1e-5)
    expected, expected_scale = integer.norm_quantize(x, 1e-5)
    assert torch.equal(values, expected)
    for found in (scale, expected_scale):
        assert_normed_within(values, found, Bounded.of(x), 1e-5)


def assert_normed_within(values: torch.Tensor, scale: torch.Tensor, x: Bounded, eps: float) -> None:
    """The norm goes into the scale, also that of a row of zeros."""
    shrunk = rounding.scale_of(x) * rounding.shrink(x, eps)[..., 0]
    assert_rows_within(values, scale, rounding.norm(x, eps), shrunk)


def test_bad_numbers_show() -> None:
    """NaN and Inf make the scale of their row NaN or Inf, and of no other row."""
    x = normal(4, 64)
    x[1, 3], x[2, 5] = float("nan"), float("-inf")
    for kernel in (cpu_passes.quantize, integer.quantize, lambda y: cpu_passes.norm_quantize(y, 1e-6)):
        assert torch.isfinite(kernel(x)[1]).tolist() == [True, False, False, True]
    acc, row_scale, scale = product_of(4, 64)
    row_scale[3] = float("nan")
    for module in (cpu_passes, integer):
        assert torch.isfinite(module.gated_quantize(Sums(acc, row_scale, scale), 32)[1]).tolist() == [True] * 3 + [
            False
        ]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("inputs", "outputs"), [(8, 3), (1024, 24), (1025, 17), (4096, 65)])
def test_products_are_exact(tokens: int, inputs: int, outputs: int) -> None:
    values, weight = int8s(tokens, inputs), int8s(outputs, inputs, seed=1)
    values[0], weight[0] = 127, -127  # the largest sums there are
    truth = integer.product(values, weight)
    assert int(truth[0, 0]) == -127 * 127 * inputs
    assert torch.equal(gemm.float_blocks(values, weight), truth)
    assert torch.equal(products.int8_product(values, weight), truth)


@pytest.mark.parametrize("isa", ["SSE41", "AVX2", "AVX512_CORE", "DEFAULT"])
def test_products_are_exact_on_older_cpus(isa: str) -> None:
    """oneDNN restricted to an older instruction set, some of which saturate: the probe must see it."""
    program = """
import json, torch
from lightrm.kernels import products
from lightrm.kernels import gemm, integer
x = torch.full((40, 3000), 127, dtype=torch.int8); x[::3] = -128
w = torch.full((24, 3000), -127, dtype=torch.int8); w[::2] = 127
print(json.dumps([torch.equal(products.int8_product(x, w), integer.product(x, w)), gemm.cpu_product()[1]]))
"""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    exact, why = json.loads(done.stdout)
    assert exact, why


@pytest.mark.parametrize("slow", [True, False])
def test_of_two_exact_products_the_quicker_is_taken(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without instructions for int8 multiplies them one by one: floats are as exact, and quicker."""
    monkeypatch.setattr(gemm, "int_mm", integer.product)
    monkeypatch.setattr(gemm, "seconds", lambda product: 1.0 if (product is gemm.int_mm) == slow else 0.1)
    chosen, why = gemm.chosen_product.__wrapped__()
    assert chosen is (gemm.float_blocks if slow else gemm.int_mm)
    assert ("twice as long" in why) == slow


@pytest.mark.parametrize("group", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("outputs", [1, 5, 1024, 1100])
def test_widening_is_exact(group: int, outputs: int) -> None:
    packed = torch.randint(0, 256, (outputs, 128), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    multiplier = int8s(outputs, 256 // group, seed=2) % 16 + 1
    multiplier[:, ::2] *= -1
    multiplier[multiplier.abs() > 15] = 15
    truth = integer.widen(packed, multiplier)
    assert torch.equal(cpu_passes.widen(packed, multiplier), truth)
    values = int8s(9, 256)
    weight = Int4(packed, multiplier, torch.ones(outputs))
    assert torch.equal(library_products.int4_product(values, weight), integer.product(values, truth))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 8), (6, 2, 10), (5, 1, 80)])
@pytest.mark.parametrize("rope", [True, False])
def test_split_heads(tokens: int, heads: int, kv_heads: int, width: int, rope: bool) -> None:
    widths = (heads * width, kv_heads * width)
    acc, row_scale, scale = product_of(tokens, widths[0] + 2 * widths[1])
    bias = normal(len(scale), seed=5)
    angle = normal(tokens, width // 2, seed=6)
    rotation = (angle.cos(), angle.sin()) if rope else None
    found = cpu_passes.split_heads(Sums(acc, row_scale, scale, bias), widths, width, rotation)
    slow = integer.split_heads(Sums(acc, row_scale, scale, bias), widths, width, rotation)
    for *parts, bound in zip(
        found, slow, bounded_heads(acc, row_scale, scale, bias, widths, rotation, width), strict=True
    ):
        for part in parts:
            assert_within(part, bound)


def bounded_heads(acc, row_scale, scale, bias, widths, rotation, width) -> list[Bounded]:
    """Query, key and value of a fused product, (T, heads, E)."""
    whole = rounding.scaled(acc, row_scale, scale, bias).each(lambda x: x.unflatten(1, (-1, width)))
    ends = [widths[0] // width, (widths[0] + widths[1]) // width]
    query, key, value = whole[:, : ends[0]], whole[:, ends[0] : ends[1]], whole[:, ends[1] :]
    turn = (lambda x: x) if rotation is None else (lambda x: rounding.turned(x, *rotation))
    return [turn(query), turn(key), value]


@pytest.mark.parametrize("tokens", TOKENS)
def test_add_norm_quantize(tokens: int) -> None:
    acc, row_scale, scale = product_of(tokens, 100)
    x, bias = normal(tokens, 100, seed=7), normal(100, seed=8)
    found, slow = x.clone(), x.clone()
    values, found_scale = cpu_passes.add_norm_quantize(found, Sums(acc, row_scale, scale, bias), 1e-6)
    slow_values, slow_scale = integer.add_norm_quantize(slow, Sums(acc, row_scale, scale, bias), 1e-6)
    bound = Bounded.of(x) + rounding.scaled(acc, row_scale, scale, bias)
    for stream in (found, slow):
        assert_within(stream, bound)
    alone = x.clone()
    assert torch.equal(products.add_pending(Residual(alone, Sums(acc, row_scale, scale, bias))), found), (
        "a stream that is settled has the bits of one whose reader adds"
    )
    for rows in ((values, found_scale), (slow_values, slow_scale)):
        assert_normed_within(*rows, bound, 1e-6)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("width", "block"), [(48, 16), (48, 1), (1536, 256), (344, 8), (256, 256), (129, 1)])
def test_gated_quantize(tokens: int, width: int, block: int) -> None:
    acc, row_scale, scale = product_of(tokens, 2 * width)
    scale = scale * 30  # gates far from zero on both sides
    values, found_scale = cpu_passes.gated_quantize(Sums(acc, row_scale, scale), block)
    slow = integer.gated_quantize(Sums(acc, row_scale, scale), block)
    bound = turned_by(rounding.gated(rounding.scaled(acc, row_scale, scale, None)), block)
    for rows in ((values, found_scale), slow):
        assert_rows_within(*rows, bound)


def turned_by(hidden: Bounded, block: int) -> Bounded:
    """Under the block Hadamard transform, as a matrix."""
    if block == 1:
        return hidden
    columns = torch.eye(hidden.exact.shape[1] // block, dtype=torch.float64)
    return rounding.spread(hidden, torch.kron(hadamard_matrix(block), columns).to(hidden.exact.device))


def hadamard_matrix(block: int) -> torch.Tensor:
    return hadamard(torch.eye(block), block).double()


def test_exponential_is_that_of_float32() -> None:
    """Through the gate alone: silu(x) over the whole range, a row of one number each."""
    gate = torch.linspace(-100, 100, 4001)[:, None]
    acc = torch.cat([torch.round(gate * 1000), torch.full_like(gate, 1000.0)], 1).to(torch.int32)
    ones, scale = torch.ones(len(acc)), torch.full((2,), 1e-3)
    values, found = cpu_passes.gated_quantize(Sums(acc, ones, scale), 1)
    assert_rows_within(values, found, rounding.gated(rounding.scaled(acc, ones, scale, None)))


def test_a_row_does_not_see_its_neighbours() -> None:
    """Bit for bit: each pass gives a row the same numbers alone and among others."""
    acc, row_scale, scale = product_of(37, 96)
    x = normal(37, 48, seed=3)
    together = (*cpu_passes.norm_quantize(x, 1e-6), *cpu_passes.gated_quantize(Sums(acc, row_scale, scale), 16))
    for t in (0, 1, 20, 36):
        rows = slice(t, t + 1)
        alone = (
            *cpu_passes.norm_quantize(x[rows], 1e-6),
            *cpu_passes.gated_quantize(Sums(acc[rows], row_scale[rows], scale), 16),
        )
        assert all(torch.equal(a[rows], b) for a, b in zip(together, alone, strict=True))


def test_reference_silu_is_its_formula() -> None:
    x = normal(3, 10)
    gate, up = x.chunk(2, 1)
    torch.testing.assert_close(reference.gated(x), gate * torch.sigmoid(gate) * up)


def test_without_numba() -> None:
    """The same scores through plain PyTorch, slower, and said so once."""
    program = """
import sys, json, warnings
if sys.argv[1] == "without":
    sys.modules["numba"] = None
else:
    from lightrm.kernels.cpu import cpu_passes
    cpu_passes.PAIRS = False  # plain PyTorch's attention is in float32
import lightrm
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    rm = lightrm.load("demo", scheme="w4a8")
scores = rm.score("What is the capital of France?", ["Paris, on the Seine.", "Paris, Paris, Paris, Paris"]).tolist()
print(json.dumps([scores, repr(rm), [str(w.message) for w in caught if w.category is lightrm.KernelWarning]]))
"""
    runs = {}
    for how in ("with", "without"):
        done = subprocess.run([sys.executable, "-c", program, how], capture_output=True, text=True, check=True)
        runs[how] = json.loads(done.stdout.strip().splitlines()[-1])
    # Where the last bit of a float differs, a rounding to int8 may tip over: that moves a score by thousandths.
    torch.testing.assert_close(torch.tensor(runs["with"][0]), torch.tensor(runs["without"][0]), atol=0.02, rtol=0)
    assert runs["with"][2] == []
    assert len(runs["without"][2]) == 1
    assert "numba cannot be imported" in runs["without"][2][0]
    assert "numba" in runs["with"][1]
    assert "plain PyTorch" in runs["without"][1]


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"int8_product.*values \(3, 4\) int8, weight \(2, 5\) int8"):
        products.int8_product(int8s(3, 4), int8s(2, 5))
    with pytest.raises(ValueError, match=r"norm.*x \(3, 4\) bfloat16"):
        passes.norm(Residual(torch.zeros(3, 4, dtype=torch.bfloat16)), None, 1e-6, int8=True)
    sums = Sums(torch.zeros(2, 24, dtype=torch.int32), torch.ones(2), torch.ones(24), torch.zeros(24))
    with pytest.raises(ValueError, match=r"gated"):
        passes.gated(sums, block=8, int8=True)


@pytest.mark.parametrize("outputs", [1, 5, 66])
@pytest.mark.parametrize(
    ("inputs", "run", "end"), [(1, (0, 1), 1), (7, (2, 5), 6), (130, (0, 128), 128), (130, (96, 130), 130)]
)
def test_columns_are_rounded_to_the_same_bits(outputs: int, inputs: int, run: tuple[int, int], end: int) -> None:
    weight, step = normal(outputs, inputs), normal(outputs, seed=1) / 8  # a step may be negative
    factor = (normal(inputs, inputs, seed=2) + 3 * torch.eye(inputs)).triu()
    left = [weight.clone() for _ in range(3)]
    found = passes.round_columns(left[0], range(*run), end, step, factor, (-8, 7))
    compiled = cpu_passes.round_columns(left[1], range(*run), end, step, factor, (-8, 7))
    truth = reference.round_columns(left[2], range(*run), end, step, factor, (-8, 7))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(truth, found, compiled, strict=True))
    assert torch.equal(left[1], left[2]), "the columns after them"
    assert torch.equal(left[1][:, end:], weight[:, end:])
    assert (left[1][:, run[1] : end] != weight[:, run[1] : end]).all()
    assert {int(q) for q in truth[0].unique()} <= set(range(-8, 8))


def test_columns_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="round_columns"):
        passes.round_columns(normal(4, 8), range(2, 9), 8, torch.ones(4), torch.eye(8), (-8, 7))
    with pytest.raises(ValueError, match="round_columns"):
        passes.round_columns(normal(8, 4).T, range(2), 8, torch.ones(4), torch.eye(8), (-8, 7))
    with pytest.raises(ValueError, match=r"step \(4,\) float16"):
        passes.round_columns(normal(4, 8), range(2), 8, torch.ones(4).half(), torch.eye(8), (-8, 7))


WIDEN = """
import pathlib, torch
from lightrm.kernels.cpu import cpu_passes, objects
objects.FOLDER = pathlib.Path("nowhere")  # of code that is compiled ahead: here numba compiles
cpu_passes.widen(torch.zeros(2, 64, dtype=torch.uint8), torch.ones(2, 4, dtype=torch.int8))
"""


def test_the_next_process_compiles_nothing(tmp_path: Path) -> None:
    """Code that numba compiles is found again."""
    kept = []
    for _ in range(2):
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
        subprocess.run([sys.executable, "-c", WIDEN], env=environment, check=True)
        kept.append(sorted(path.name for path in tmp_path.rglob("*.nbc")))
    assert kept[0]
    assert kept[1] == kept[0]


def test_other_work_of_the_machine_does_not_choose_the_product() -> None:
    """A product is timed by the CPU time of its thread: waiting counts nothing, and computing twice counts twice."""
    alone = min(gemm.seconds(gemm.float_blocks) for _ in range(3))

    def waits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return gemm.float_blocks(x, weight)

    def computes(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return sum(gemm.float_blocks(x, weight) for _ in range(20))  # type: ignore[return-value]

    assert min(gemm.seconds(waits) for _ in range(3)) < 0.01 + alone
    assert min(gemm.seconds(computes) for _ in range(3)) > 5 * alone
