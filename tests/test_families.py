"""Model families with parts that LLaMA lacks, in 8 and 4 bits and in Triton: small models that transformers wrote and
scored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lightrm
from lightrm.checkpoints.detect import open_checkpoint
from lightrm.kernels import dispatch
from lightrm.loading.folding import Folding
from lightrm.loading.gptq_export import export_gptq
from lightrm.loading.loader import Loader
from lightrm.loading.options import LoadOptions
from lightrm.loading.placement import Placement
from lightrm.opening import open_model
from lightrm.schemes.grammar import parse_scheme
from tests.test_parity import reference, sequences

FAMILIES = ("mistral, window", "qwen3, windows, biases", "gemma", "gemma2", "gemma3", "phi4-mini, part of each head")
CPU = torch.device("cpu")


def drawn(count: int, length: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 120, (length,), generator=generator).tolist() for _ in range(count)]


TEXTS = [*sequences(), *drawn(40, 90, 5)]


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A folder, and the scores that transformers gives."""
    folder = tmp_path_factory.mktemp("family")
    return folder, np.array(reference(request.param, folder, TEXTS, initializer_range=0.1))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32"])
def test_quantized_scores_stay_near(scheme: str, made: tuple[Path, np.ndarray]) -> None:
    """As near as LLaMA's of this size are, in units of what the scores differ by: 0.01 to 0.03, and 0.2 to 0.3."""
    folder, expected = made
    rm = lightrm.load(folder, scheme=scheme)
    error = np.abs(rm.score_ids(TEXTS) - expected).mean() / expected.std()
    assert error < {"w8a8": 0.1, "w4a8-g32": 0.5}[scheme]
    assert min(rm.report.sqnr_db.values()) > {"w8a8": 37, "w4a8-g32": 17}[scheme]


def test_folding_is_exact(made: tuple[Path, np.ndarray]) -> None:
    """In float32, rotated and folded: the same scores."""
    folder, expected = made
    checkpoint = open_checkpoint(folder)
    loader = Loader(checkpoint, Placement(parse_scheme("fp32", CPU), CPU))
    loader.folding = Folding(loader.architecture)
    rm = lightrm.load(folder, scheme="fp32")
    rm.engine.decoder, rm.engine.head, _ = loader.load()
    found = rm.score_ids(TEXTS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-3 * expected.std())  # the table is in float16


def test_large_channels_that_a_norm_makes_small(tmp_path: Path) -> None:
    """As in Gemma 3's pretrained weights: a few channels of the stream are large, and the norms before qkv, gate and up
    shrink them. Folded into the matrices, these norms would leave the rows to be rounded as large as they are."""
    reference("gemma3", tmp_path, TEXTS, initializer_range=0.1)
    weights = load_file(tmp_path / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
            weight[3::16] += 200
        elif (
            name.endswith(("input_layernorm.weight", "pre_feedforward_layernorm.weight")) or name == "model.norm.weight"
        ):
            weight[3::16] = 1 / 200 - 1
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    exact, rounded = (lightrm.load(tmp_path, scheme=scheme).score_ids(TEXTS) for scheme in ("fp32", "w8a8"))
    assert np.abs(rounded - exact).mean() / exact.std() < 0.1


def test_neighbours_and_shared_prompts_change_no_bit(made: tuple[Path, np.ndarray]) -> None:
    rm = lightrm.load(made[0], scheme="w8a8")
    whole = sequences()[-1]
    texts = [*sequences(), *(whole[:150] + ids for ids in sequences()[:6]), whole[:70], whole[:30] + [5] * 50]
    alone = [float(rm.score_ids([ids])[0]) for ids in texts]
    assert rm.engine.distinct_tokens(texts) < sum(map(len, texts)) - 300, "prompts are shared"
    for budget in (64, 10_000):
        rm.token_budget = budget
        assert rm.score_ids(texts).tolist() == alone


def test_calibrated_and_saved(made: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    """Calibrated rounding is nearer than plain rounding, and the folder holds the same model."""
    folder, expected = made
    texts = drawn(24, 128, seed=8)
    options = LoadOptions(scheme="w4a8-g32")
    plain, calibrated = open_model(folder, options), open_model(folder, options, lambda text: texts)
    plain_error, error = (np.abs(rm.score_ids(TEXTS) - expected).mean() for rm in (plain, calibrated))
    assert error < plain_error
    calibrated.save(tmp_path / "folder")
    again = lightrm.load(tmp_path / "folder")
    assert again.score_ids(sequences()).tolist() == calibrated.score_ids(sequences()).tolist()


def test_triton(made: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, with float32 between the kernels: the scores of the CPU's kernels."""
    pytest.importorskip("triton")
    from lightrm.kernels.cpu import cpu_passes
    from lightrm.kernels.cuda import launch

    monkeypatch.setattr(cpu_passes, "PAIRS", False)  # float32 in the CPU's attention too
    ids = [[7, 9], drawn(1, 60, 6)[0]]
    models = {scheme: lightrm.load(made[0], scheme=scheme) for scheme in ("fp32", "w8a8")}
    expected = {scheme: rm.score_ids(ids) for scheme, rm in models.items()}
    monkeypatch.setattr(launch, "PRODUCT_DTYPE", torch.float32)
    monkeypatch.setattr(dispatch, "card_of", lambda like: 80)
    for scheme, atol in (("fp32", 2e-5), ("w8a8", 0.02)):
        found = models[scheme].score_ids(ids if scheme == "w8a8" else ids[:1])
        np.testing.assert_allclose(found, expected[scheme][: len(found)], atol=atol, rtol=0)


@pytest.mark.parametrize("name", ["qwen3, windows, biases", "gemma2"])
def test_exported_as_gptq(name: str, tmp_path: Path) -> None:
    """Matrices rounded to 4 bits, everything else as the file had it: transformers' norms of 1 + w included."""
    sizes = {"intermediate_size": 128, "head_dim": 32, "initializer_range": 0.1}
    expected = np.array(reference(name, tmp_path / "source", TEXTS, **sizes))
    export_gptq(tmp_path / "source", tmp_path / "gptq", scheme="w4a16-g32")
    error = np.abs(lightrm.load(tmp_path / "gptq", scheme="fp32").score_ids(TEXTS) - expected).mean()
    assert error < 0.4 * expected.std()
    source, found = (load_file(tmp_path / part / "model.safetensors") for part in ("source", "gptq"))
    assert all(torch.equal(found[key], source[key]) for key in source if "norm" in key or "embed" in key)
