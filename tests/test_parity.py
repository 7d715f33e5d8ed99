"""fp32 parity with transformers, on tiny checkpoints that transformers wrote itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import lightrm

SIZES = {
    "vocab_size": 120,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "num_labels": 1,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
ORIGINAL = {"original_max_position_embeddings": 64}
YARN = ORIGINAL | {
    "rope_type": "yarn", "rope_theta": 5000.0, "factor": 3.0, "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 1.2,
    "mscale_all_dim": 0.7, "truncate": False,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1 + k / 10 for k in range(8)],
    "long_factor": [1.5 + k for k in range(8)],
}  # fmt: skip
GEMMA2 = {
    "num_key_value_heads": 2, "head_dim": 24, "query_pre_attn_scalar": 40, "sliding_window": 33,
    "attn_logit_softcapping": 5.0,
}  # fmt: skip
GEMMA3 = {"num_key_value_heads": 1, "head_dim": 24, "query_pre_attn_scalar": 30, "sliding_window": 20}
PHI3 = {"bos_token_id": 1, "eos_token_id": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, linear scaling": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
    ),
    "llama, gqa, llama3 scaling": ("Llama", {"num_key_value_heads": 2, "rope_parameters": LLAMA3}),
    "llama, all biases": ("Llama", {"attention_bias": True}),
    "llama, wide heads": ("Llama", {"head_dim": 24}),
    "llama, biases in the MLP": ("Llama", {"mlp_bias": True}),
    "llama, yarn": (
        "Llama",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, **ORIGINAL}},
    ),
    "llama, yarn, all fields": ("Llama", {"rope_parameters": YARN}),
    "mistral": ("Mistral", {"num_key_value_heads": 1, "sliding_window": None}),
    "mistral, window": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 33}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen2, windows": (
        "Qwen2",
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 24}),
    "qwen3, windows, biases": (
        "Qwen3",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 50,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gemma": ("Gemma", {"num_key_value_heads": 1, "head_dim": 24}),
    "gemma2": ("Gemma2", GEMMA2),
    "gemma2 without caps": ("Gemma2", GEMMA2 | {"attn_logit_softcapping": None}),
    "gemma3": ("Gemma3Text", GEMMA3),
    "gemma3, linear scaling": (
        "Gemma3Text",
        GEMMA3
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 3e3},
            }
        },
    ),
    "phi3": ("Phi3", PHI3),
    "phi3, window": ("Phi3", PHI3 | {"num_key_value_heads": 2, "sliding_window": 40}),
    "phi3, longrope": ("Phi3", PHI3 | {"original_max_position_embeddings": 64, "rope_parameters": LONGROPE}),
    "phi4-mini, part of each head": (
        "Phi3",
        PHI3
        | {
            "original_max_position_embeddings": 64,
            "num_key_value_heads": 2,
            "rope_parameters": LONGROPE
            | {
                "partial_rotary_factor": 0.75,
                **{f"{end}_factor": LONGROPE[f"{end}_factor"][:6] for end in ("short", "long")},
            },
        },
    ),
}
LENGTHS = (1, 2, 15, 16, 17, 63, 65, 127, 300)


def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 120, (length,), generator=generator).tolist() for length in LENGTHS]


def reference(name: str, folder: Path, texts: list[list[int]] | None = None, **more: float) -> list[float]:
    """Write the checkpoint, and score each sequence by itself with transformers in float32."""
    kind, extra = MODELS[name]
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **extra, **more})
    model = (
        getattr(transformers, f"{kind}ForSequenceClassification")
        ._from_config(config, attn_implementation="eager")
        .eval()
    )
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.5)
            if (
                "norm" in parameter_name and kind != "Llama"
            ):  # of 1, or of 1 + 0, they would hide where they are applied
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    model.save_pretrained(folder)
    with torch.inference_mode():
        return [float(model(input_ids=torch.tensor([ids])).logits) for ids in texts or sequences()]


@pytest.mark.parametrize("name", MODELS)
def test_fp32_scores_equal_transformers(name: str, tmp_path: Path) -> None:
    expected = np.array(reference(name, tmp_path))
    found = lightrm.load(tmp_path, scheme="fp32").score_ids(sequences())
    assert np.abs(expected).min() > 0
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_bf16_stays_near(tmp_path: Path) -> None:
    expected = np.array(reference("llama", tmp_path))
    found = lightrm.load(tmp_path, scheme="bf16").score_ids(sequences())
    assert np.abs(found - expected).max() < 0.1 * expected.std()


def test_old_rope_spelling(tmp_path: Path) -> None:
    """transformers 4 wrote rope_theta and rope_scaling at the top level."""
    import json

    expected = reference("llama, gqa, llama3 scaling", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    path.write_text(json.dumps(config))
    np.testing.assert_allclose(lightrm.load(tmp_path).score_ids(sequences()), expected, rtol=1e-4, atol=1e-4)


def test_the_crowd_does_not_matter(tmp_path: Path) -> None:
    """A sequence scored alone and among others, in packs of any size: the same fp32 score to 1e-5."""
    reference("llama, gqa, llama3 scaling", tmp_path)
    rm = lightrm.load(tmp_path)
    alone = np.concatenate([rm.score_ids([ids]) for ids in sequences()])
    for budget in (1, 64, 100000):
        rm.token_budget = budget
        crowd = rm.score_ids(sequences()[::-1] * 2)
        np.testing.assert_allclose(crowd, np.tile(alone[::-1], 2), rtol=1e-5, atol=1e-5 * np.abs(alone).max())
