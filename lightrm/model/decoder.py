"""The forward pass over packed tokens. Reads like the paper; knows nothing of files, quantization or text.

    x = embed(ids)
    for each layer:  x += output(attention(split(qkv(norm(x)))))
                     x += down(swiglu(gate_up(norm(x))))
    norm(x) at the last token of each sequence

Each step calls one function of `kernels`, which fuses what it can: a norm also adds the product that is still pending,
and rounds its rows to int8 if the next layer reads int8. Only the hidden state of each last token is needed, so the
last layer computes keys and values of all tokens, and everything else of the last tokens only.

Shapes: T tokens in a pack, S sequences, D width, H query heads, J key/value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lightrm.architecture import Alibi, Architecture, Rope
from lightrm.kernels import passes
from lightrm.kernels.operands import Heads, Residual, Rotation, Rows
from lightrm.kernels.products import add_pending
from lightrm.model.linear import Linear
from lightrm.model.packed_batch import PackedBatch
from lightrm.model.positions import alibi_slopes, inverse_frequencies, rope_tables

Watch = Callable[[str, torch.Tensor], None]
EMBEDDED_AT_ONCE = 64  # tokens


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one block. `qkv` holds the rows of query, key and value in this order, `gate_up` those of gate and
    up.

    A norm is None if its weight was folded into the layer that reads it.
    """

    attention_norm_D: torch.Tensor | None
    qkv: Linear
    output: Linear
    mlp_norm_D: torch.Tensor | None
    gate_up: Linear
    down: Linear


