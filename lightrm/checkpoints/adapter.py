"""LoRA adapters that were never merged: `adapter_config.json`, low-rank pairs, and a head beside them.

    merged = base + scale * B @ A,   scale = alpha / r, or alpha / sqrt(r) for rank-stabilized LoRA

(arXiv 2106.09685, 2312.03732), in float32, one tensor at a time while loading. Other tensors of the adapter file
(a trained `score` head, say) replace the base's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from lightrm.checkpoints.config import read_config
from lightrm.checkpoints.source import TensorSource
from lightrm.errors import CheckpointError, TensorMismatchError, UnsupportedModelError

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
WRAPPER = "base_model.model."
LOW_RANK = re.compile(r"(.+)\.lora_(A|B)(?:\.default)?\.weight")


@dataclass(frozen=True, slots=True)
class Adapter:
    """pairs: base tensor name -> names of its A (r, I) and B (O, r); scale by base tensor name.

    replaced: base name -> name in the adapter file of a tensor it carries whole; base: where the base model was.
    """

    source: TensorSource
    pairs: dict[str, tuple[str, str]]
    scale: dict[str, float]
    replaced: dict[str, str]
    base: str | None

    def merge(self, name: str, weight_OI: torch.Tensor) -> torch.Tensor:
        """The merged weight of one base tensor, float32 where it was touched."""
        if name not in self.pairs:
            return weight_OI
        low, high = (self.source.read(part).float() for part in self.pairs[name])
        if low.shape[1] != weight_OI.shape[1] or high.shape != (weight_OI.shape[0], low.shape[0]):
            raise TensorMismatchError(
                f"LoRA pair of {name!r}: A {tuple(low.shape)} and B {tuple(high.shape)} do not fit "
                f"the base weight {tuple(weight_OI.shape)}"
            )
        return weight_OI.float() + self.scale[name] * (high @ low)


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def read_adapter(folder: Path) -> Adapter:
    """Raises CheckpointError, UnsupportedModelError or TensorMismatchError."""
    config = read_config(folder, CONFIG)
    for feature in ("use_dora", "fan_in_fan_out"):
        if config.flag(feature):
            raise UnsupportedModelError(f"{config.path}: {feature} is not supported; merge the adapter with peft first")
    if config.raw.get("peft_type", "LORA") != "LORA":
        raise UnsupportedModelError(f"{config.path}: peft_type {config.raw['peft_type']!r} is not supported, only LORA")
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{folder} has {CONFIG} but none of {', '.join(WEIGHTS)}")
    source = TensorSource([path])
    halves: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    for name in source.names:
        plain = name.removeprefix(WRAPPER)
        match = LOW_RANK.fullmatch(plain)
        if match is not None:
            halves.setdefault(f"{match[1]}.weight", {})[match[2]] = name
        elif "lora_" in plain:
            raise UnsupportedModelError(f"{path}: {name!r} is not a plain LoRA pair; merge the adapter with peft first")
        else:
            replaced[plain.replace(".modules_to_save.default", "").replace(".modules_to_save", "")] = name
    alone = [name for name, half in halves.items() if len(half) != 2]
    if alone:
        raise TensorMismatchError(f"{path}: {alone[0]!r} has only one half of its LoRA pair")
    pairs = {name: (half["A"], half["B"]) for name, half in halves.items()}
    default_alpha, patterns = config.number("lora_alpha"), config.raw.get("alpha_pattern") or {}
    scale = {}
    for name, (low, _) in pairs.items():
        rank = source.shape(low)[0]
        module = name.removesuffix(".weight")
        alpha = next((a for key, a in patterns.items() if re.search(rf"(^|\.){key}$", module)), default_alpha)
        scale[name] = float(alpha) / (rank**0.5 if config.flag("use_rslora") else rank)
    base = config.raw.get("base_model_name_or_path")
    return Adapter(source, pairs, scale, replaced, base if isinstance(base, str) and base else None)
