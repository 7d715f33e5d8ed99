"""Do transformers, optimum and GPTQModel compute from the files that lightrm writes what lightrm computes?

    python -m benchmarks.gptqmodel_files [--env FOLDER]

As `benchmarks.gptq_files`, with the tools that took auto-gptq's place, for LLaMA and Qwen3 in 4 and 8 bits. The models
are random, written by transformers; the files are loaded by transformers' own class in an environment made here
(minutes). Compared are every layer's weight as GPTQModel widens it, which must be equal, and the scores of random ids,
computed in float32 on both sides. Beside them: how far the scores move in bfloat16, in the layers that GPTQModel takes
by itself, and in lightrm's w4a16. Writes results/gptqmodel_files.json and the sentence in the documents.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import lightrm
from benchmarks.record import measured_on, provenance, quote, write_result
from lightrm.loading.gptq_export import export_gptq
from lightrm.schemes.grouped import Grouped
from lightrm.scorer import native

PACKAGES = (
    "torch==2.13.0", "transformers==5.24.0", "accelerate==1.15.0", "optimum==2.3.0", "gptqmodel==7.6.0",
)  # fmt: skip
CLIENT = Path(__file__).with_name("gptqmodel_client.py")
SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 1000, "num_labels": 1, "pad_token_id": 0, "initializer_range": 0.08,
}  # fmt: skip
MODELS = {"Llama": SIZES, "Qwen3": SIZES | {"head_dim": 64}}
SCHEMES = ("w4a16", "w4a16-g32", "w8a16")
TEXTS, LONGEST = 40, 200


def python_of(folder: Path) -> Path:
    """The interpreter of GPTQModel's environment, made if it is not there."""
    python = folder / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
    return python


def made(name: str, folder: Path) -> Path:
    """A random model, written by transformers."""
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    getattr(transformers, f"{name}ForSequenceClassification")(config).save_pretrained(folder)
    return folder


def compare(python: Path, source: Path, scheme: str, root: Path) -> dict[str, Any]:
    draw = np.random.default_rng(2)
    ids = [draw.integers(1, SIZES["vocab_size"], draw.integers(2, LONGEST)).tolist() for _ in range(TEXTS)]
    folder, asked, answered = root / scheme, root / "ids.json", root / "answer.pt"
    export_gptq(source, folder, scheme=scheme)
    asked.write_text(json.dumps(ids))
    subprocess.run([python, CLIENT, folder, asked, answered], check=True, capture_output=True)
    answer = torch.load(answered, weights_only=True)
    rm = lightrm.load(folder, scheme="fp32")
    ours, theirs = rm.score_ids(ids), answer["scores"].numpy()
    checkpoint, _ = native(lightrm.load(folder))
    names = {foreign.removesuffix(".weight"): ours for ours, (_, foreign) in checkpoint.tensors.items()}
    differences = []
    for stem, widened in answer["weights"].items():
        packed = checkpoint.packed(names[stem])
        assert isinstance(packed, Grouped), stem
        differences.append(float((packed.rows(0, packed.shape[0]).float() - widened).abs().max()))
    spread = float(ours.std())
    return {
        "scheme": scheme,
        "layers": len(differences),
        "layer": answer["kinds"],
        "weights, largest difference": max(differences),
        "texts": len(ids),
        "scores, largest difference": float(np.abs(ours - theirs).max()),
        "scores, standard deviation": spread,
        "bfloat16 of GPTQModel, error": float(np.std(answer["half"].numpy() - ours)) / spread,
        "bfloat16 of lightrm, error": float(np.std(lightrm.load(folder).score_ids(ids) - ours)) / spread,
        "client": answer["versions"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, default=Path("gptqmodel-env"), help="GPTQModel's environment")
    python = python_of(parser.parse_args().env)
    rows = []
    for name in MODELS:
        with tempfile.TemporaryDirectory() as root:
            source = made(name, Path(root) / "source")
            rows += [{"model": name, **compare(python, source, scheme, Path(root))} for scheme in SCHEMES]
    write_result("gptqmodel_files", {**provenance(("torch", "numpy", "transformers", "safetensors")), "rows": rows})
    quote("gptqmodel_files", sentence)


def sentence(result: dict[str, Any]) -> str:
    rows = result["rows"]
    layers, equal = sum(r["layers"] for r in rows), all(r["weights, largest difference"] == 0 for r in rows)
    worst = max(r["scores, largest difference"] / r["scores, standard deviation"] for r in rows)
    texts, client = sum(r["texts"] for r in rows), rows[0]["client"]
    half = " and ".join(f"{max(r[f'bfloat16 of {who}, error'] for r in rows):.1%}" for who in ("GPTQModel", "lightrm"))
    return (
        f"transformers {client['transformers']} with optimum {client['optimum']} and GPTQModel {client['gptqmodel']}, "
        "given files that lightrm wrote of a random LLaMA and a random Qwen3 in 4 and 8 bits, holds "
        f"{'the same weights bit for bit' if equal else 'other weights'} as lightrm ({layers} packed layers). Scores "
        f"of {texts} random texts in float32 differ from lightrm's by at most {worst:.0e} of their spread. In "
        "bfloat16, in the layers that GPTQModel takes by itself and in lightrm's w4a16, they move by up to "
        f"{half} of it. "
        f"{measured_on(result)}\n"
    )


if __name__ == "__main__":
    main()
