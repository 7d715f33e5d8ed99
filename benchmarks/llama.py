"""llama.cpp as a peer: a checkpoint written as GGUF, quantized by llama.cpp itself, scored through its embeddings."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from lightrm.engine.packing import common_prefix

NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
TOKENS = 4096  # of the longest sequence


def write_gguf(folder: Path) -> Path:
    """FOLDER/model.gguf in fp16, query and key rows in the order that llama.cpp's RoPE wants."""
    import gguf

    target = folder / "model.gguf"
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    heads, width = config["num_attention_heads"], config["hidden_size"]
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"].astype(np.float32))
    for i in range(config["num_hidden_layers"]):
        for theirs, name in NAMES.items():
            tensor = weights[f"model.layers.{i}.{theirs}.weight"]
            if name in ("attn_q", "attn_k"):
                tensor = tensor.reshape(heads, 2, -1, width).swapaxes(1, 2).reshape(tensor.shape)
            writer.add_tensor(f"blk.{i}.{name}.weight", tensor.astype(np.float32) if tensor.ndim == 1 else tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


class LlamaScorer:
    """Last hidden states as llama.cpp's embeddings, then the checkpoint's own head. keeps: what a sequence begins with
    stays in llama.cpp's memory if the one before began with it too."""

    def __init__(self, folder: Path, kind: str, threads: int, keeps: bool = False) -> None:
        self.keeps, self.before = keeps, np.zeros(0, np.int64)
        import llama_cpp

        self.c = c = llama_cpp
        source, file = folder / "model.gguf", folder / f"model-{kind}.gguf"
        if not source.exists():
            write_gguf(folder)
        silent = c.llama_log_callback(lambda level, text, data: None)
        c.llama_log_set(silent, ctypes.c_void_p(0))
        self.silent = silent
        c.llama_backend_init()
        if not file.exists():
            wanted = c.llama_model_quantize_default_params()
            wanted.ftype = getattr(c, f"LLAMA_FTYPE_MOSTLY_{kind}")
            if c.llama_model_quantize(str(source).encode(), str(file).encode(), ctypes.byref(wanted)):
                raise RuntimeError(f"llama.cpp could not quantize to {kind}")
        self.model = c.llama_model_load_from_file(str(file).encode(), c.llama_model_default_params())
        settings = c.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = TOKENS
        settings.n_threads = settings.n_threads_batch = threads
        settings.embeddings = True
        settings.pooling_type = c.LLAMA_POOLING_TYPE_LAST
        self.context = c.llama_init_from_model(self.model, settings)
        self.head = load_file(folder / "model.safetensors")["score.weight"].astype(np.float32)[0]
        built = c.llama_print_system_info().decode()
        features = [name for name in ("AMX_INT8", "AVX512_VNNI", "AVX_VNNI", "NEON") if f"{name} = 1" in built]
        self.kernel = f"llama.cpp, {', '.join(features) or 'plain'}"

    def score(self, texts: list[np.ndarray]) -> np.ndarray:
        """One sequence after the other: in a batch of several, its attention runs over the cells of all."""
        self.before = np.zeros(0, np.int64)  # what an earlier call has scored does not count
        return np.array([self.one(ids) for ids in texts], np.float32)

    def one(self, ids: np.ndarray) -> float:
        c = self.c
        kept = min(common_prefix(ids, self.before), len(ids) - 1) if self.keeps else 0
        batch = c.llama_batch_init(len(ids), 0, 1)
        for row, token in enumerate(ids[kept:]):
            batch.token[row], batch.pos[row] = int(token), kept + row
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, 0
            batch.logits[row] = True
        batch.n_tokens = len(ids) - kept
        if kept:
            c.llama_memory_seq_rm(c.llama_get_memory(self.context), 0, kept, -1)
        else:
            c.llama_memory_clear(c.llama_get_memory(self.context), True)
        self.before = ids
        if c.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        state = np.ctypeslib.as_array(c.llama_get_embeddings_seq(self.context, 0), (len(self.head),))
        c.llama_batch_free(batch)
        return float(state @ self.head)
