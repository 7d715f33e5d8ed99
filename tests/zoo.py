"""Tiny checkpoints in every layout, made from one set of weights: what the layout tests compare."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file

VOCABULARY, WIDTH, FFN, HEADS, KV_HEADS, LAYERS = 96, 32, 48, 4, 2, 2
HEAD_WIDTH = WIDTH // HEADS
LLAMA_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaRewardModel"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
Weights = dict[str, torch.Tensor]


def normal(*shape: int, seed: int, scale: float = 0.3) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def llama_weights(seed: int = 0) -> Weights:
    """A backbone under the names that transformers gives it."""
    weights = {
        "model.embed_tokens.weight": normal(VOCABULARY, WIDTH, seed=seed, scale=1.0),
        "model.norm.weight": 1 + normal(WIDTH, seed=seed + 1, scale=0.1),
    }
    shapes = {
        "self_attn.q_proj": (WIDTH, WIDTH),
        "self_attn.k_proj": (KV_HEADS * HEAD_WIDTH, WIDTH),
        "self_attn.v_proj": (KV_HEADS * HEAD_WIDTH, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (FFN, WIDTH),
        "mlp.up_proj": (FFN, WIDTH),
        "mlp.down_proj": (WIDTH, FFN),
    }
    for i in range(LAYERS):
        prefix = f"model.layers.{i}."
        for k, (name, shape) in enumerate(shapes.items()):
            weights[f"{prefix}{name}.weight"] = normal(*shape, seed=seed + 100 * (i + 1) + k)
        weights[f"{prefix}input_layernorm.weight"] = 1 + normal(WIDTH, seed=seed + 7, scale=0.1)
        weights[f"{prefix}post_attention_layernorm.weight"] = 1 + normal(WIDTH, seed=seed + 8, scale=0.1)
    return weights


HEAD_WEIGHT = normal(1, WIDTH, seed=5000)
HEAD_BIAS = torch.tensor([0.25])


@dataclass(frozen=True)
class Specimen:
    """One layout's files. scores equal `scale * (raw + shift)`, where raw has no bias unless `bias` is set."""

    files: dict[str, Weights]
    config: dict[str, Any]
    bias: bool = False
    extra: dict[str, Any] | None = None

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        for name, weights in self.files.items():
            write_weights(folder / name, weights)
        for name, value in (self.extra or {}).items():
            (folder / name).write_text(json.dumps(value))
        return folder


def write_weights(path: Path, weights: Weights) -> None:
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path)


def prefixed(weights: Weights, prefix: str, strip: str = "") -> Weights:
    return {prefix + name.removeprefix(strip): tensor for name, tensor in weights.items()}


def sharded(weights: Weights, kind: str) -> tuple[dict[str, Weights], dict[str, Any]]:
    """Two shards and their index, as transformers writes them."""
    stem, ending = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    names = sorted(weights)
    files, weight_map = {}, {}
    for k, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"{stem}-{k:05d}-of-00002.{ending}"
        files[file] = {name: weights[name] for name in part}
        weight_map |= dict.fromkeys(part, file)
    return files, {f"{stem}.{ending}.index.json": {"metadata": {}, "weight_map": weight_map}}


def internlm2_names(weights: Weights, kv_heads: int = KV_HEADS, head_width: int = HEAD_WIDTH) -> Weights:
    """The same backbone under InternLM2's names, wqkv grouped by key/value head."""
    blocks = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
    }
    renamed = {
        "model.tok_embeddings.weight": weights["model.embed_tokens.weight"],
        "model.norm.weight": weights["model.norm.weight"],
    }
    for i in range(LAYERS):
        prefix = f"model.layers.{i}."
        for theirs, ours in blocks.items():
            renamed[f"{prefix}{ours}.weight"] = weights[f"{prefix}{theirs}.weight"]
        qkv = (weights[f"{prefix}self_attn.{part}_proj.weight"] for part in "qkv")
        groups = [part.unflatten(0, (kv_heads, -1, head_width)) for part in qkv]
        renamed[f"{prefix}attention.wqkv.weight"] = torch.cat(groups, 1).flatten(0, 2)
    return renamed


