"""OpenVINO as a peer: a checkpoint converted from transformers, its weights rounded to int8 as optimum-intel does.

    python -m benchmarks.openvino_runtime FOLDER        writes FOLDER/openvino.xml, in a process of its own

OpenVINO's CPU plugin rounds the activations of compressed layers to int8 by groups of a row, and computes what lies
between the products in bfloat16 where the CPU multiplies it. Its default are groups of 32; on CPUs with VNNI wider ones
are faster, 256 the fastest of 32, 128, 256, 1024, 4096.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

FILE, FASTEST_GROUP = "openvino.xml", 256
States = Callable[[np.ndarray, np.ndarray], np.ndarray]


class LastStates(torch.nn.Module):
    """What is converted: ids (B, L), padded on the right, and the places (B,) of the last tokens, to states (B, D)."""

    def __init__(self, body: torch.nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, ids_BL: torch.Tensor, last_B: torch.Tensor) -> torch.Tensor:
        states_BLD = self.body(ids_BL, use_cache=False).last_hidden_state
        return states_BLD[torch.arange(ids_BL.shape[0]), last_B]


def causal(module, query, key, value, mask, **settings):  # as transformers calls it
    """Attention without a mask: padding on the right comes after all that is asked for."""
    attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    return attended.transpose(1, 2).contiguous(), None


def write_openvino(folder: Path) -> None:
    import nncf
    import openvino
    import transformers

    transformers.AttentionInterface.register("causal", causal)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="causal"
    ).eval()
    example = (torch.ones(2, 8, dtype=torch.long), torch.tensor([7, 6]))
    with torch.no_grad():
        graph = openvino.convert_model(LastStates(model.model), example_input=example, input=[([-1, -1],), ([-1],)])
    openvino.save_model(nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM), folder / FILE)


def last_states(folder: Path, group: int | None) -> States:
    """group: how many activations share a scale, OpenVINO's default if None."""
    import openvino

    if not (folder / FILE).exists():
        command = [sys.executable, "-m", "benchmarks.openvino_runtime", str(folder)]
        subprocess.run(command, check=True, stdout=sys.stderr)
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    if group:
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = group
    request = openvino.compile_model(folder / FILE, "CPU", settings).create_infer_request()

    def run(ids_BL: np.ndarray, last_B: np.ndarray) -> np.ndarray:
        return request.infer([ids_BL, last_B])[0]

    return run


if __name__ == "__main__":
    write_openvino(Path(sys.argv[1]))
