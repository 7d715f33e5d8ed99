"""What overflows is never a number: rows become NaN, and a score NumericsError."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

import lightrm
from lightrm.kernels import integer, library, passes, reference
from lightrm.kernels.cpu import cpu_passes
from lightrm.kernels.operands import Residual, ScoreRule, Sums
from lightrm.kernels.segments import Segment
from tests.zoo import HEAD_WEIGHT, LLAMA_CONFIG, Specimen, llama_weights

IDS = [[5, 9, 33, 71, 2], [7, 3, 3, 90]]
NAMES = ("fp32", "bf16", "w8a8", "w4a8", "w4a16")
CONFIG = {**LLAMA_CONFIG, "architectures": ["LlamaForSequenceClassification"], "pad_token_id": 0}
CONFIG |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
WEIGHTS = llama_weights() | {"score.weight": HEAD_WEIGHT}


def far_rows(width: int = 64) -> torch.Tensor:
    """Rows whose squares overflow though their numbers do not, among ones that are sound."""
    x = torch.randn(6, width, generator=torch.Generator().manual_seed(0))
    x[1] *= 1e19
    x[3, 5] = 3e38
    x[4] *= 1e18
    return x


@pytest.mark.parametrize("module", [reference, library])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_of_an_overflow_is_nan(module, dtype: torch.dtype) -> None:
    x = far_rows().to(dtype)
    for weight in (None, torch.ones(64, dtype=dtype)):
        lost = torch.isnan(module.rms_norm(x, weight, 1e-6)).all(1)
        assert lost.tolist() == [False, True, False, True, False, False]
        assert torch.isfinite(module.rms_norm(x, weight, 1e-6)[~lost]).all()


@pytest.mark.parametrize("shifted", [False, True])
def test_a_quantized_norm_of_an_overflow_shows(shifted: bool) -> None:
    x, shift = far_rows(), torch.full((64,), 0.5) if shifted else None
    sums = torch.zeros(6, 64, dtype=torch.int32), torch.ones(6), torch.ones(64), torch.zeros(64)
    for module in (integer, cpu_passes):
        found = torch.isnan(module.norm_quantize(x.clone(), 1e-6, None, shift)[1])
        assert found.tolist() == [False, True, False, True, False, False]
    residual = Residual(x.clone(), Sums(*sums))
    found = torch.isnan(passes.norm(residual, None, 1e-6, int8=True, shift_D=shift).scale_T)
    assert found.tolist() == [False, True, False, True, False, False]


def test_a_score_of_minus_infinity_is_no_hidden_one() -> None:
    """A mask is -inf too: an attention score that overflowed must not be taken for one."""
    query, key = torch.full((3, 1, 16), 1e20), torch.full((3, 1, 16), 1.0)
    key[1] = -1e20
    value = torch.randn(3, 1, 16, generator=torch.Generator().manual_seed(0))
    paths = passes.paths([Segment(0, 3)], query.device)
    mixed = passes.attention(query, key, value, paths, ScoreRule(0.25)).values_TI
    assert torch.isfinite(mixed[0]).all()
    assert torch.isnan(mixed[1:]).all()


def found(folder: Path, scheme: str) -> np.ndarray | None:
    """Scores; None where lightrm says that something overflows."""
    try:
        return lightrm.load(folder, scheme=scheme).score_ids(IDS)
    except lightrm.NumericsError:
        return None


@pytest.mark.parametrize("scheme", NAMES)
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "score.weight"])
def test_weights_of_1e38(name: str, scheme: str, tmp_path: Path) -> None:
    weights = WEIGHTS | {name: torch.full_like(WEIGHTS[name], 1e38)}
    scores = found(Specimen({"model.safetensors": weights}, CONFIG).write(tmp_path), scheme)
    assert scores is None or (np.isfinite(scores) & (scores != 0)).all()


def test_flipped_exponents(tmp_path: Path) -> None:
    """As transformers computes it in float32, or NumericsError; in no scheme exactly 0, as an overflow gave."""
    from transformers import AutoModelForSequenceClassification

    Specimen({"model.safetensors": WEIGHTS}, CONFIG).write(tmp_path / "sound")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "sound", dtype=torch.float32)
    held, draw = theirs.state_dict(), random.Random(0)
    raised = 0
    for trial in range(10):
        name = draw.choice(["model.embed_tokens.weight", "model.norm.weight", "score.weight", *WEIGHTS])
        weight = WEIGHTS[name].clone()
        at = draw.choice([5, 9, 33, 71, 7, 3, 90]) * 32 + 4 if "embed" in name else draw.randrange(weight.numel())
        weight.view(-1).view(torch.int32)[at] ^= 1 << draw.choice([30, 30, 29, 28, 27, 26, 25, 24, 23])
        held[name].copy_(weight)
        with torch.inference_mode():
            true = np.array([float(theirs(torch.tensor([ids])).logits) for ids in IDS])
        held[name].copy_(WEIGHTS[name])
        folder = Specimen({"model.safetensors": WEIGHTS | {name: weight}}, CONFIG).write(tmp_path / "flipped")
        scores = {scheme: found(folder, scheme) for scheme in NAMES[trial % 3 :: 3] + NAMES[:1]}
        raised += sum(one is None for one in scores.values())
        if scores["fp32"] is not None:
            np.testing.assert_allclose(scores["fp32"], true, rtol=1e-3, atol=1e-3)
        assert all(one is None or (np.isfinite(one) & (one != 0)).all() for one in scores.values()), (name, scores)
    assert raised >= 2
