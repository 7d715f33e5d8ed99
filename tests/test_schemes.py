"""Schemes as arithmetic: the grammar, and how much of a tensor survives each kind of rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrm.errors import SchemeError
from lightrm.schemes import int4, int8
from lightrm.schemes.grammar import NAMES, parse_scheme
from lightrm.schemes.hadamard import block_of, hadamard, hartley, spread, sylvester
from lightrm.schemes.quality import sqnr_db

CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_grammar() -> None:
    for name in NAMES:
        if name != "fp16":
            assert str(parse_scheme(name, CPU)) == name
    assert parse_scheme("w4a8", CPU).group == 128
    assert parse_scheme("w4a8-g32", CPU).group == 32
    assert parse_scheme("w4a16-g64", torch.device("cuda")).dtype == torch.float16
    assert parse_scheme("w4a16", CPU).dtype == torch.bfloat16
    for bad in ("w8a8-g32", "w4a8-g48", "w4a8-", "int8", "w4a8-g128x", ""):
        with pytest.raises(SchemeError, match=r"there are auto, fp32, .*w8a8.*-gN with N = 128, 64, 32"):
            parse_scheme(bad, CPU)
    with pytest.raises(SchemeError, match="fp16 on a CPU is many times slower"):
        parse_scheme("fp16", CPU)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (65, 1000)])
def test_int8_rows(shape: tuple[int, int]) -> None:
    x = normal(*shape)
    values, scale = int8.quantize_rows(x)
    assert values.dtype == torch.int8
    assert values.abs().amax(1).eq(127).all(), "every row uses its whole range"
    error = (int8.dequantize_rows(values, scale) - x).abs()
    assert (error <= scale[:, None] * 0.5001).all(), "no number is further off than half a step"


def test_int8_of_nothing_and_of_bad_numbers() -> None:
    rows = torch.tensor([[0.0, 0.0], [1e-38, 0.0], [float("nan"), 1.0], [float("inf"), 1.0], [-3.0, 1.5]])
    values, scale = int8.quantize_rows(rows)
    assert torch.equal(int8.dequantize_rows(values, scale)[0], torch.zeros(2))
    assert not torch.isfinite(scale[2:4]).any(), "NaN and Inf show in the scale"
    assert torch.isfinite(scale[[0, 1, 4]]).all()
    assert values[4].tolist() == [-127, 64]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 5), st.sampled_from([8, 16, 32, 64, 128]))
def test_int4_packing_is_exact(outputs: int, groups: int, group: int) -> None:
    q = torch.randint(-8, 8, (outputs, groups * group), dtype=torch.int8)
    multiplier = (torch.randint(1, 16, (outputs, groups)) * (1 - 2 * torch.randint(0, 2, (outputs, groups)))).char()
    packed = int4.pack(q, multiplier)
    assert packed.shape == (outputs, groups * group // 2)
    assert torch.equal(int4.widen(packed, multiplier).int(), q.int() * multiplier.int().repeat_interleave(group, 1))


def test_int4_layout_by_hand() -> None:
    """Byte k of a block of 8: input k in its low half, input k + 4 in its high half; q + 8, or 7 - q where the
    multiplier is negative. The groups do not move anything."""
    q = torch.tensor([[-8, 7, 0, 1, 2, 3, -1, -2]], dtype=torch.int8)
    plain = [0 | 10 << 4, 15 | 11 << 4, 8 | 7 << 4, 9 | 6 << 4]
    assert int4.pack(q, torch.tensor([[3]], dtype=torch.int8)).tolist() == [plain]
    assert int4.pack(q, torch.tensor([[3, 1]], dtype=torch.int8)).tolist() == [plain]
    turned = [0 | 5 << 4, 15 | 4 << 4, 8 | 8 << 4, 9 | 9 << 4]
    assert int4.pack(q, torch.tensor([[3, -1]], dtype=torch.int8)).tolist() == [turned]
    assert [int4.block_of(inputs) for inputs in (4096, 576, 48, 13696)] == [128, 64, 16, 128]


@pytest.mark.parametrize("group", [128, 64, 32, 16])
def test_int4_stays_in_int8(group: int) -> None:
    held = int4.quantize(normal(33, 256) * torch.logspace(-3, 3, 33)[:, None], group)
    assert held.group == group
    widened = int4.widen(held.packed, held.multiplier_OG)
    assert widened.int().abs().max() <= 120
    assert held.multiplier_OG.abs().min() >= 1


def test_int4_groups() -> None:
    assert [int4.group_for(width, 128) for width in (4096, 576, 48, 13696)] == [128, 64, 16, 128]
    with pytest.raises(SchemeError, match="none divides 36: use w8a8"):
        int4.group_for(36, 128)


# Gaussian weights, which is what rotations make of all weights. The floors lie 0.3 dB below what was measured.
@pytest.mark.parametrize(("scheme", "floor"), [("w8a8", 40.8), ("w4a8", 19.8), ("w4a8-g64", 20.4), ("w4a8-g32", 21.1)])
def test_sqnr_floors(scheme: str, floor: float) -> None:
    weight = normal(64, 4096)
    group = parse_scheme(scheme, CPU).group
    found = int4.quantize(weight, group).float() if group else int8.dequantize_rows(*int8.quantize_rows(weight))
    assert floor < sqnr_db(weight, found) < floor + 1


def test_sqnr() -> None:
    assert sqnr_db(torch.ones(4), torch.ones(4)) == float("inf")
    assert sqnr_db(torch.ones(4), torch.full((4,), 0.9)) == pytest.approx(20, abs=1e-3)


@pytest.mark.parametrize("width", [1, 3, 48, 80, 256, 576, 5120])
def test_rotations_are_orthogonal_and_their_own_inverse(width: int) -> None:
    x = normal(5, width)
    for turn in (lambda y: hadamard(y, block_of(width, 256)), spread):
        torch.testing.assert_close(turn(turn(x)), x, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(turn(x).norm(dim=1), x.norm(dim=1))
    block = block_of(width)
    whole = torch.kron(sylvester(block) / block**0.5, hartley(width // block))
    torch.testing.assert_close(spread(x), x @ whole, atol=2e-5, rtol=1e-4)
    one_channel = torch.zeros(1, width)
    one_channel[0, width // 2] = 1.0
    assert spread(one_channel).abs().max() <= (2 / width) ** 0.5 + 1e-6, "an outlier ends up everywhere"


def test_blocks() -> None:
    assert [block_of(n) for n in (4096, 11008, 13696, 5120, 7)] == [4096, 256, 128, 1024, 1]
    assert block_of(4096, 256) == 256
