"""Does lightrm compute from llama.cpp's files what llama.cpp computes?

    python -m benchmarks.gguf_files DATA [--env FOLDER]

The bundled model is written as GGUF in float32, without its head, which llama.cpp does not load for LLaMA. In an
environment of its own, made here (it compiles llama.cpp, tens of minutes), `llama_cpp_client.py` lets llama.cpp
quantize that file in several ways, widen each again, and compute the last token's hidden state of real texts. The head
is added to the quantized files here, and lightrm scores the same ids in float32. Writes results/gguf_files.json and
the sentence in the documents.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import lightrm
from benchmarks.bundled_model import prompt_of, sample
from benchmarks.record import measured_on, provenance, quote, write_result
from lightrm.checkpoints.checkpoint import Checkpoint

CLIENT = Path(__file__).with_name("llama_cpp_client.py")
PACKAGE = "llama-cpp-python==0.3.36"
PAIRS = 20
TOP = {"embedding": "token_embd", "final_norm": "output_norm", "head.0": "cls.output"}
PARTS = {
    "query": "attn_q", "key": "attn_k", "value": "attn_v", "output": "attn_output", "attention_norm": "attn_norm",
    "mlp_norm": "ffn_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip


def python_of(folder: Path) -> Path:
    """The interpreter of llama.cpp's environment, made if it is not there."""
    python = folder / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", PACKAGE], check=True)
    return python


def named(ours: str) -> str:
    """llama.cpp's name of a tensor."""
    block = re.fullmatch(r"layers\.(\d+)\.(\w+)\.weight", ours)
    stem, _, kind = ours.rpartition(".")
    return f"blk.{block[1]}.{PARTS[block[2]]}.weight" if block else f"{TOP[stem]}.{kind}"


def tensors_of(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """The model's tensors as llama.cpp's converter writes them: query and key in the order of neighbouring pairs."""
    found = {}
    for ours in checkpoint.tensors:
        tensor = checkpoint.read(ours).float()
        if ours.endswith((".query.weight", ".key.weight")):
            heads = len(tensor) // checkpoint.architecture.head_width
            tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        found[named(ours)] = tensor.contiguous().numpy()
    return found


def write(path: Path, checkpoint: Checkpoint, tensors: Mapping[str, np.ndarray]) -> None:
    import gguf

    a, writer = checkpoint.architecture, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(a.layers)
    writer.add_context_length(a.max_positions)
    writer.add_embedding_length(a.width)
    writer.add_feed_forward_length(a.ffn_width)
    writer.add_head_count(a.query_heads)
    writer.add_head_count_kv(a.kv_heads)
    writer.add_rope_dimension_count(a.head_width)
    writer.add_layer_norm_rms_eps(a.norm_eps)
    writer.add_vocab_size(a.vocabulary)
    writer.add_tokenizer_model("none")
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    finish(writer)


def with_head(source: Path, target: Path, head: Mapping[str, np.ndarray]) -> Path:
    """Copy a file as it is, and add the tensors of a head."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, values in head.items():
        writer.add_tensor(name, values)
    finish(writer)
    return target


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def compare(python: Path, data: Path) -> list[dict[str, Any]]:
    import gguf

    rm = lightrm.load("demo", scheme="fp32")
    dev = sample(data / "pairs_dev.jsonl.gz", PAIRS)
    ids = [rm.encode([prompt_of(r)], [r[side]])[0] for r in dev for side in ("chosen", "rejected")]
    every = tensors_of(rm.checkpoint)
    head = {name: values for name, values in every.items() if name.startswith("cls.")}
    rows = []
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        write(folder / "F32.gguf", rm.checkpoint, {name: v for name, v in every.items() if name not in head})
        (folder / "ids.json").write_text(json.dumps(ids))
        answer = folder / "answer.npz"
        subprocess.run([python, CLIENT, folder, folder / "ids.json", answer], check=True, stderr=subprocess.DEVNULL)
        states = dict(np.load(answer))
        told = str(states.pop("version"))
        for name, state_SD in states.items():
            path = with_head(folder / f"{name}.gguf", folder / f"{name}-scored.gguf", head)
            kinds = sorted({tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors})
            theirs = state_SD @ head["cls.output.weight"][0] + head.get("cls.output.bias", np.zeros(1))
            ours = lightrm.load(path, scheme="fp32").score_ids(ids)
            rows.append({
                "file": name, "kinds": kinds, "answers": len(ids), "client": {"llama-cpp-python": told},
                "scores, largest difference": float(np.abs(ours - theirs).max()),
                "scores, standard deviation": float(ours.std()),
            })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--env", type=Path, default=Path("llama-cpp-env"), help="llama.cpp's environment")
    arguments = parser.parse_args()
    rows = compare(python_of(arguments.env), arguments.data)
    write_result("gguf_files", {**provenance(("torch", "numpy", "gguf")), "rows": rows})
    quote("gguf_files", sentence)


def sentence(result: dict[str, Any]) -> str:
    rows = result["rows"]
    worst = max(r["scores, largest difference"] / r["scores, standard deviation"] for r in rows)
    return (
        f"llama.cpp (llama-cpp-python {rows[0]['client']['llama-cpp-python']}) wrote the bundled model as "
        f"{', '.join(r['file'] for r in rows)}. From the weights that it widens again itself, its scores of "
        f"{rows[0]['answers']} real answers differ from lightrm's of the quantized files by at most {worst:.0e} of "
        f"their spread. {measured_on(result)}\n"
    )


if __name__ == "__main__":
    main()
