"""The forward pass over packed tokens. Reads like the paper; knows nothing of files, quantization or text.

    x = embed(ids)
    for each layer:  x += o(attention(qkv(norm(x))));  x += down(silu(gate(h)) * up(h)), h = norm(x)
    norm(x) at the last token of each sequence

Shapes: T tokens in a pack, S sequences, D width, H query heads, J key/value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lightrm import ops
from lightrm.architecture import Alibi, Architecture, Rope
from lightrm.linear import Heads, Linear, Rotation, Stream, settled
from lightrm.packing import PackedBatch
from lightrm.positions import alibi_slopes, inverse_frequencies, rope_tables

Watch = Callable[[str, torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class Layer:
    """One block's weights; `qkv` is query, key, value rows in this order, `gate_up` gate rows, then up rows.

    A norm is None where its weight was folded into the layer that reads it.
    """

    attention_norm_D: torch.Tensor | None
    qkv: Linear
    output: Linear
    mlp_norm_D: torch.Tensor | None
    gate_up: Linear
    down: Linear


class Decoder:
    """A decoder that returns one hidden state a sequence: there is no output layer and no generation."""

    def __init__(
        self,
        architecture: Architecture,
        embedding_VD: torch.Tensor,
        layers: list[Layer],
        final_norm_D: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.architecture = architecture
        self.embedding_VD = embedding_VD
        self.layers = layers
        self.final_norm_D = final_norm_D
        self.dtype = dtype
        positions, device = architecture.positions, embedding_VD.device
        self.frequency = self.slopes_H = None
        if isinstance(positions, Rope):
            self.frequency = inverse_frequencies(positions, architecture.head_width).to(device)
        else:
            self.slopes_H = alibi_slopes(architecture.query_heads).to(device)
        self.absolute_bias = isinstance(positions, Alibi) and positions.table == "absolute"

    @property
    def bytes(self) -> int:
        """Of the weights as held."""
        vectors = [self.embedding_VD, self.final_norm_D]
        vectors += [norm for layer in self.layers for norm in (layer.attention_norm_D, layer.mlp_norm_D)]
        linears = [linear for layer in self.layers for linear in (layer.qkv, layer.output, layer.gate_up, layer.down)]
        return sum(v.nbytes for v in vectors if v is not None) + sum(linear.bytes for linear in linears)

    @torch.inference_mode()
    def last_hidden(self, batch: PackedBatch, watch: Watch | None = None) -> torch.Tensor:
        """Normed hidden state at the end of each sequence, (S, D), in the compute dtype.

        watch: called with a name and the residual stream after each half of each layer, to find where it broke.
        """
        rotation = self.rotation(batch)
        paths = ops.paths(batch.segments, self.embedding_VD)
        stream: Stream = self.embedding_VD[batch.token_ids_T].to(self.dtype)
        for i, layer in enumerate(self.layers):
            stream = self.attend(layer, stream, rotation, paths)
            if watch is not None:
                stream = settled(stream)
                watch(f"layers.{i}.attention", stream)
            stream = self.think(layer, stream)
            if watch is not None:
                stream = settled(stream)
                watch(f"layers.{i}.mlp", stream)
        return ops.norm_rows(settled(stream), batch.last_S, self.final_norm_D, self.architecture.norm_eps)

    def rotation(self, batch: PackedBatch) -> Rotation:
        return None if self.frequency is None else rope_tables(self.frequency, batch.position_ids_T)

    def attend(self, layer: Layer, stream: Stream, rotation: Rotation, paths: Any) -> Stream:
        """x + o(attention(qkv(norm(x)))). Products have no names here and below: they are large, and gone once read."""
        attended = layer.output.attended(
            self.heads(layer.qkv, layer.attention_norm_D, stream, rotation), paths, self.slopes_H, self.absolute_bias
        )
        return layer.output.onto(stream, attended)

    def heads(self, qkv: Linear, norm_D: torch.Tensor | None, stream: Stream, rotation: Rotation) -> Heads:
        a = self.architecture
        product = qkv(qkv.normed(stream, norm_D, a.norm_eps))
        return product.heads((a.query_width, a.kv_width), a.head_width, rotation)

    def think(self, layer: Layer, stream: Stream) -> Stream:
        """x + down(silu(gate(h)) * up(h)), h = norm(x)"""
        rows = layer.gate_up.normed(stream, layer.mlp_norm_D, self.architecture.norm_eps)
        return layer.down.onto(stream, layer.down.gated(layer.gate_up(rows)))
