"""Rounding that makes up for its own error, of one matrix."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from lightrm.loading import gptq_rounding, regression, symmetric
from lightrm.loading.gptq_rounding import compensated_int4, compensated_int8, factored
from lightrm.loading.regression import best_ridge, judged, regressed
from lightrm.loading.second_moments import HalfRows, Moments
from lightrm.loading.symmetric import Symmetric
from lightrm.schemes import int4, int8
from lightrm.schemes.quality import sqnr_db
from tests.test_schemes import normal


@pytest.mark.parametrize("group", [32, 128])
def test_compensation_beats_rounding_where_it_matters(group: int) -> None:
    """On correlated inputs the layer's output error falls well below that of round-to-nearest, on the same grid."""
    weight = normal(48, 256)
    inputs = normal(2000, 40, seed=1) @ normal(40, 256, seed=2) + 0.1 * normal(2000, 256, seed=3)
    plain = int4.quantize(weight, group)
    better, _ = compensated_int4(weight, factored(Symmetric.of(inputs.T @ inputs)), group)
    assert torch.equal(plain.scale_O, better.scale_O)
    exact = inputs @ weight.T
    gain = sqnr_db(exact, inputs @ better.float().T) - sqnr_db(exact, inputs @ plain.float().T)
    assert gain > 3, f"{gain:.1f} dB"
    white = compensated_int4(weight, factored(Symmetric.of(torch.eye(256))), group)[0]
    torch.testing.assert_close(white.float(), plain.float(), atol=0.2, rtol=0)


