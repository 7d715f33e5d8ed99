"""GGUF files under transformers' names, with the rows of query and key in transformers' order.

    token_embd, output_norm, output          model.embed_tokens, model.norm, lm_head
    blk.N.attn_q ... blk.N.ffn_down          model.layers.N.self_attn.q_proj ... mlp.down_proj
    cls.output                               score, the head
    rope_freqs.weight                        see `gguf_config`

For LLaMA, llama.cpp turns neighbouring numbers of a head, where transformers turns the two halves. So its converter
reorders the rows of query and key, and here they are put back: row (h, t, j) of H x 2 x E/2 lies at (h, j, t).

A file whose layers are all Q4_0 is `schemes.grouped` with groups of 32, zero point 8 and the same products, so w4a16
keeps its values. All other kinds are widened row by row.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from lightrm.checkpoints.gguf_config import FREQUENCIES, PERMUTED
from lightrm.checkpoints.gguf_file import GgufFile
from lightrm.checkpoints.source import PackedSource, Quantized, TensorSource
from lightrm.errors import TensorMismatchError
from lightrm.schemes.ggml import SMALL, Blocked
from lightrm.schemes.grouped import Grouped, pack_words

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head", "cls.output": "score"}
PARTS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
HEAD = "score.weight"
BLOCK = re.compile(r"blk\.(\d{1,9})\.(\w+)\.(weight|bias)")
MATRIX = re.compile(r"blk\.\d+\.(attn_(q|k|v|output)|ffn_(gate|up|down))\.weight")


class GgufSource(PackedSource):
    """The tensors of a GGUF file under transformers' names. found: the file's own name of each."""

    holds = None

    def __init__(self, file: GgufFile) -> None:
        """Raises TensorMismatchError on head counts that do not fit the tensors."""
        path = file.watched.path
        super().__init__(TensorSource([]))
        self.file = file
        self.opened = {path: file}
        self.found = {renamed(name): name for name in file.tensors if name != FREQUENCIES}
        self.names: dict[str, Path] = dict.fromkeys(self.found, path)
        family = file.settings.get("general.architecture")
        self.heads = {}
        if family in PERMUTED:
            heads = file.settings.get(f"{family}.attention.head_count")
            self.heads = {"attn_q": heads, "attn_k": file.settings.get(f"{family}.attention.head_count_kv", heads)}
        matrices = [file.tensors[name][1].name for name in file.tensors if MATRIX.fullmatch(name)]
        if matrices and set(matrices) == {"Q4_0"}:
            self.holds = "w4a16"

    def order(self, name: str, rows: int) -> torch.Tensor | None:
        """Return where each row of a tensor lies in the file; None if they are in order."""
        block = BLOCK.fullmatch(name)
        heads = None if block is None else self.heads.get(block[2])
        if heads is None:
            return None
        if not isinstance(heads, int) or heads < 1 or rows % (2 * heads):
            raise TensorMismatchError(f"{self.file.watched.path}: {name} has {rows} rows for {heads} heads")
        return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).flatten()

    def blocks(self, name: str) -> Blocked:
        """Return a tensor of the file as it is stored, with the rows in transformers' order."""
        stored = self.file.blocks(self.found[name])
        order = self.order(self.found[name], len(stored.packed))
        return stored if order is None else Blocked(stored.packed[order], stored.kind)

    def quantized(self, name: str) -> Quantized | None:
        return self.blocks(name) if len(self.shape(name)) == 2 else None

    def packed(self, name: str) -> Grouped | None:
        if self.holds is None or not MATRIX.fullmatch(self.found[name]):
            return None
        blocks = self.blocks(name)
        outputs, inputs = blocks.shape
        stored = blocks.packed.view(outputs, -1, blocks.kind.bytes)
        scale_GO = stored[:, :, :2].contiguous().view(torch.float16).view(outputs, -1).T.float()
        halves = stored[:, :, 2:]
        values_OI = torch.cat([halves & 15, halves >> 4], 2).view(outputs, inputs)
        zero_GO = torch.full(scale_GO.shape, 8, dtype=torch.int16)
        return Grouped(pack_words(values_OI, 4).T, zero_GO, scale_GO, torch.arange(inputs) // SMALL, 4)

    def packed_shape(self, name: str) -> tuple[int, int] | None:
        return None

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor widened, in float32 unless the file has it in another float dtype. Raises CorruptFileError
        or TensorMismatchError."""
        if len(self.shape(name)) == 2:
            return super().read(name)
        values = self.file.read(self.found[name])
        order = self.order(self.found[name], len(values)) if values.ndim == 1 else None
        return values if order is None else values[order]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor. llama.cpp's quantizer drops the axis of a head with one output."""
        shape = self.file.shape(self.found[name])
        return (1, *shape) if name == HEAD and len(shape) == 1 else shape

    def dtype(self, name: str) -> torch.dtype | None:
        """Return the dtype of a tensor; for blocks, bfloat16: most models are trained in it, and need its range."""
        kind = self.file.tensors[self.found[name]][1]
        return kind.dtype if kind.blocks is None else torch.bfloat16


def renamed(name: str) -> str:
    """Return transformers' name of a tensor; an unknown one keeps its own."""
    block = BLOCK.fullmatch(name)
    if block is not None and block[2] in PARTS:
        return f"model.layers.{block[1]}.{PARTS[block[2]]}.{block[3]}"
    stem, _, kind = name.rpartition(".")
    return f"{TOP[stem]}.{kind}" if stem in TOP else name
