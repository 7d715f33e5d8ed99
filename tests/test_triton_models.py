"""Whole models through Triton's kernels, in the interpreter, against the CPU's path; which card gets which kernels."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import lightrm
from lightrm.kernels import dispatch
from lightrm.kernels.cpu import cpu_passes
from lightrm.kernels.cuda import cuda_attention, cuda_passes, cuda_products, launch
from lightrm.kernels.operands import Parts
from tests.conftest import DATA
from tests.zoo import specimens

TINY = [[5, 9, 33, 71, 2], [1, 2], list(range(3, 40))]
IDS = [[1, 409, 1187, 272, 2905, 31, 640, 2], [1, 88, 734, 2]]  # short: the interpreter runs a program a token
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="lends a CPU's tensors to a card's kernels")
Lend = Callable[[int], None]


@pytest.fixture(autouse=True)
def float_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card's attention is compared in float32: so it is on the CPU, which may multiply in bfloat16."""
    monkeypatch.setattr(cpu_passes, "PAIRS", False)


@pytest.fixture
def lend(monkeypatch: pytest.MonkeyPatch) -> Lend:
    """Makes the doors treat tensors on the CPU as if they lay on a card of this compute capability."""

    def lent(card: int) -> None:
        monkeypatch.setattr(dispatch, "card_of", lambda like: card)

    return lent


def ids_of(name: str) -> list[list[int]]:
    """The shortest cases."""
    lines = (DATA / name / "cases.jsonl").read_text().splitlines()
    return sorted((json.loads(line)["input_ids"] for line in lines), key=len)[:3]


@pytest.mark.parametrize(("scheme", "card"), [("w8a8", 80), ("w4a8", 80), ("w8a8", 75), ("w4a8", 75)])
def test_tiny_models_are_equal(scheme: str, card: int, tmp_path, lend: Lend, monkeypatch) -> None:
    """With float32 between the kernels, the same scores as on the CPU to the last bits of a float."""
    model = lightrm.load(specimens()["ziya"].write(tmp_path), scheme=scheme)
    expected = model.score_ids(TINY)
    monkeypatch.setattr(launch, "PRODUCT_DTYPE", torch.float32)
    lend(card)
    np.testing.assert_allclose(model.score_ids(TINY), expected, atol=5e-6, rtol=0)


