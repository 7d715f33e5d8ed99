"""The same weights in every layout give the same score; renaming is tested on strings alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import lightrm
from lightrm.checkpoints import (
    beaver,
    deepspeed_chat,
    internlm2_reward,
    layout,
    openrlhf_reward,
    sequence_classification,
    value_head,
    ziya,
)  # fmt: skip
from lightrm.checkpoints.config import Config
from lightrm.checkpoints.detect import open_checkpoint
from tests.zoo import (
    HEAD_BIAS,
    HEAD_WEIGHT,
    LLAMA_CONFIG,
    WIDTH,
    Specimen,
    llama_weights,
    normal,
    specimens,
    write_weights,
)  # fmt: skip

IDS = [[5, 9, 33, 71, 2], [1, 2], [60] * 17, list(range(3, 90))]
SPECIMENS = specimens()


@pytest.fixture(scope="module")
def raw_scores(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """Scores of the backbone and the head's weight, without bias."""
    return lightrm.load(SPECIMENS["ziya without bias"].write(tmp_path_factory.mktemp("raw"))).score_ids(IDS)


@pytest.mark.parametrize("name", SPECIMENS)
def test_every_layout_gives_the_same_score(name: str, tmp_path: Path, raw_scores: np.ndarray) -> None:
    specimen = SPECIMENS[name]
    rm = lightrm.load(specimen.write(tmp_path))
    expected = raw_scores + (float(HEAD_BIAS) if specimen.bias else 0.0)
    np.testing.assert_allclose(rm.score_ids(IDS), expected, atol=1e-6, rtol=1e-6)
    assert name.split(" ", maxsplit=1)[0].split(":", maxsplit=1)[0].replace("trl", "value_head").replace(
        "deepspeed-chat", "deepspeed_chat"
    ).replace("starling", "deepspeed_chat").replace("sequence", "sequence_classification") in repr(rm)


def test_lora_adapter_is_merged_while_loading(tmp_path: Path, raw_scores: np.ndarray) -> None:
    """An unmerged adapter with value_head.bin scores like the merged weights, also through rank-stabilized scale."""
    body = llama_weights()
    rank, alpha = 4, 8
    merged, adapter = dict(body), {}
    for i, module in ((0, "self_attn.q_proj"), (1, "self_attn.v_proj"), (1, "mlp.down_proj")):
        name = f"model.layers.{i}.{module}"
        rows, columns = body[f"{name}.weight"].shape
        low, high = normal(rank, columns, seed=31), normal(rows, rank, seed=32)
        adapter[f"base_model.model.{name}.lora_A.weight"] = low
        adapter[f"base_model.model.{name}.lora_B.weight"] = high
        merged[f"{name}.weight"] = body[f"{name}.weight"] + alpha / rank * high @ low
    head = {"v_head.summary.weight": HEAD_WEIGHT, "v_head.summary.bias": HEAD_BIAS}
    expected = lightrm.load(Specimen({"model.safetensors": merged | head}, LLAMA_CONFIG).write(tmp_path / "merged"))
    Specimen({"pytorch_model.bin": body}, LLAMA_CONFIG).write(tmp_path / "base")
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_weights(folder / "adapter_model.bin", adapter)
    write_weights(folder / "value_head.bin", {k.removeprefix("v_head."): v for k, v in head.items()})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "base_model_name_or_path": "base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    rm = lightrm.load(folder)  # the base is found beside the adapter
    np.testing.assert_allclose(rm.score_ids(IDS), expected.score_ids(IDS), atol=1e-5, rtol=1e-5)
    assert np.abs(rm.score_ids(IDS) - raw_scores - 0.25).max() > 0.01, "the adapter changed something"

    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 4, "use_rslora": True}))
    np.testing.assert_allclose(lightrm.load(folder).score_ids(IDS), expected.score_ids(IDS), atol=1e-5, rtol=1e-5)

    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "gone"}))
    with pytest.raises(lightrm.CheckpointError, match="gone"):
        lightrm.load(folder)
    np.testing.assert_allclose(
        lightrm.load(folder, base=tmp_path / "base").score_ids(IDS), expected.score_ids(IDS), atol=1e-5, rtol=1e-5
    )


