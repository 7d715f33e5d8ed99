"""Calibrated integer schemes: what all rows of a norm have in common is taken off before rounding, and given back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lightrm
from benchmarks import rounding
from benchmarks.rounding import Bounded
from lightrm.cli.demo_texts import EXAMPLES
from lightrm.engine.packing import SHARE_NOTHING, packs
from lightrm.kernels import integer, passes
from lightrm.kernels.cpu import cpu_passes
from lightrm.kernels.operands import Residual, Sums
from lightrm.measure.sensitivity import exact_twin
from lightrm.model.decoder import Decoder
from lightrm.model.linear import Linear
from lightrm.schemes.int8 import Rowwise, quantize_rows
from tests.test_integer_kernels import normal, product_of
from tests.test_kernels import assert_rows_within, assert_within

pytestmark = pytest.mark.usefixtures("poisoned")
TEXT = [(prompt, text) for prompt, answers in EXAMPLES for _, text in answers]


def assert_biased_gate(
    module: Any, acc: torch.Tensor, row_scale: torch.Tensor, factor: torch.Tensor, bias: torch.Tensor
) -> None:
    """gated_quantize of a room of kernels, and the integer twin, against what they may be off by."""
    values, scale = module.gated_quantize(Sums(acc, row_scale, factor, bias), 1)
    bound = rounding.gated(rounding.scaled(acc, row_scale, factor, bias))
    for rows in ((values, scale), integer.gated_quantize(Sums(acc, row_scale, factor, bias), 1)):
        assert_rows_within(*rows, bound)


@pytest.mark.parametrize("tokens", [1, 2, 17, 65])
@pytest.mark.parametrize("width", [1, 63, 100, 1000])
def test_shifted_rows_and_biased_gates(tokens: int, width: int) -> None:
    x, shift = 3 * normal(tokens, width, seed=7), normal(width, seed=9)
    bound = rounding.norm(Bounded.of(x), 1e-6) - Bounded.of(shift)
    for module in (cpu_passes, integer):
        assert_rows_within(*module.norm_quantize(x, 1e-6, None, shift), bound)
    acc, row_scale, factor = product_of(tokens, width)
    bias = normal(width, seed=8)
    added = Bounded.of(x) + rounding.scaled(acc, row_scale, factor, bias)
    bound = rounding.norm(added, 1e-6) - Bounded.of(shift)
    for module in (cpu_passes, integer):
        stream = x.clone()
        rows = module.add_norm_quantize(stream, Sums(acc, row_scale, factor, bias), 1e-6, None, shift)
        assert_within(stream, added)
        assert_rows_within(*rows, bound)
    acc, row_scale, factor = product_of(tokens, 2 * width)
    bias = normal(2 * width, seed=8)
    assert_biased_gate(cpu_passes, acc, row_scale, factor, bias)


def test_any_shift_is_given_back() -> None:
    """In exact arithmetic a shift changes nothing; near the rows' mean it makes the product more exact."""
    x, weight, common = normal(80, 96), normal(40, 96, seed=1), 4 * normal(96, seed=2)
    x = x + common
    wide = x.double()
    rows = wide * (wide.square().mean(1, keepdim=True) + 1e-6).rsqrt()
    exact = rows @ weight.double().T
    held = Rowwise(*quantize_rows(weight))

    def error(shift: torch.Tensor | None) -> float:
        linear = Linear(held, None if shift is None else weight @ shift, int8=True, shift_I=shift)
        rows = passes.norm(Residual(x.clone()), None, 1e-6, int8=True, shift_D=shift)
        return float((linear(rows).float().double() - exact).square().mean().sqrt())

    assert error(0.3 * normal(96, seed=5)) < 2 * error(None)
    assert error(rows.mean(0).float()) < 0.4 * error(None)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32"])
def test_calibrated_models_are_centered_and_travel(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_passes, "PAIRS", False)  # few texts: attention in bfloat16 moves their scores as far
    exact, plain = lightrm.load("demo", scheme="fp32"), lightrm.load("demo", scheme=scheme)
    better = lightrm.load("demo", scheme=scheme, calibration=TEXT)
    layer = better.engine.decoder.layers[0]
    assert layer.qkv.shift_I is not None
    assert layer.gate_up.shift_I is not None
    assert layer.down.shift_I is None
    prompts, answers = [p for p, _ in TEXT], [t for _, t in TEXT]
    truth = exact.score_batch(prompts, answers)
    scores = better.score_batch(prompts, answers)
    off = [np.abs(rm.score_batch(prompts, answers) - truth).mean() for rm in (plain, better)]
    assert off[1] < 0.9 * off[0], off
    better.save(tmp_path / "out")
    again = lightrm.load(tmp_path / "out")
    np.testing.assert_array_equal(again.score_batch(prompts, answers), scores)
    alone = [float(again.score(p, [t])[0]) for p, t in TEXT[:5]]
    np.testing.assert_array_equal(alone, scores[:5])
    if scheme == "w4a8-g32":
        wide = lightrm.load(tmp_path / "out", scheme="w4a16-g32")
        assert np.abs(wide.score_batch(prompts, answers) - truth).mean() < 0.5 * off[0]


def test_calibrated_streams_are_right_on_average() -> None:
    """What the residual stream is off by has no mean over the calibration text, after either half of every layer."""
    ids = lightrm.load("demo").encode([p for p, _ in TEXT], [t for _, t in TEXT])
    pack = next(batch for _, batch in packs(ids, 2048, SHARE_NOTHING))

    def streams(decoder: Decoder) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        decoder.last_hidden(pack, lambda name, stream: found.__setitem__(name, stream.clone()))
        return found

    exact = streams(exact_twin(lightrm.load("demo", scheme="w4a8"))[0])
    shares = []
    for text in (None, TEXT):
        rounded = streams(lightrm.load("demo", scheme="w4a8", calibration=text).engine.decoder)
        off = {name: rounded[name] - exact[name] for name in list(exact)[:-2]}  # the last layer has last tokens only
        shares.append([float(e.mean(0).square().sum() / e.square().sum(1).mean()) for e in off.values()])
    assert max(shares[1]) < 0.01 < min(shares[0]), shares
