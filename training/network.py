"""The network that is trained: transformers' own LLaMA, with a value head, and its export to Ziya's layout.

Training goes through transformers on purpose: the exported weights are then scored by two independent programs.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

from lightrm.files import write_json

VOCABULARY = 6144
LONGEST = 1024  # tokens of one sequence, BOS and EOS included


def demo_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=4,
        max_position_embeddings=LONGEST,
        rms_norm_eps=1e-6,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )


class RewardNetwork(nn.Module):
    """`model.*` and `value_head.*`: the names, and the last-token rule, of Ziya's class."""

    def __init__(self) -> None:
        super().__init__()
        self.model = LlamaModel(demo_config())
        self.value_head = nn.Linear(self.model.config.hidden_size, 1)

    def hidden(self, token_ids_BL: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=token_ids_BL, use_cache=False).last_hidden_state

    def next_token_logits(self, token_ids_BL: torch.Tensor) -> torch.Tensor:
        """The embedding doubles as the output layer; it is not exported twice."""
        return nn.functional.linear(self.hidden(token_ids_BL), self.model.embed_tokens.weight)

    def value(self, hidden_BLD: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Right-padded rows: under a causal mask the pads cannot reach the last real token, so no mask is needed."""
        last_BD = hidden_BLD[torch.arange(len(lengths_B)), lengths_B - 1]
        return self.value_head(last_BD.float()).squeeze(-1)


def open_content_heads(network: RewardNetwork) -> None:
    """Start two heads of each middle layer as same-token matchers: query = key = one projection of the input.

    Short pre-training on a small corpus forms no head that finds a token again, yet stutters and off-topic answers
    are seen by just that. Weights after the idea of mimetic initialization (arXiv 2305.09828). Only the channels that
    RoPE turns slowly are used, so that distance hardly matters; a match then outweighs a chance by about e^8.
    """
    config = network.model.config
    width, head_width = config.hidden_size, config.hidden_size // config.num_attention_heads
    slow = torch.tensor([e for e in range(head_width) if e % (head_width // 2) >= head_width // 4])
    generator = torch.Generator().manual_seed(0)
    for layer in network.model.layers[1:4]:
        norm = layer.input_layernorm.weight.detach()
        scale = (8.0 * head_width**0.5 / (len(slow) * norm.square().mean())) ** 0.5
        for head in (2, 3):
            projection = torch.linalg.qr(torch.randn(width, len(slow), generator=generator))[0].T
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                rows = linear.weight.data[head * head_width : (head + 1) * head_width]
                rows.zero_()
                rows[slow] = projection * scale


def export(network: RewardNetwork, tokenizer_model: Path, folder: Path) -> None:
    """Write Ziya's files: fp16 pickle shards with an index, config, and a slow tokenizer's three files."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in network.state_dict().items()}
    names = list(weights)
    middle = next(i for i, name in enumerate(names) if name.startswith("model.layers.3."))
    weight_map = {}
    for k, part in enumerate((names[:middle], names[middle:]), 1):
        file = f"pytorch_model-{k:05d}-of-00002.bin"
        torch.save({name: weights[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    size = sum(2 * tensor.numel() for tensor in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(folder / "pytorch_model.bin.index.json", index)
    config = {
        "architectures": ["LlamaRewardModel"],
        "auto_map": {"AutoModelForSequenceClassification": "modeling_llama_rm.LlamaRewardModel"},
        "model_type": "llama",
        **{
            key: getattr(network.model.config, key)
            for key in (
                "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "max_position_embeddings", "rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id",
            )
        },
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }  # fmt: skip
    write_json(folder / "config.json", config)
    shutil.copyfile(tokenizer_model, folder / "tokenizer.model")
    write_json(folder / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    tokenizer_config = {
        "add_bos_token": True,
        "add_eos_token": True,
        "model_max_length": LONGEST,
        "tokenizer_class": "LlamaTokenizer",
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config)