@pytest.mark.parametrize(("inputs", "group"), [(40, 8), (200, 200), (200, 8), (384, 64), (384, 128), (384, 192)])
def test_compensation_is_the_textbook_s(inputs: int, group: int) -> None:
    """In blocks and compiled, or column by column over the whole row: the same, but where rounding ties."""
    weight, rows = normal(33, inputs), normal(2 * inputs, inputs // 4, seed=1) @ normal(inputs // 4, inputs, seed=2)
    moment = rows.T @ rows

    def choose(part: torch.Tensor) -> torch.Tensor:
        return part.abs().amax(1) / 7

    left, expected, steps = weight.double(), [], []
    damped = moment.double() + gptq_rounding.DAMPING * moment.diagonal().double().mean() * torch.eye(inputs)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    for i in range(inputs):
        if i % group == 0:
            steps.append(choose(left[:, i : i + group]))
        q = (left[:, i] / steps[-1]).round().clamp(-8, 7)
        left[:, i:] -= ((left[:, i] - q * steps[-1]) / factor[i, i])[:, None] * factor[i, i:]
        expected.append(q)
    found, step, lost = gptq_rounding.compensated(weight, factored(Symmetric.of(moment)), group, choose)
    torch.testing.assert_close(lost, weight - found * step.repeat_interleave(group, 1), atol=1e-5, rtol=0)
    assert (found == torch.stack(expected, 1)).float().mean() > 0.98
    torch.testing.assert_close(step, torch.stack(steps, 1).float(), atol=0.02, rtol=0.02)


def test_compensated_rounding_of_eight_bits_keeps_more_of_the_product() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(48, 96, generator=generator)
    inputs = torch.randn(400, 24, generator=generator) @ torch.randn(24, 96, generator=generator)  # correlated channels
    inputs += 0.05 * torch.randn(400, 96, generator=generator)
    rows, lost = compensated_int8(weight, factored(Symmetric.of(inputs.T @ inputs)))
    values, scale = rows.values_OI, rows.scale_O
    torch.testing.assert_close(lost, weight - rows.float(), atol=1e-5, rtol=0)
    plain, same = int8.quantize_rows(weight)
    torch.testing.assert_close(scale, same)
    assert values.abs().max() <= 127
    errors = [((int8.dequantize_rows(q, scale) - weight) @ inputs.T).square().sum() for q in (plain, values)]
    assert errors[1] < 0.5 * errors[0]
    white, _ = compensated_int8(weight, factored(Symmetric.of(torch.eye(96))))
    assert torch.equal(white.values_OI, plain), "without correlations there is nothing to make up for"


@pytest.mark.parametrize("decide", [8, regression.JUDGED])
def test_regression_keeps_what_it_finds_again(decide: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two halves of rows: what the outputs owe to the inputs is found, and noise alone is not taken for anything."""
    monkeypatch.setattr(regression, "JUDGED", decide)
    x, owed, noise = normal(1200, 96), normal(32, 96, seed=1), 3 * normal(1200, 32, seed=2)

    def found(y: torch.Tensor, rows: slice) -> torch.Tensor | None:
        parts = torch.arange(1200)[rows].chunk(2)
        return regressed(moments((k, x[part], y[part]) for k, part in enumerate(parts)))

    for y in (x @ owed.T, x @ owed.T + noise):
        more = found(y, slice(None))
        assert more is not None
        assert (more - owed).square().mean() < 0.2 * owed.square().mean(), "a ridge of 0.3 leaves its share"
    assert found(noise, slice(None)) is None
    assert found(0.1 * x @ owed.T + noise, slice(40)) is None, "too few rows to tell"


@pytest.mark.parametrize(("inputs", "outputs", "rows"), [(1, 1, 9), (63, 5, 40), (65, 40, 300), (130, 33, 100)])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_regression_is_the_textbook_s(
    inputs: int, outputs: int, rows: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a solution by elimination in float64, for every ridge and half; some inputs are far larger than
    others. The ridge errs no more than a hundredth more than the best one, where the losses are close."""
    monkeypatch.setattr(symmetric, "SIDE", 32)
    x = normal(2 * rows, inputs) * torch.linspace(1, scale, inputs) + normal(2 * rows, 1, seed=5)
    y = x @ normal(outputs, inputs, seed=1).T / inputs**0.5 + normal(2 * rows, outputs, seed=2)
    sums = moments(((0, x[:rows], y[:rows]), (1, x[rows:], y[rows:])))
    around = (x - x.mean(0)).double().split(rows)
    halves = [(part_y.double().T @ part, part.T @ part) for part_y, part in zip(y.split(rows), around, strict=True)]

    def solved(half: tuple[torch.Tensor, torch.Tensor], ridge: float) -> torch.Tensor:
        cross, moment = half
        return cross @ torch.linalg.inv(moment + ridge * moment.diagonal().mean() * torch.eye(inputs))

    losses = {}
    for ridge in regression.RIDGES:
        made = [solved(half, ridge)[judged(outputs)] for half in halves]
        losses[ridge] = sum(
            float((d * (d @ moment - 2 * cross[judged(outputs)])).sum())
            for d, (cross, moment) in zip(made, reversed(halves), strict=True)
        )
    found = best_ridge(sums.halves)
    least = min(losses.values())
    assert (losses[found] if found is not None else 0.0) <= least + 0.01 * abs(least)
    if found is not None:
        more = regressed(sums)
        assert more is not None
        exact = solved((halves[0][0] + halves[1][0], halves[0][1] + halves[1][1]), found)
        assert (more - exact).norm() < 1e-4 * exact.norm()


def test_regression_draws_towards_the_given_weight() -> None:
    """As if what that weight lacks were predicted, and added to it; None where it lacks nothing but noise."""
    x, noise = normal(1200, 96) + 2, 0.3 * normal(1200, 32, seed=2)
    given, owed = normal(32, 96, seed=3), 0.1 * normal(32, 96, seed=1)

    def rows(y: torch.Tensor) -> list[HalfRows]:
        return [(k, *part) for k, part in enumerate(zip(x.chunk(2), y.chunk(2), strict=True))]

    def judge(x_TI: torch.Tensor, y_TO: torch.Tensor) -> torch.Tensor:
        few = judged(len(given))
        return y_TO[:, few] - x_TI @ given[few].T

    found = regressed(Moments.of(rows(x @ (given + owed).T + noise), judge), given)
    more = regressed(moments(rows(x @ owed.T + noise)))
    assert found is not None
    assert more is not None
    torch.testing.assert_close(found, given + more, atol=1e-4, rtol=0)
    assert regressed(Moments.of(rows(x @ given.T + noise), judge), given) is None


def moments(rows: Iterable[HalfRows]) -> Moments:
    return Moments.of(rows, lambda _, y_TO: y_TO[:, judged(y_TO.shape[1])])


@pytest.mark.parametrize("packs", [1, 2, 5])
@pytest.mark.parametrize("centered", [True, False])
def test_moments_of_packs_of_rows(packs: int, centered: bool) -> None:
    """Summed around the mean of the first rows, and corrected: as if the mean of all had been known. A pack may come in
    parts."""
    inputs = [normal(1 + 7 * k, 6, seed=k) + 3 for k in range(packs)]
    wanted = [normal(len(x), 4, seed=10 + k) + 1 for k, x in enumerate(inputs)]
    chosen = normal(3, 4, seed=99)
    rows = [
        (k % 2, *part)
        for k, (x, y) in enumerate(zip(inputs, wanted, strict=True))
        for part in zip(x.split(4), y.split(4), strict=True)
    ]
    found = Moments.of(rows, lambda x_TI, y_TO: y_TO @ chosen.T - x_TI[:, :3], centered)
    mean = torch.cat(inputs).mean(0) if centered else torch.zeros(6)
    torch.testing.assert_close(found.mean_I, mean)
    torch.testing.assert_close(found.mean_O, torch.cat(wanted).mean(0))
    whole, close = torch.cat(inputs) - mean, {"atol": 1e-3, "rtol": 1e-5}
    torch.testing.assert_close(found.cross_OI, torch.cat(wanted).T @ whole, **close)
    assert len(found.halves) == min(packs, 2)
    for k, half in enumerate(found.halves):
        x_half, y_half = torch.cat(inputs[k::2]) - mean, torch.cat(wanted[k::2])
        judged_half = y_half @ chosen.T - torch.cat(inputs[k::2])[:, :3]
        torch.testing.assert_close(half.judged_JI, judged_half.T @ x_half, **close)
        torch.testing.assert_close(half.moment.full(), x_half.T @ x_half, **close)
    torch.testing.assert_close(found.merged().full(), whole.T @ whole, **close)
    assert len(found.halves) == 1
