"""Runs in llama.cpp's environment, without lightrm: FOLDER IDS.json ANSWER.npz. See `benchmarks.gguf_files`."""

import ctypes
import json
import sys
from importlib.metadata import version
from pathlib import Path

import llama_cpp
import numpy as np

LAST, WIDE = 3, 0  # the pooling type that takes the last token; float32 as a file type and as a type of the cache
MIXES = {"Q8_0": 7, "Q4_0": 2, "Q2_K": 10, "Q3_K_M": 12, "Q4_K_M": 15, "Q5_K_M": 17}


def quantize(source: Path, target: Path, kind: int) -> Path:
    """Let llama.cpp write a file of another kind."""
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread, settings.allow_requantize = kind, 1, True
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings))
    assert not failed, f"{target}: llama.cpp wrote no file"
    return target


def hidden(path: Path, sequences: list[list[int]]) -> np.ndarray:
    """Return the final hidden state of the last token of each sequence, float32 (S, D), with a float32 cache."""
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    width, found = llama_cpp.llama_model_n_embd(model), []
    for ids in sequences:
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = len(ids)
        settings.embeddings, settings.pooling_type = True, LAST
        settings.n_threads = settings.n_threads_batch = 1  # its threads wait for each other in a busy loop
        settings.flash_attn_type = settings.type_k = settings.type_v = WIDE
        context = llama_cpp.llama_init_from_model(model, settings)
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, i, 1, 0
            batch.logits[i] = 1
        assert not llama_cpp.llama_decode(context, batch)
        found.append(np.array(llama_cpp.llama_get_embeddings_seq(context, 0)[:width], dtype=np.float32))
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return np.stack(found)


def main(folder: Path, ids: Path, answer: Path) -> None:
    sequences = json.loads(ids.read_text())
    states = {"F32": hidden(folder / "F32.gguf", sequences)}
    for name, kind in MIXES.items():
        made = quantize(folder / "F32.gguf", folder / f"{name}.gguf", kind)
        # llama.cpp rounds activations where weights are quantized. So it widens the weights first.
        states[name] = hidden(quantize(made, folder / f"{name}-widened.gguf", WIDE), sequences)
    np.savez(answer, version=version("llama-cpp-python"), **states)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
