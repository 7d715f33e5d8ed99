"""Runs in GPTQModel's environment, without lightrm: FOLDER IDS.json ANSWER.pt. See `benchmarks.gptqmodel_files`."""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers


def loaded(folder: Path, dtype: torch.dtype, **more: Any) -> tuple[Any, dict[str, Any]]:
    """The class that config.json names, as transformers loads it, and the layers that GPTQModel put into it."""
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    model, info = getattr(transformers, name).from_pretrained(
        folder, local_files_only=True, dtype=dtype, output_loading_info=True, **more
    )
    assert not any(info.values()), info
    return model.eval(), {name: part for name, part in model.named_modules() if hasattr(part, "qweight")}


def scores(model: Any, sequences: list[list[int]]) -> torch.Tensor:
    return torch.tensor([float(model(torch.tensor([ids])).logits) for ids in sequences])


@torch.inference_mode()
def main(folder: Path, ids: Path, answer: Path) -> None:
    sequences = json.loads(ids.read_text())
    bits = json.loads((folder / "quantize_config.json").read_text())["bits"]
    plain = transformers.GPTQConfig(bits=bits, backend="torch")  # the layer in plain PyTorch, exact in float32
    model, layers = loaded(folder, torch.float32, quantization_config=plain)
    weights = {name: layer(torch.eye(layer.in_features)).T.contiguous() for name, layer in layers.items()}
    exact = scores(model, sequences)
    model, chosen = loaded(folder, torch.bfloat16)  # what it takes by itself
    kinds = [sorted({type(layer).__name__ for layer in found.values()}) for found in (layers, chosen)]
    versions = {name: version(name) for name in ("gptqmodel", "optimum", "transformers", "torch")}
    torch.save(
        {"weights": weights, "scores": exact, "half": scores(model, sequences), "kinds": kinds, "versions": versions},
        answer,
    )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
