"""The forward pass over packed tokens. Reads like the paper; knows nothing of files, quantization or text.

    x = embed(ids)
    for each layer:  x += o(attention(qkv(norm(x))));  x += down(silu(gate(h)) * up(h)), h = norm(x)
    norm(x) at the last token of each sequence

Shapes: T tokens in a pack, S sequences, D width, H query heads, J key/value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lightrm import ops
from lightrm.architecture import Alibi, Architecture, Rope
from lightrm.linear import Linear, Rotation
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
        rotation = None if self.frequency is None else rope_tables(self.frequency, batch.position_ids_T)
        x_TD = self.embedding_VD[batch.token_ids_T].to(self.dtype)
        for i, layer in enumerate(self.layers):
            x_TD = self.attend(layer, x_TD, batch, rotation)
            if watch is not None:
                watch(f"layers.{i}.attention", x_TD)
            x_TD = self.think(layer, x_TD)
            if watch is not None:
                watch(f"layers.{i}.mlp", x_TD)
        last = [ops.rms_norm(row[None], self.final_norm_D, self.architecture.norm_eps) for row in x_TD[batch.last_S]]
        return torch.cat(last)  # row by row: a mean over S rows may round otherwise for every S

    def attend(self, layer: Layer, x_TD: torch.Tensor, batch: PackedBatch, rotation: Rotation) -> torch.Tensor:
        """x + o(attention(qkv(norm(x))))"""
        mixed_TD = self.mix(layer.qkv, layer.attention_norm_D, x_TD, batch, rotation)
        return layer.output(layer.output.rows(mixed_TD)).added_to(x_TD)

    def mix(
        self, qkv: Linear, norm_D: torch.Tensor | None, x_TD: torch.Tensor, batch: PackedBatch, rotation: Rotation
    ) -> torch.Tensor:
        """attention(qkv(norm(x))). Products have no names here and below: they are large, and gone once read."""
        a = self.architecture
        rows = qkv.normed(x_TD, norm_D, a.norm_eps)
        query_THE, key_TJE, value_TJE = qkv(rows).heads((a.query_width, a.kv_width), a.head_width, rotation)
        mixed_THE = ops.attention(query_THE, key_TJE, value_TJE, batch.segments, self.slopes_H, self.absolute_bias)
        return mixed_THE.flatten(1)

    def think(self, layer: Layer, x_TD: torch.Tensor) -> torch.Tensor:
        """x + down(silu(gate(h)) * up(h)), h = norm(x)"""
        rows = layer.gate_up.normed(x_TD, layer.mlp_norm_D, self.architecture.norm_eps)
        gated = layer.down.gated(layer.gate_up(rows))
        return layer.down(gated).added_to(x_TD)