def test_adapter_written_by_peft(tmp_path: Path) -> None:
    """peft's own files, for a sequence classifier whose `score` head it saved among the adapter weights."""
    import peft
    import transformers

    torch.manual_seed(0)
    config = {k: v for k, v in LLAMA_CONFIG.items() if k not in ("architectures", "model_type")}
    base = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**config, num_labels=1, pad_token_id=0))
    base.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False
    )
    model = peft.get_peft_model(base, lora).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "score" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "adapter")
    with torch.inference_mode():
        expected = [float(model(input_ids=torch.tensor([ids])).logits) for ids in IDS]
    found = lightrm.load(tmp_path / "adapter", base=tmp_path / "base").score_ids(IDS)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_wrapped_model_that_peft_saved_whole(tmp_path: Path) -> None:
    """LoRA merged layer by layer, as peft's merge_and_unload once left it: the trained head is in its wrapper still, so
    the shards hold both heads."""
    import peft
    import transformers
    from safetensors import safe_open

    torch.manual_seed(1)
    config = {k: v for k, v in LLAMA_CONFIG.items() if k not in ("architectures", "model_type")}
    base = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**config, num_labels=1, pad_token_id=0))
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, lora).eval()
    inner = model.base_model.model
    with torch.no_grad():
        inner.score.modules_to_save.default.weight.normal_()
        expected = [float(model(input_ids=torch.tensor([ids])).logits) for ids in IDS]
    for layer in inner.model.layers:
        layer.self_attn.q_proj.merge()
        layer.self_attn.q_proj = layer.self_attn.q_proj.get_base_layer()
    inner.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        heads = {name for name in file.keys() if name.startswith("score")}  # noqa: SIM118
    assert heads == {"score.original_module.weight", "score.modules_to_save.default.weight"}
    rm = lightrm.load(tmp_path, scheme="fp32")
    np.testing.assert_allclose(rm.score_ids(IDS), expected, rtol=1e-4, atol=1e-5)


def test_heads_of_several_rows_are_averaged(tmp_path: Path, raw_scores: np.ndarray) -> None:
    rows = torch.cat([HEAD_WEIGHT * 3, -HEAD_WEIGHT])
    rm = lightrm.load(
        Specimen({"model.safetensors": llama_weights() | {"value_head.weight": rows}}, LLAMA_CONFIG).write(tmp_path)
    )
    np.testing.assert_allclose(rm.score_ids(IDS), raw_scores, atol=1e-5)
    assert "mean of 2 outputs" in repr(rm)


@pytest.mark.parametrize("stem", ["score", "v_head.summary"])
def test_relu_mlp_heads(stem: str, tmp_path: Path, raw_scores: np.ndarray) -> None:
    """relu(x) - relu(-x) = x: an MLP that must score like the linear head."""
    mlp = {
        f"{stem}.0.weight": torch.cat([HEAD_WEIGHT, -HEAD_WEIGHT]),
        f"{stem}.0.bias": torch.zeros(2),
        f"{stem}.2.weight": torch.tensor([[1.0, -1.0]]),
        f"{stem}.2.bias": torch.tensor([0.5]),
    }
    rm = lightrm.load(Specimen({"model.safetensors": llama_weights() | mlp}, LLAMA_CONFIG).write(tmp_path))
    np.testing.assert_allclose(rm.score_ids(IDS), raw_scores + 0.5, atol=1e-5)
    assert "ReLU MLP" in repr(rm)


@pytest.mark.parametrize(
    ("settings", "expected", "says"),
    [
        ({"score_type": "reward", "do_normalize": True}, lambda x: (x - 2.0) / 3.0, "(x - 2) / 3"),
        ({"score_type": "cost", "do_normalize": True}, lambda x: -x / 3.0, "negated: the model scores cost"),
        ({"score_type": "cost", "do_normalize": False}, lambda x: -x, "negated"),
        ({"score_type": "reward", "do_normalize": False}, lambda x: x, "no bias, raw"),
    ],
)
def test_beaver_post_steps(settings, expected, says, tmp_path: Path, raw_scores: np.ndarray) -> None:
    weights = llama_weights() | {
        "score_head.weight": HEAD_WEIGHT,
        "normalizer.mean": torch.tensor([2.0]),
        "normalizer.var": torch.tensor([9.0]),
        "normalizer.count": torch.tensor([100]),
    }
    rm = lightrm.load(Specimen({"pytorch_model.bin": weights}, {**LLAMA_CONFIG, **settings}).write(tmp_path))
    np.testing.assert_allclose(rm.score_ids(IDS), expected(raw_scores), atol=1e-5)
    assert says in repr(rm)


def test_openrlhf_normalizes_where_the_config_asks(tmp_path: Path, raw_scores: np.ndarray) -> None:
    weights = {"model.safetensors": llama_weights() | {"score.weight": HEAD_WEIGHT}}
    config = {**LLAMA_CONFIG, "value_head_prefix": "score", "mean": 0.5, "std": 2.0}
    quiet = lightrm.load(Specimen(weights, config).write(tmp_path / "raw"))
    np.testing.assert_allclose(quiet.score_ids(IDS), raw_scores, atol=1e-6)
    asked = lightrm.load(Specimen(weights, {**config, "normalize_reward": True}).write(tmp_path / "normalized"))
    np.testing.assert_allclose(asked.score_ids(IDS), (raw_scores - 0.5) / 2.0, atol=1e-6)


def test_internlm2_appends_its_reward_token(tmp_path: Path) -> None:
    specimen = SPECIMENS["internlm2"]
    assert open_checkpoint(specimen.write(tmp_path / "with")).reward_id == 77
    without = {name: value for name, value in specimen.config.items() if name != "reward_token_id"}
    with pytest.raises(lightrm.CheckpointError, match="reward_token_id"):
        lightrm.load(Specimen(specimen.files, without).write(tmp_path / "without"))


