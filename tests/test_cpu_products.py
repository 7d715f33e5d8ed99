"""Products of int8 rows by the CPU's dot-product instruction, or as pairs of int16: the sums of the plain product, on
awkward shapes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightrm.kernels import dispatch, gemm, integer, products
from lightrm.kernels.cpu import cpu_products, int16_rows
from lightrm.kernels.cpu.cpu_passes import launch
from lightrm.kernels.cpu.dot_tiles import AVAILABLE, OUTPUTS, STEP
from lightrm.kernels.operands import Rows
from lightrm.schemes import int4
from lightrm.schemes.int8 import Rowwise
from tests.test_integer_kernels import int8s, normal

pytestmark = pytest.mark.usefixtures("poisoned")
here = pytest.mark.skipif(not AVAILABLE, reason="this CPU has no dot-product instruction that these kernels use")
paired = pytest.mark.skipif(not int16_rows.AVAILABLE, reason="this CPU has no AVX2")
SHAPES = [(OUTPUTS, STEP), (OUTPUTS + 1, 64), (61, 128), (200, 576), (129, 4096), (70, 4160), (100, 11008)]


def extreme(*shape: int, seed: int = 0) -> torch.Tensor:
    """Among them the largest sums that there are, of both signs, and -128, which no scheme makes."""
    found = torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    found[0], found[-1] = 127, -128
    return found


def packed_weight(outputs: int, inputs: int, group: int) -> int4.Int4:
    """Any nibbles; multipliers of both signs, among them the largest."""
    group = int4.group_for(inputs, group)
    packed = torch.randint(0, 256, (outputs, inputs // 2), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    multiplier = (int8s(outputs, inputs // group, seed=2) % 16).clamp(min=1)
    multiplier[:, ::2] *= -1
    multiplier[0], multiplier[-1] = 15, -15
    return int4.Int4(packed, multiplier, torch.ones(outputs))


@here
@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 23, 24, 33, 130])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_int8(outputs: int, inputs: int, tokens: int) -> None:
    values, weight = extreme(tokens, inputs), Rowwise(extreme(outputs, inputs, seed=1), torch.ones(outputs))
    assert cpu_products.takes(values, weight)
    assert torch.equal(cpu_products.product(values, weight), integer.product(values, weight.values_OI))


@here
@pytest.mark.parametrize("tokens", [1, 7, 26])
@pytest.mark.parametrize("group", [8, 16, 32, 64, 128])
@pytest.mark.parametrize(("outputs", "inputs"), [(7, 64), (61, 128), (33, 576), (29, 11008)])
def test_int4(outputs: int, inputs: int, group: int, tokens: int) -> None:
    weight, values = packed_weight(outputs, inputs, group), extreme(tokens, inputs)
    truth = integer.product(values, integer.widen(weight.packed, weight.multiplier_OG))
    assert torch.equal(cpu_products.product(values, weight), truth)


@paired
@pytest.mark.parametrize("tokens", [1, 4, 7, 130, 256, 259, 515])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 16), (48, 64), (144, 528), (160, 4160), (32, 11008)])
def test_pairs_of_int16(outputs: int, inputs: int, tokens: int) -> None:
    """Every CPU with AVX2 can run them, and those without a dot-product instruction do."""
    values, weight = extreme(tokens, inputs), Rowwise(extreme(outputs, inputs, seed=1), torch.ones(outputs))
    assert torch.equal(cpu_products.by_pairs(values, weight), integer.product(values, weight.values_OI))


@paired
@pytest.mark.parametrize("tokens", [1, 30, 261])
@pytest.mark.parametrize("group", [8, 16, 32, 64, 128])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 16), (48, 128), (32, 1056), (144, 1216), (16, 11008)])
def test_int4_as_pairs_of_int16(outputs: int, inputs: int, group: int, tokens: int) -> None:
    weight, values = packed_weight(outputs, inputs, group), extreme(tokens, inputs)
    truth = integer.product(values, integer.widen(weight.packed, weight.multiplier_OG))
    assert torch.equal(cpu_products.by_pairs(values, weight), truth)


def test_what_they_leave_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd widths, few channels, many rows, and a CPU without the instructions."""
    values, weight = int8s(3, 2 * STEP), Rowwise(int8s(64, 2 * STEP), torch.ones(64))
    assert cpu_products.takes(values, weight) == (AVAILABLE or int16_rows.AVAILABLE)
    assert cpu_products.takes(values, weight) == (dispatch.compiled_products(values, weight) is not None)
    narrow, odd = Rowwise(int8s(2, 2 * STEP), torch.ones(2)), Rowwise(int8s(64, STEP + 8), torch.ones(64))
    for other_values, other in ((values, narrow), (values[:, : STEP + 8], odd), (int8s(999, 2 * STEP), weight)):
        many = len(other_values) == 999  # these a library multiplies as fast as the dots
        assert cpu_products.takes(other_values, other) == (many and cpu_products.PAIRS)
        sums = products.product(Rows(other_values, torch.ones(len(other_values))), other, None)
        assert torch.equal(sums.acc_TO, integer.product(other_values, other.values_OI))
    assert not cpu_products.takes(values[:0], weight)
    monkeypatch.setattr(cpu_products, "DOTS", False)
    monkeypatch.setattr(cpu_products, "PAIRS", False)
    assert not cpu_products.takes(values, weight)


