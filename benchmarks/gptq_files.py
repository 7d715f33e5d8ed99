"""Do auto-gptq's own layers compute from the files that lightrm writes what lightrm computes?

    python -m benchmarks.gptq_files DATA [--env FOLDER] [--reference FOLDER]

auto-gptq 0.7.1 is unmaintained and wants old neighbours, so it gets an environment of its own, made here (minutes). In
it `gptq_client.py` builds transformers' LLaMA with auto-gptq's QuantLinear in the place of each packed layer and
loads the exported folder into it. Compared are every layer's weight as auto-gptq widens it, which must be equal, and
the scores of real text, computed in float32 on both sides. Writes results/gptq_files.json and the sentence in the
documents.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lightrm
from benchmarks.bundled_model import prompt_of, sample
from benchmarks.fidelity import models_of, options
from benchmarks.record import measured_on, provenance, quote, write_result
from lightrm.loading.gptq_export import export_gptq
from lightrm.schemes.grouped import Grouped
from lightrm.scorer import native

PACKAGES = (
    "torch==2.13.0", "numpy>=2", "transformers==4.40.2", "peft==0.10.0", "datasets==2.19.2", "accelerate", "rouge",
    "gekko", "sentencepiece",
)  # fmt: skip
CLIENT = Path(__file__).with_name("gptq_client.py")
PAIRS, CALIBRATION, LONGEST = 20, 40, 256


def python_of(folder: Path) -> Path:
    """The interpreter of auto-gptq's environment, made if it is not there."""
    python = folder / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "auto-gptq==0.7.1"], check=True)
    return python


def compare(python: Path, source: str, scheme: str, calibrated: bool, data: Path) -> dict[str, Any]:
    train = sample(data / "pairs_train.jsonl.gz", CALIBRATION) if calibrated else []
    pairs = [(prompt_of(r), r["chosen"]) for r in train]
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "gptq"
        export_gptq(source, folder, scheme=scheme, calibration=pairs)
        rm = lightrm.load(folder, scheme="fp32", max_length=LONGEST)
        dev = sample(data / "pairs_dev.jsonl.gz", PAIRS)
        ids = [rm.encode([prompt_of(r)], [r[side]])[0] for r in dev for side in ("chosen", "rejected")]
        (Path(root) / "ids.json").write_text(json.dumps(ids))
        subprocess.run([python, CLIENT, folder, Path(root) / "ids.json", Path(root) / "answer.pt"], check=True)
        answer = torch.load(Path(root) / "answer.pt", weights_only=True)
        ours, theirs = rm.score_ids(ids), answer["scores"].numpy()
        checkpoint, _ = native(lightrm.load(folder))
        names = {foreign.removesuffix(".weight"): ours for ours, (_, foreign) in checkpoint.tensors.items()}
        differences = []
        for stem, widened in answer["weights"].items():
            packed = checkpoint.packed(names[stem])
            assert isinstance(packed, Grouped), stem
            differences.append(float((packed.rows(0, packed.shape[0]).float() - widened.float()).abs().max()))
        return {
            "scheme": scheme,
            "calibrated": calibrated,
            "layers": len(differences),
            "weights, largest difference": max(differences),
            "answers": len(ids),
            "scores, largest difference": float(np.abs(ours - theirs).max()),
            "scores, standard deviation": float(ours.std()),
            "client": answer["versions"],
        }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--env", type=Path, default=Path("auto-gptq-env"), help="auto-gptq's environment")
    arguments = parser.parse_args()
    python = python_of(arguments.env)
    rows = [
        {"model": name, **compare(python, source, scheme, calibrated, arguments.data)}
        for name, source in models_of(arguments.reference).items()
        for scheme, calibrated in (("w4a16", False), ("w4a16-g32", True))
    ]
    write_result("gptq_files", {**provenance(("torch", "numpy", "safetensors")), "rows": rows})
    quote("gptq_files", sentence)


def sentence(result: dict[str, Any]) -> str:
    rows = result["rows"]
    layers, equal = sum(r["layers"] for r in rows), all(r["weights, largest difference"] == 0 for r in rows)
    worst = max(r["scores, largest difference"] / r["scores, standard deviation"] for r in rows)
    answers = sum(r["answers"] for r in rows)
    weights = "the same weights bit for bit" if equal else "other weights"
    scores = "are the same numbers" if worst == 0 else f"differ from lightrm's by at most {worst:.0e} of their spread"
    return (
        f"auto-gptq {rows[0]['client']['auto-gptq']}'s own layers, given files that lightrm wrote, hold {weights} as "
        f"lightrm ({layers} packed layers, two models); scores of {answers} real answers in float32, "
        f"computed from them by transformers {rows[0]['client']['transformers']}, {scores}. {measured_on(result)}\n"
    )


if __name__ == "__main__":
    main()