def test_int8_weights_of_another_tool(lend: Lend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their norms are not folded in, so that rows are normed in float and then rounded."""
    model = lightrm.load(DATA / "torchao-int8-dynamic")
    assert (model.report.scheme.name, model.engine.decoder.layers[0].qkv.int8) == ("w8a8", True)
    expected = model.score_ids(TINY)
    monkeypatch.setattr(launch, "PRODUCT_DTYPE", torch.float32)
    lend(80)
    np.testing.assert_allclose(model.score_ids(TINY), expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_the_bundled_model(scheme: str, lend: Lend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five layers of 256: a last bit tips a rounding to int8 over somewhere, and that one tips others, as between numba
    and plain PyTorch. What is left is small beside what int8 itself costs; a wrong kernel would not be."""
    model = lightrm.load("demo", scheme=scheme)
    expected = model.score_ids(IDS)
    exact = lightrm.load("demo", scheme="fp32").score_ids(IDS)
    monkeypatch.setattr(launch, "PRODUCT_DTYPE", torch.float32)
    lend(80)
    assert np.abs(model.score_ids(IDS) - expected).max() < 0.3 * np.abs(expected - exact).max()


def test_half_precision_between_kernels_costs_nothing(lend: Lend) -> None:
    """float16 products tip some roundings over, to either side: the error against float32 stays what int8 makes it."""
    model = lightrm.load("demo", scheme="w8a8")
    ids = model.encode(["Capital of France?"] * 2, ["Paris.", "巴黎。"])
    expected, exact = model.score_ids(ids), lightrm.load("demo", scheme="fp32").score_ids(ids)
    lend(90)
    found = model.score_ids(ids)
    assert (found != expected).any(), "it ran through other kernels"
    assert np.abs(found - exact).max() < 1.5 * np.abs(expected - exact).max()


def test_a_score_does_not_see_its_neighbours(tmp_path, lend: Lend) -> None:
    """Bit for bit, whatever else is in the pack."""
    model = lightrm.load(specimens()["ziya"].write(tmp_path), scheme="w8a8")
    lend(80)
    together = model.score_ids(TINY)
    alone = [float(model.score_ids([ids])[0]) for ids in TINY]
    assert together.tolist() == alone


@pytest.mark.parametrize("name", ["ziya", "baichuan-13b-value-head"])
def test_float_schemes(name: str, tmp_path, lend: Lend) -> None:
    """Triton's norms, gate, heads and attention under unquantized weights, RoPE and ALiBi: float32 against float32."""
    folder = specimens()[name].write(tmp_path) if name == "ziya" else DATA / name
    model = lightrm.load(folder, scheme="fp32")
    ids = TINY if name == "ziya" else ids_of(name)
    expected = model.score_ids(ids)
    lend(80)
    np.testing.assert_allclose(model.score_ids(ids), expected, atol=2e-5, rtol=1e-5)


def test_the_published_table_of_alibi(lend: Lend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parity option that no kernel has: attention goes the plain way, all else through Triton."""
    ids = ids_of("baichuan-13b-value-head")
    monkeypatch.setattr(launch, "PRODUCT_DTYPE", torch.float32)  # the table is rounded to the dtype of the query
    for scheme in ("fp32", "w8a8"):
        model = lightrm.load(DATA / "baichuan-13b-value-head", scheme=scheme, alibi="absolute")
        expected = model.score_ids(ids)
        lend(80)
        np.testing.assert_allclose(model.score_ids(ids), expected, atol=2e-5 if scheme == "fp32" else 0.05, rtol=0)
        lend(0)


def test_alibi_in_8_bits(lend: Lend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Baichuan: no rotation, so that query, key and value are columns of the product as it is."""
    ids = ids_of("baichuan-13b-value-head")
    model = lightrm.load(DATA / "baichuan-13b-value-head", scheme="w8a8")
    expected = model.score_ids(ids)
    exact = lightrm.load(DATA / "baichuan-13b-value-head", scheme="fp32").score_ids(ids)
    monkeypatch.setattr(launch, "PRODUCT_DTYPE", torch.float32)
    lend(80)
    np.testing.assert_allclose(model.score_ids(ids), expected, atol=0.1 * np.abs(expected - exact).max(), rtol=0)


@pytest.mark.parametrize("name", ["gptq-4bit-g32-asym", "gptq-4bit-g32-desc-act"])
def test_files_of_gptq(name: str, lend: Lend) -> None:
    """Laid out for the kernel once, at load, activation order included; the scores are those of the plain way."""
    plain = lightrm.load(DATA / name)
    lend(86)
    model = lightrm.load(DATA / name)
    down = model.engine.decoder.layers[0].down.weight
    assert isinstance(down, Parts)
    assert type(down.parts[0]).__name__ == "Tiled"
    model.engine.decoder.dtype = plain.engine.decoder.dtype = torch.float32  # the interpreter cuts bfloat16 off
    found = model.score_ids(ids_of(name))
    lend(0)
    np.testing.assert_allclose(found, plain.score_ids(ids_of(name)), atol=2e-5, rtol=1e-5)


def test_w4a16_of_our_own(tmp_path, lend: Lend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Widened inside the product, not before it."""
    model = lightrm.load(specimens()["ziya"].write(tmp_path), scheme="w4a16")
    model.engine.decoder.dtype = torch.float32  # the interpreter cuts bfloat16 off
    expected = model.score_ids(TINY)
    seen = []
    inner = cuda_products.grouped_product
    monkeypatch.setattr(cuda_products, "grouped_product", lambda *a: seen.append(a) or inner(*a))
    lend(80)
    np.testing.assert_allclose(model.score_ids(TINY), expected, atol=2e-5, rtol=1e-5)
    assert seen


def test_half_precision_overflows_are_found(tmp_path, lend: Lend) -> None:
    """NaN from a card's kernels is an error with the layer's name, never a score."""
    model = lightrm.load(specimens()["ziya"].write(tmp_path), scheme="w8a8")
    model.engine.decoder.layers[1].gate_up.weight.scale_O.fill_(1e6)
    lend(80)
    with pytest.raises(lightrm.errors.NumericsError, match=r"layers\.1\.mlp"):
        model.score_ids(TINY)


@pytest.mark.parametrize(("card", "path", "name", "reason"), [
    (90, "integer", "Triton", "compute capability 9.0: int8 products that scale and add in one kernel"),
    (75, "integer", "Triton passes", r"7.5: torch._int_mm and PyTorch's attention, since Triton's products compile"),
    (75, "float", "Triton passes", r"PyTorch's products and attention"),
    (0, "integer", "plain PyTorch", "this is not a card of NVIDIA's: Triton's kernels need 7.5; right, but slow"),
    (61, "integer", "plain PyTorch", "compute capability 6.1, Triton's kernels need 7.5; right, but slow"),
    (120, "float", "torch and Triton", "12.0: PyTorch's products, Triton's attention"),
])  # fmt: skip
def test_each_card_gets_its_kernels(monkeypatch, card, path, name, reason) -> None:
    """And the model's repr, `doctor` and a warning say which and why."""
    monkeypatch.setattr(dispatch, "capability", lambda device: card)
    choice = dispatch.kernels_for(torch.device("cuda"), path)
    assert choice.name == name
    assert reason in choice.reason
    assert choice.slow == (name == "plain PyTorch")
    monkeypatch.setattr(dispatch, "card_of", lambda like: card)
    here = torch.device("cpu")
    assert (dispatch.triton_products(here) is cuda_products) == (card >= 80)
    assert (dispatch.triton_attention(here) is cuda_attention) == (card >= 80)
    assert (dispatch.passes(here) is cuda_passes) == (card >= 75)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card without Triton is slow and says so; nothing is imported that is not there."""
    monkeypatch.setattr(dispatch, "imported", lambda name: (None, "ModuleNotFoundError: No module named 'triton'"))
    monkeypatch.setattr(dispatch, "capability", lambda device: 89)
    choice = dispatch.kernels_for(torch.device("cuda"), "integer")
    assert choice.slow
    assert "Triton cannot be imported (ModuleNotFoundError: No module named 'triton'): install it" in str(choice)
