"""The reference model's parts: the adapter that is kept here, on weights of the right shapes, and what made it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import lightrm
from training.lowrank import LowRank, save_adapter, with_updates
from training.rebuild import ADAPTER
from training.smollm2 import off_the_grid

SHAPE = {
    "vocab_size": 500, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "max_position_embeddings": 8192,
    "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
IDS = [[5, 9, 33, 71, 2], [7] * 40, list(range(3, 90))]


def test_the_adapter_folder_loads_as_peft_loads_it(tmp_path: Path) -> None:
    """LoRA and value head beside a base of its shapes (random weights): the layout that LLaMA-Factory leaves."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()
    model.save_pretrained(tmp_path / "base")
    adapted = peft.PeftModel.from_pretrained(model, ADAPTER).eval()
    head = load_file(ADAPTER / "value_head.safetensors")["v_head.summary.weight"]
    with torch.no_grad():
        wanted = [
            float(adapted.base_model.model.model(torch.tensor([ids])).last_hidden_state[0, -1] @ head[0]) for ids in IDS
        ]
    rm = lightrm.load(ADAPTER, base=tmp_path / "base", scheme="fp32")
    assert "value_head" in repr(rm)
    np.testing.assert_allclose(rm.score_ids(IDS), wanted, atol=1e-3, rtol=1e-3)
    assert np.std(wanted) > 0.01


def test_no_weight_stays_on_the_grid() -> None:
    rng = np.random.Generator(np.random.PCG64(0))
    levels, scale = torch.randint(0, 16, (8, 64), generator=torch.Generator().manual_seed(0)), 0.25
    levels.view(8, 2, 32)[..., 0], levels.view(8, 2, 32)[..., 1] = 0, 15
    stored = levels * scale - 1
    moved = off_the_grid(stored, rng)
    assert ((moved - stored).abs() <= scale / 2 + 1e-6).all()
    torch.testing.assert_close(((moved + 1) / scale).round(), levels.float())
    assert ((moved - stored).abs() > 1e-3).float().mean() > 0.95
    with pytest.raises(ValueError, match="not 16 levels"):
        off_the_grid(moved, rng)


def test_low_rank_updates_start_at_nothing_and_are_saved_as_peft_names_them(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small = SHAPE | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                     "num_key_value_heads": 2}  # fmt: skip
    model = transformers.LlamaModel(transformers.LlamaConfig(**small)).eval().bfloat16()
    with torch.no_grad():
        before = model(torch.tensor([IDS[0]])).last_hidden_state
        trained = with_updates(model)
        torch.testing.assert_close(model(torch.tensor([IDS[0]])).last_hidden_state, before)
    assert len(trained) == 14
    assert all(isinstance(update, LowRank) for update in trained.values())
    save_adapter(trained, torch.nn.Linear(32, 1), tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert names["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"].shape == (8, 48)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 8
    assert float(load_file(tmp_path / "value_head.safetensors")["v_head.summary.bias"]) == 0


def test_a_group_in_one_row_is_every_answer_alone() -> None:
    """Training computes a prompt once: each answer sees the prompt and itself, at the places it has alone."""
    transformers = pytest.importorskip("transformers")
    from training.reference import Group, laid_out

    torch.manual_seed(0)
    model = transformers.LlamaModel(
        transformers.LlamaConfig(
            vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        )
    ).eval()
    groups = [Group([5, 9, 33], [[7, 8], [11, 12, 13, 14], [2]], []), Group([4] * 9, [[6], [1, 2, 3]], [])]
    ids, positions, visible, ends = laid_out(groups)
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).last_hidden_state
        alone = [
            model(torch.tensor([group.prompt + answer])).last_hidden_state[0, -1]
            for group in groups
            for answer in group.answers
        ]
    rows, columns = zip(*ends, strict=True)
    torch.testing.assert_close(packed[list(rows), list(columns)], torch.stack(alone), atol=1e-4, rtol=1e-4)
