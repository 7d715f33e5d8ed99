"""Runs in auto-gptq's environment, without lightrm: FOLDER IDS.json ANSWER.pt. See `benchmarks.gptq_files`."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from auto_gptq.nn_modules.qlinear.qlinear_cuda_old import QuantLinear
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaModel


class Widened(torch.nn.Module):
    """auto-gptq's layer, whose own forward gives the weight (fp16, exact for the identity) and float32 products."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        self.register_buffer("weight_OI", layer(torch.eye(layer.infeatures, dtype=torch.float16)).T.contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight_OI.float())


@torch.inference_mode()
def main(folder: Path, ids: Path, answer: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    settings = json.loads((folder / "quantize_config.json").read_text())
    config = LlamaConfig.from_pretrained(folder)
    rope = json.loads((folder / "config.json").read_text()).get("rope_parameters")
    if rope is not None:  # a spelling of transformers 5, which transformers 4 passes over
        config.rope_theta = rope["rope_theta"]
    model = LlamaModel(config).float().eval()
    plain = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    stems = sorted({name.removesuffix(".qweight") for name in plain if name.endswith(".qweight")})
    weights = {}
    for stem in stems:
        parent, _, child = stem.rpartition(".")
        old = getattr(model.get_submodule(parent), child)
        layer = QuantLinear(settings["bits"], settings["group_size"], old.in_features, old.out_features, bias=False)
        parts = {part: plain.pop(f"{stem}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")}
        layer.load_state_dict(parts, strict=True)
        setattr(model.get_submodule(parent), child, Widened(layer))
        weights[f"model.{stem}"] = getattr(model.get_submodule(parent), child).weight_OI
    missing, unexpected = model.load_state_dict(plain, strict=False)
    assert not unexpected, unexpected
    assert all(name.endswith("weight_OI") for name in missing), missing
    stem = next(stem for stem in ("value_head", "score") if f"{stem}.weight" in tensors)
    head = tensors[f"{stem}.weight"].float()
    bias = tensors.get(f"{stem}.bias", torch.zeros(len(head))).float()
    scores = []
    for sequence in json.loads(ids.read_text()):
        hidden = model(torch.tensor([sequence])).last_hidden_state[0, -1]
        scores.append(float((head @ hidden + bias).mean()))
    versions = {name: version(name) for name in ("auto-gptq", "torch", "transformers")}
    torch.save({"weights": weights, "scores": torch.tensor(scores), "versions": versions}, answer)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
