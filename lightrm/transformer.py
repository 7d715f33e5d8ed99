"""The forward pass over packed tokens. Reads like the paper; knows nothing of files, quantization or text.

    x = embed(ids)
    for each layer:  x += o(attention(qkv(norm(x))));  x += down(silu(gate(h)) * up(h)), h = norm(x)
    norm(x) at the last token of each sequence

Shapes: T tokens in a pack, S sequences, D width, H query heads, J key/value heads, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightrm import ops
from lightrm.architecture import Alibi, Architecture, Rope
from lightrm.linear import Linear
from lightrm.packing import PackedBatch
from lightrm.positions import alibi_slopes, inverse_frequencies, rope_tables


@dataclass(frozen=True, slots=True)
class Layer:
    """One block's weights; `qkv` is query, key, value rows in this order, `gate_up` gate rows, then up rows."""

    attention_norm_D: torch.Tensor
    qkv: Linear
    output: Linear
    mlp_norm_D: torch.Tensor
    gate_up: Linear
    down: Linear


class Decoder:
    """A decoder that returns one hidden state a sequence: there is no output layer and no generation."""

    def __init__(
        self,
        architecture: Architecture,
        embedding_VD: torch.Tensor,
        layers: list[Layer],
        final_norm_D: torch.Tensor,
    ) -> None:
        self.architecture = architecture
        self.embedding_VD = embedding_VD
        self.layers = layers
        self.final_norm_D = final_norm_D
        positions, device = architecture.positions, embedding_VD.device
        self.frequency = self.slopes_H = None
        if isinstance(positions, Rope):
            self.frequency = inverse_frequencies(positions, architecture.head_width).to(device)
        else:
            self.slopes_H = alibi_slopes(architecture.query_heads).to(device)
        self.absolute_bias = isinstance(positions, Alibi) and positions.table == "absolute"

    @torch.inference_mode()
    def last_hidden(self, batch: PackedBatch) -> torch.Tensor:
        """Normed hidden state at the end of each sequence, (S, D), in the compute dtype."""
        rotation = None if self.frequency is None else rope_tables(self.frequency, batch.position_ids_T)
        x_TD = self.embedding_VD[batch.token_ids_T]
        for layer in self.layers:
            x_TD = x_TD + self.attend(layer, x_TD, batch, rotation)
            x_TD = x_TD + self.think(layer, x_TD)
        return ops.rms_norm(x_TD[batch.last_S], self.final_norm_D, self.architecture.norm_eps)

    def attend(
        self,
        layer: Layer,
        x_TD: torch.Tensor,
        batch: PackedBatch,
        rotation: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        a, tokens = self.architecture, len(x_TD)
        normed_TD = ops.rms_norm(x_TD, layer.attention_norm_D, a.norm_eps)
        query, key, value = torch.split(layer.qkv(normed_TD), [a.query_width, a.kv_width, a.kv_width], dim=1)
        query_THE = query.view(tokens, a.query_heads, a.head_width)
        key_TJE = key.view(tokens, a.kv_heads, a.head_width)
        value_TJE = value.view(tokens, a.kv_heads, a.head_width)
        if rotation is not None:
            query_THE, key_TJE = ops.rotate(query_THE, *rotation), ops.rotate(key_TJE, *rotation)
        mixed_THE = ops.attention(query_THE, key_TJE, value_TJE, batch.segments, self.slopes_H, self.absolute_bias)
        return layer.output(mixed_THE.reshape(tokens, a.query_width))

    def think(self, layer: Layer, x_TD: torch.Tensor) -> torch.Tensor:
        normed_TD = ops.rms_norm(x_TD, layer.mlp_norm_D, self.architecture.norm_eps)
        return layer.down(ops.silu_mul(layer.gate_up(normed_TD)))
