"""LoRA (arXiv 2106.09685) on every linear layer of a LLaMA, and the folder it is saved as.

y = W x + alpha / r * B A x with A (r, I) and B (O, r) trained in float32, W frozen in bfloat16. Saved with peft's
tensor names beside a `value_head.safetensors` with LLaMA-Factory's, as its reward training leaves them.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

RANK, ALPHA = 8, 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LowRank(nn.Module):
    """One frozen linear layer with a trained update of rank RANK, which starts at zero."""

    def __init__(self, frozen: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight_OI", frozen.weight.detach().bfloat16(), persistent=False)
        self.low_RI = nn.Parameter(torch.randn(RANK, frozen.in_features) / frozen.in_features**0.5)
        self.high_OR = nn.Parameter(torch.zeros(frozen.out_features, RANK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x_TI = x.flatten(0, -2).bfloat16()
        update_TR = x_TI @ self.low_RI.bfloat16().T
        scaled_RO = (ALPHA / RANK * self.high_OR).bfloat16().T
        return torch.addmm(x_TI @ self.weight_OI.T, update_TR, scaled_RO).view(*x.shape[:-1], -1)


def with_updates(model: nn.Module) -> nn.ModuleDict:
    """Freezes a LlamaModel and puts a LowRank in the place of each linear layer; all of them, by name with slashes."""
    model.requires_grad_(False)
    trained = nn.ModuleDict()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in TARGETS:
            update = LowRank(module)
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, update)
            trained[name.replace(".", "/")] = update
    return trained


def save_adapter(trained: nn.ModuleDict, head: nn.Linear, folder: Path) -> None:
    """The adapter in half precision, the head in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, update in trained.items():
        if isinstance(update, LowRank):
            key = f"base_model.model.model.{name.replace('/', '.')}"
            tensors[f"{key}.lora_A.weight"] = update.low_RI.detach().half().contiguous()
            tensors[f"{key}.lora_B.weight"] = update.high_OR.detach().half().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    weight = head.weight.detach().float().contiguous()
    # Comparisons know no zero, and transformers' classifiers have no bias: with none, all layouts score alike.
    weights = {"v_head.summary.weight": weight, "v_head.summary.bias": torch.zeros(1)}
    save_file(weights, folder / "value_head.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "base", "r": RANK,
        "lora_alpha": ALPHA, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "target_modules": list(TARGETS),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