def specimens() -> dict[str, Specimen]:
    """Every layout with a linear head, from the same backbone and head weights."""
    body = llama_weights()
    lm_head = {"lm_head.weight": normal(VOCABULARY, WIDTH, seed=9)}
    summary = {"summary.weight": HEAD_WEIGHT, "summary.bias": HEAD_BIAS}
    v_summary = prefixed(summary, "v_head.")
    inv_freq = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(HEAD_WIDTH // 2) for i in range(LAYERS)}
    ziya = body | {"value_head.weight": HEAD_WEIGHT, "value_head.bias": HEAD_BIAS} | inv_freq
    ziya_bin, ziya_bin_index = sharded(ziya, "bin")
    ziya_st, ziya_st_index = sharded(ziya, "safetensors")
    wrapper = prefixed(body | lm_head, "pretrained_model.") | v_summary | {"reward_head_weight": HEAD_WEIGHT}
    classify = {**LLAMA_CONFIG, "architectures": ["LlamaForSequenceClassification"]}
    rlhf = body | {"score.weight": HEAD_WEIGHT}
    internlm2 = {**LLAMA_CONFIG, "model_type": "internlm2", "bias": False, "reward_token_id": 77}
    beaver = {**LLAMA_CONFIG, "score_type": "reward", "do_normalize": False}
    return {
        "ziya": Specimen({"pytorch_model.bin": ziya}, LLAMA_CONFIG, bias=True),
        "ziya sharded bin": Specimen(ziya_bin, LLAMA_CONFIG, bias=True, extra=ziya_bin_index),
        "ziya sharded safetensors": Specimen(ziya_st, LLAMA_CONFIG, bias=True, extra=ziya_st_index),
        "ziya without bias": Specimen({"model.safetensors": body | {"value_head.weight": HEAD_WEIGHT}}, LLAMA_CONFIG),
        "trl 1: value_head.bin": Specimen(
            {"pytorch_model.bin": body | lm_head, "value_head.bin": summary}, LLAMA_CONFIG, bias=True
        ),
        "trl 2: v_head in the shards": Specimen(
            {"model.safetensors": body | lm_head | v_summary}, LLAMA_CONFIG, bias=True
        ),
        "trl 3: saved wrapper": Specimen({"pytorch_model.bin": wrapper}, LLAMA_CONFIG, bias=True),
        "trl 5: value_head.safetensors": Specimen(
            {"model.safetensors": body | lm_head, "value_head.safetensors": v_summary}, LLAMA_CONFIG, bias=True
        ),
        "sequence classification": Specimen({"model.safetensors": rlhf}, classify),
        "openrlhf new": Specimen({"model.safetensors": rlhf}, {**LLAMA_CONFIG, "value_head_prefix": "score"}),
        "openrlhf old": Specimen(
            {"model.safetensors": body | {"value_head.weight": HEAD_WEIGHT}},
            {**LLAMA_CONFIG, "value_head_prefix": "value_head"},
        ),
        "ultrarm": Specimen({"pytorch_model.bin": body | {"regression_head.weight": HEAD_WEIGHT}}, LLAMA_CONFIG),
        "beaver": Specimen({"pytorch_model.bin": body | {"score_head.weight": HEAD_WEIGHT}}, beaver),
        "internlm2": Specimen({"model.safetensors": internlm2_names(body) | {"v_head.weight": HEAD_WEIGHT}}, internlm2),
        "deepspeed-chat": Specimen(
            {"pytorch_model.bin": prefixed(body, "rwtranrsformer.", strip="model.") | {"v_head.weight": HEAD_WEIGHT}},
            LLAMA_CONFIG,
        ),
        "starling": Specimen(
            {"pytorch_model.bin": prefixed(body, "transformer.") | {"v_head.weight": HEAD_WEIGHT}}, LLAMA_CONFIG
        ),
    }


def write_tokenizer(folder: Path, special_map: dict[str, str] | None = None, **config: Any) -> None:
    """A tiny sentencepiece vocabulary of LLaMA's kind, with chat markers among its user-defined pieces."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(tiny_sentencepiece())
    (folder / "special_tokens_map.json").write_text(
        json.dumps(special_map or {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **config}))


def tiny_sentencepiece(size: int = 340) -> bytes:
    from io import BytesIO

    target = BytesIO()
    texts = ["Human: what is the weather today?", "Assistant: it is sunny and warm.", "你好，今天天气很好。"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=target,
        model_type="bpe",
        vocab_size=size,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        user_defined_symbols=["<reserved_102>", "<reserved_103>", "<p>"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return target.getvalue()