@pytest.mark.parametrize("kind", ["DOTS", "PAIRS"])
def test_a_layer_runs_them(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product is theirs where they take it, and has the same scales and bias as a library's."""
    if not {"DOTS": AVAILABLE, "PAIRS": int16_rows.AVAILABLE}[kind]:
        pytest.skip("this CPU does not have the instruction")
    weight = int4.quantize(normal(96, 256), 32)
    rows, bias = Rows(int8s(5, 256), normal(5).abs()), normal(96, seed=3)
    monkeypatch.setattr(cpu_products, "DOTS", False)
    monkeypatch.setattr(cpu_products, "PAIRS", False)
    truth = products.product(rows, weight, bias).float()
    monkeypatch.setattr(cpu_products, kind, True)
    ran = []
    monkeypatch.setattr(cpu_products, "launch", lambda loop, *rest: ran.append(loop.name) or launch(loop, *rest))
    assert torch.equal(products.product(rows, weight, bias).float(), truth)
    assert ran == [{"DOTS": "few_rows.multiply_int4", "PAIRS": "int16_rows.multiply_int4"}[kind]]


@paired
def test_the_kernels_that_a_cpu_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """With pairs of int16, int8 is quick where PyTorch has no fast exact product: "auto" takes it there."""
    monkeypatch.setattr(gemm, "cpu_product", lambda: (gemm.float_blocks, "float32 blocks"))
    monkeypatch.setattr(cpu_products, "DOTS", False)
    monkeypatch.setattr(cpu_products, "PAIRS", True)
    choice = dispatch.kernels_for(torch.device("cpu"), "integer")
    assert "int8 products: as pairs of int16, compiled by numba; of odd widths: float32 blocks" in choice.reason
    assert not choice.slow_products
    monkeypatch.setattr(cpu_products, "PAIRS", False)
    assert dispatch.kernels_for(torch.device("cpu"), "integer").slow_products


@here
def test_narrow_registers(tmp_path: Path) -> None:
    """CPUs with AVX-VNNI and without AVX-512 run the same kernels in registers of half the width."""
    program = """
from lightrm.kernels.cpu import simd
simd.FEATURES.update(avx512vnni=False, avxvnni=True)
from lightrm.kernels.cpu import dot_tiles
assert dot_tiles.LANES == 8 and dot_tiles.AVAILABLE
import pytest
from tests import test_cpu_products as tests
for tokens in (1, 5, 33):
    for shape in tests.SHAPES:
        tests.test_int8(*shape, tokens)
    for group in (8, 32, 128):
        tests.test_int4(33, 576, group, tokens)
        tests.test_int4(61, 128, group, tokens)
print("equal")
"""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}  # beside the modules lies code for this CPU
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["equal"], done.stderr