class Layers(Protocol):
    """A list of layers, or an object that makes each layer when it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Layer: ...


class Flow:
    """One pack on its way through the layers."""

    def __init__(self, batch: PackedBatch, decoder: Decoder) -> None:
        self.batch = batch
        self.rotation = decoder.rotation(batch)
        device = decoder.embedding_VD.device
        self.paths = passes.paths(batch.segments, device)
        self.last_paths = passes.paths(batch.segments, device, batch.last_S.tolist())
        self.residual = Residual(decoder.embed(batch.token_ids_T))

    def report(self, name: str, watch: Watch | None) -> None:
        if watch is not None:
            watch(name, add_pending(self.residual))


class Decoder:
    """A decoder that returns one hidden state per sequence. It has no output layer and generates nothing."""

    def __init__(
        self,
        architecture: Architecture,
        embedding_VD: torch.Tensor,
        layers: Layers,
        final_norm_D: torch.Tensor | None,
        dtype: torch.dtype,
        watching: tuple[Callable[[], None], ...] = (),
    ) -> None:
        """watching: functions called before the weights of each layer are read; each raises if the weights' file has
        changed."""
        self.architecture = architecture
        self.embedding_VD = embedding_VD
        self.layers = layers
        self.final_norm_D = final_norm_D
        self.dtype, self.watching = dtype, watching
        positions, device = architecture.positions, embedding_VD.device
        self.frequency = self.slopes_H = None
        if isinstance(positions, Rope):
            self.frequency = inverse_frequencies(positions, architecture.head_width).to(device)
        else:
            self.slopes_H = alibi_slopes(architecture.query_heads).to(device)
        absolute = isinstance(positions, Alibi) and positions.table == "absolute"
        self.attention_kernel = passes.attention_by_table if absolute else passes.attention

    @property
    def bytes(self) -> int:
        """Bytes of the weights in memory. Streamed layers do not count."""
        layers: list[Layer] = self.layers if isinstance(self.layers, list) else []
        vectors = [self.embedding_VD, self.final_norm_D]
        vectors += [norm for layer in layers for norm in (layer.attention_norm_D, layer.mlp_norm_D)]
        linears = [linear for layer in layers for linear in (layer.qkv, layer.output, layer.gate_up, layer.down)]
        return sum(v.nbytes for v in vectors if v is not None) + sum(linear.bytes for linear in linears)

    @torch.inference_mode()
    def last_hidden(self, batch: PackedBatch, watch: Watch | None = None) -> torch.Tensor:
        """Return the normed hidden state of the last token of each sequence, (S, D), in the compute dtype.

        watch: called with a name and the residual stream after each half of each layer, to find where NaN first
        appears.
        """
        return self.last_hiddens([batch], watch)[0]

    @torch.inference_mode()
    def last_hiddens(
        self, batches: Sequence[PackedBatch], watch: Watch | None = None, after: Callable[[], None] | None = None
    ) -> list[torch.Tensor]:
        """As `last_hidden`, for several packs. All packs go through a layer before the next layer is asked for.

        after: called when a layer is done.
        """
        self.check_weights()
        flows = [Flow(batch, self) for batch in batches]
        for i in range(len(self.layers)):
            self.check_weights()
            layer, last = self.layers[i], i == len(self.layers) - 1
            for flow in flows:
                self.attention_of_last(layer, flow) if last else self.attention(layer, flow)
                flow.report(f"layers.{i}.attention", watch)
                self.mlp(layer, flow)
                flow.report(f"layers.{i}.mlp", watch)
                if len(flows) > 1:
                    add_pending(flow.residual)  # a product that is pending would be held in every pack
            del layer  # before the next one is asked for
            if after is not None:
                after()
        eps = self.architecture.norm_eps
        return [passes.norm_each(add_pending(flow.residual), self.final_norm_D, eps) for flow in flows]

    def check_weights(self) -> None:
        for check in self.watching:
            check()

    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """Return rows of the embedding table in the compute dtype.

        On a CPU only EMBEDDED_AT_ONCE tokens at a time are copied in the table's own dtype. A copy of all of them would
        leave a hole of that size in the memory for each pack of a window.
        """
        table_VD = self.embedding_VD
        if table_VD.device.type != "cpu" or table_VD.dtype == self.dtype:
            return table_VD[token_ids_T].to(self.dtype)
        x_TD = table_VD.new_empty((len(token_ids_T), table_VD.shape[1]), dtype=self.dtype)
        for ids, rows in zip(token_ids_T.split(EMBEDDED_AT_ONCE), x_TD.split(EMBEDDED_AT_ONCE), strict=True):
            rows.copy_(table_VD[ids])
        return x_TD

    def rotation(self, batch: PackedBatch) -> Rotation:
        return None if self.frequency is None else rope_tables(self.frequency, batch.position_ids_T)

    def norm(self, residual: Residual, weight_D: torch.Tensor | None, reader: Linear) -> Rows:
        """Norm the residual stream into rows of the kind that `reader` reads."""
        return passes.norm(residual, weight_D, self.architecture.norm_eps, int8=reader.int8, shift_D=reader.shift_I)

    def heads(self, qkv: Linear, norm_D: torch.Tensor | None, residual: Residual, rotation: Rotation) -> Heads:
        """Return query, key and value of all tokens."""
        a = self.architecture
        product = qkv(self.norm(residual, norm_D, qkv))
        return passes.split_heads(product, (a.query_width, a.kv_width), a.head_width, rotation)

    def attention(self, layer: Layer, flow: Flow) -> None:
        """x += output(attention(split(qkv(norm(x)))))"""
        heads = self.heads(layer.qkv, layer.attention_norm_D, flow.residual, flow.rotation)
        layer.output.add_to(
            flow.residual, self.attention_kernel(*heads, flow.paths, self.slopes_H, int8=layer.output.int8)
        )

    def attention_of_last(self, layer: Layer, flow: Flow) -> None:
        """As `attention`, for the last token of each sequence only. Afterwards the residual stream holds only these."""
        heads = self.heads_of_last(layer, flow)
        flow.residual = Residual(add_pending(flow.residual)[flow.batch.last_S])
        layer.output.add_to(
            flow.residual, self.attention_kernel(*heads, flow.last_paths, self.slopes_H, int8=layer.output.int8)
        )

    def heads_of_last(self, layer: Layer, flow: Flow) -> Heads:
        """Return the queries of the last tokens, and the keys and values of all tokens."""
        a, last_S = self.architecture, flow.batch.last_S
        queries = layer.qkv.outputs(0, a.query_width)
        others = layer.qkv.outputs(a.query_width, a.linears["qkv"][0])
        if queries is None or others is None:
            query, key, value = self.heads(layer.qkv, layer.attention_norm_D, flow.residual, flow.rotation)
            return query[last_S], key, value
        rows = self.norm(flow.residual, layer.attention_norm_D, layer.qkv)
        _, key, value = passes.split_heads(others(rows), (0, a.kv_width), a.head_width, flow.rotation)
        rotation = None if flow.rotation is None else (flow.rotation[0][last_S], flow.rotation[1][last_S])
        last = queries(rows.select(last_S))
        query, _, _ = passes.split_heads(last, (a.query_width, 0), a.head_width, rotation)
        return query, key, value

    def mlp(self, layer: Layer, flow: Flow) -> None:
        """x += down(swiglu(gate_up(norm(x))))"""
        rows = self.norm(flow.residual, layer.mlp_norm_D, layer.gate_up)
        down = layer.down
        down.add_to(flow.residual, passes.swiglu(layer.gate_up(rows), block=down.block, int8=down.int8))
