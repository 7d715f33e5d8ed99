"""Rounding that makes up for its own error, of one matrix."""

from __future__ import annotations

import pytest
import torch

from lightrm.loading import gptq_rounding
from lightrm.loading.gptq_rounding import Moments, compensated_int4, compensated_int8, regressed
from lightrm.schemes import int4, int8
from lightrm.schemes.quality import sqnr_db
from tests.test_schemes import normal


@pytest.mark.parametrize("group", [32, 128])
def test_compensation_beats_rounding_where_it_matters(group: int) -> None:
    """On correlated inputs the layer's output error falls well below that of round-to-nearest, on the same grid."""
    weight = normal(48, 256)
    inputs = normal(2000, 40, seed=1) @ normal(40, 256, seed=2) + 0.1 * normal(2000, 256, seed=3)
    plain, better = int4.quantize(weight, group), compensated_int4(weight, inputs.T @ inputs, group)
    assert torch.equal(plain.scale_O, better.scale_O)
    exact = inputs @ weight.T
    gain = sqnr_db(exact, inputs @ better.float().T) - sqnr_db(exact, inputs @ plain.float().T)
    assert gain > 3, f"{gain:.1f} dB"
    white = compensated_int4(weight, torch.eye(256), group)
    torch.testing.assert_close(white.float(), plain.float(), atol=0.2, rtol=0)


@pytest.mark.parametrize(("inputs", "group"), [(40, 8), (200, 200), (200, 8), (384, 64), (384, 128)])
def test_compensation_is_the_textbook_s(inputs: int, group: int) -> None:
    """In blocks and compiled, or column by column over the whole row: the same, but where rounding ties."""
    weight, rows = normal(33, inputs), normal(2 * inputs, inputs // 4, seed=1) @ normal(inputs // 4, inputs, seed=2)
    moment = rows.T @ rows

    def choose(part: torch.Tensor) -> torch.Tensor:
        return part.abs().amax(1) / 7

    left, expected, steps = weight.double(), [], []
    factor = gptq_rounding.inverse_factor(moment).double()
    for i in range(inputs):
        if i % group == 0:
            steps.append(choose(left[:, i : i + group]))
        q = (left[:, i] / steps[-1]).round().clamp(-8, 7)
        left[:, i:] -= ((left[:, i] - q * steps[-1]) / factor[i, i])[:, None] * factor[i, i:]
        expected.append(q)
    found, step = gptq_rounding.compensated(weight, moment, group, choose)
    assert (found == torch.stack(expected, 1)).float().mean() > 0.98
    torch.testing.assert_close(step, torch.stack(steps, 1).float(), atol=0.02, rtol=0.02)


def test_compensated_rounding_of_eight_bits_keeps_more_of_the_product() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(48, 96, generator=generator)
    inputs = torch.randn(400, 24, generator=generator) @ torch.randn(24, 96, generator=generator)  # correlated channels
    inputs += 0.05 * torch.randn(400, 96, generator=generator)
    values, scale = compensated_int8(weight, inputs.T @ inputs)
    plain, same = int8.quantize_rows(weight)
    torch.testing.assert_close(scale, same)
    assert values.abs().max() <= 127
    errors = [((int8.dequantize_rows(q, scale) - weight) @ inputs.T).square().sum() for q in (plain, values)]
    assert errors[1] < 0.5 * errors[0]
    white, _ = compensated_int8(weight, torch.eye(96))
    assert torch.equal(white, plain), "without correlations there is nothing to make up for"


@pytest.mark.parametrize("judged", [8, gptq_rounding.JUDGED])
def test_regression_keeps_what_it_finds_again(judged: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two halves of rows: what the outputs owe to the inputs is found, and noise alone is not taken for anything."""
    monkeypatch.setattr(gptq_rounding, "JUDGED", judged)
    x, owed, noise = normal(1200, 96), normal(32, 96, seed=1), 3 * normal(1200, 32, seed=2)

    def found(y: torch.Tensor, rows: slice) -> torch.Tensor | None:
        parts = [(y[part], x[part]) for part in torch.arange(1200)[rows].chunk(2)]
        return regressed([(b.T @ a, a.T @ a) for b, a in parts])

    for y in (x @ owed.T, x @ owed.T + noise):
        more = found(y, slice(None))
        assert more is not None
        assert (more - owed).square().mean() < 0.2 * owed.square().mean(), "a ridge of 0.3 leaves its share"
    assert found(noise, slice(None)) is None
    assert found(0.1 * x @ owed.T + noise, slice(40)) is None, "too few rows to tell"


@pytest.mark.parametrize("packs", [1, 2, 5])
@pytest.mark.parametrize("centered", [True, False])
def test_moments_of_packs_of_rows(packs: int, centered: bool) -> None:
    """And through a weight as if each row had gone through it."""
    inputs = [normal(1 + 7 * k, 6, seed=k) + 3 for k in range(packs)]
    lacking = [normal(len(x), 4, seed=10 + k) + 1 for k, x in enumerate(inputs)]
    weight = normal(5, 4, seed=99)
    for found, y in (
        (Moments.of(inputs, iter(lacking), centered), lacking),
        (Moments.of(inputs, iter(lacking), centered).through(weight), [y @ weight.T for y in lacking]),
    ):
        mean = torch.cat(inputs).mean(0) if centered else torch.zeros(6)
        torch.testing.assert_close(found.mean_I, mean)
        torch.testing.assert_close(found.lack_O, torch.cat(y).mean(0))
        assert len(found.halves) == min(packs, 2)
        for k, (cross, moment) in enumerate(found.halves):
            x_half, y_half = torch.cat(inputs[k::2]) - mean, torch.cat(y[k::2])
            torch.testing.assert_close(cross, y_half.T @ x_half, atol=1e-4, rtol=1e-5)
            torch.testing.assert_close(moment, x_half.T @ x_half, atol=1e-4, rtol=1e-5)
        whole = torch.cat(inputs) - mean
        torch.testing.assert_close(found.moment_II, whole.T @ whole, atol=1e-4, rtol=1e-5)