def test_baichuan_golden_scores() -> None:
    """Made by the original Baichuan-13B code; 5 heads, so that ALiBi's slopes are of both kinds."""
    folder = Path(__file__).parent / "data" / "baichuan-13b-value-head"
    cases = [json.loads(line) for line in (folder / "cases.jsonl").read_text().splitlines()]
    rm = lightrm.load(folder)
    found, expected = rm.score_ids([c["input_ids"] for c in cases]), np.array([c["score"] for c in cases])
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert "ALiBi" in repr(rm)
    assert lightrm.load(folder, alibi="absolute").score_ids([c["input_ids"] for c in cases]) == pytest.approx(
        expected, rel=1e-3
    )


def test_two_heads_must_agree(tmp_path: Path, raw_scores: np.ndarray) -> None:
    """TRL writes v_head into the shards, LLaMA-Factory value_head.bin beside them: fine if they say the same."""
    body = llama_weights() | {"v_head.summary.weight": HEAD_WEIGHT, "v_head.summary.bias": HEAD_BIAS}
    twin = {"summary.weight": HEAD_WEIGHT, "summary.bias": HEAD_BIAS}
    both = Specimen({"model.safetensors": body, "value_head.bin": twin}, LLAMA_CONFIG).write(tmp_path / "same")
    np.testing.assert_allclose(lightrm.load(both).score_ids(IDS), raw_scores + 0.25, atol=1e-6)
    other = {**twin, "summary.weight": HEAD_WEIGHT + 1}
    both = Specimen({"model.safetensors": body, "value_head.bin": other}, LLAMA_CONFIG).write(tmp_path / "other")
    with pytest.raises(lightrm.CheckpointError, match=r"summary.weight and v_head.summary.weight are the same weight"):
        lightrm.load(both)


def test_renaming_on_strings() -> None:
    block = "layers.3.self_attn.q_proj.weight"
    assert layout.backbone(f"model.{block}") == "layers.3.query.weight"
    assert layout.backbone("model.layers.3.self_attn.W_pack.weight") == "layers.3.qkv.weight"
    assert layout.backbone("model.layers.3.self_attn.rotary_emb.inv_freq") == layout.IGNORED
    assert layout.backbone("lm_head.weight") == layout.IGNORED
    assert layout.backbone("model.layers.3.mlp.experts.0.weight") is None
    assert ziya.rename("value_head.bias") == "head.0.bias"
    assert value_head.rename(f"pretrained_model.model.{block}") == "layers.3.query.weight"
    assert value_head.rename("summary.weight") == value_head.rename("v_head.summary.weight") == "head.0.weight"
    assert value_head.rename("v_head.summary.2.bias") == "head.1.bias"
    assert value_head.rename("default_head_weight") == layout.IGNORED
    named = Config({"model_type": "llama", "value_head_prefix": "reward_head"}, Path("config.json"))
    assert openrlhf_reward.LAYOUT.ours("reward_head.weight", named) == "head.0.weight"
    assert openrlhf_reward.LAYOUT.ours("score.weight", named) is None
    assert sequence_classification.rename("score.modules_to_save.default.weight") == "head.0.weight"
    assert sequence_classification.rename("score.original_module.weight") == layout.IGNORED
    assert beaver.rename("normalizer.count") == layout.IGNORED
    assert internlm2_reward.rename("model.layers.0.feed_forward.w3.weight") == "layers.0.up.weight"
    assert internlm2_reward.rename("output.weight") == layout.IGNORED
    gemma2 = Config({"model_type": "gemma2"}, Path("config.json"))
    for theirs, ours in {
        "input_layernorm": "attention_norm", "post_attention_layernorm": "attention_post_norm",
        "pre_feedforward_layernorm": "mlp_norm", "post_feedforward_layernorm": "mlp_post_norm",
    }.items():  # fmt: skip
        name = f"model.layers.1.{theirs}.weight"
        assert sequence_classification.LAYOUT.ours(name, gemma2) == f"layers.1.{ours}.weight"
    assert sequence_classification.LAYOUT.ours("model.layers.1.post_attention_layernorm.weight", named) == (
        "layers.1.mlp_norm.weight"
    )
    assert deepspeed_chat.rename("rwtranrsformer.layers.0.mlp.up_proj.weight") == "layers.0.up.weight"


def test_extended_vocabulary_is_taken_from_the_weights(tmp_path: Path) -> None:
    """Ziya's 32001 rows: the embedding is the truth, not config.json."""
    weights = llama_weights() | {"value_head.weight": HEAD_WEIGHT}
    weights["model.embed_tokens.weight"] = torch.cat([weights["model.embed_tokens.weight"], torch.ones(1, WIDTH)])
    rm = lightrm.load(Specimen({"model.safetensors": weights}, LLAMA_CONFIG).write(tmp_path))
    assert np.isfinite(rm.score_ids([[1, 96]])).all()
    with pytest.raises(lightrm.InputError, match="ids 0 to 96"):
        rm.score_ids([[97]])
