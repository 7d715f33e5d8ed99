"""The forward pass over packed tokens. Reads like the paper; knows nothing of files, quantization or text.

    x = embed(ids)
    for each layer:  x += output(attention(split(qkv(norm(x)))))
                     x += down(gated(gate_up(norm(x))))
    norm(x) at the last token of each sequence

What a family has beside this, such as norms of the heads or of what is added to x, it says in its `Architecture`; no
family is named here. Each step calls one function of `kernels`, which fuses what it can: a norm also adds the product
that is still pending, and rounds its rows to int8 if the next layer reads int8. Only the hidden state of each last
token is needed, so the last layer computes keys and values of all tokens, and everything else of the last tokens only.

Shapes: T tokens in a pack, S sequences, D width, H query heads, J key/value heads, E head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lightrm.architecture import Alibi, Architecture, Rope
from lightrm.kernels import passes
from lightrm.kernels.operands import HeadNorms, Heads, Residual, Rotation, Rows, ScoreRule
from lightrm.kernels.products import add_pending
from lightrm.model.linear import Linear
from lightrm.model.packed_batch import PackedBatch
from lightrm.model.positions import alibi_slopes, attention_factor, inverse_frequencies, rope_tables

Watch = Callable[[str, torch.Tensor], None]
EMBEDDED_AT_ONCE = 64  # tokens


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one block. `qkv` holds the rows of query, key and value in this order, `gate_up` those of gate and
    up.

    A norm is None if its weight was folded into the layer that reads it, or if the architecture has no such norm: those
    behind attention and MLP, and those of the heads of query and key (float32).
    """

    attention_norm_D: torch.Tensor | None
    qkv: Linear
    output: Linear
    mlp_norm_D: torch.Tensor | None
    gate_up: Linear
    down: Linear
    attention_post_norm_D: torch.Tensor | None = None
    mlp_post_norm_D: torch.Tensor | None = None
    query_norm_E: torch.Tensor | None = None
    key_norm_E: torch.Tensor | None = None

    @property
    def bytes(self) -> int:
        norms = (
            self.attention_norm_D, self.mlp_norm_D, self.attention_post_norm_D, self.mlp_post_norm_D,
            self.query_norm_E, self.key_norm_E,
        )  # fmt: skip
        linears = (self.qkv, self.output, self.gate_up, self.down)
        return sum(norm.nbytes for norm in norms if norm is not None) + sum(linear.bytes for linear in linears)


def field_of(norm: str) -> str:
    """Return the name of a norm in `Layer`, by its name in `Architecture.norms`."""
    return f"{norm}_{'E' if norm in ('query_norm', 'key_norm') else 'D'}"


class Layers(Protocol):
    """A list of layers, or an object that makes each layer when it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Layer: ...


class Flow:
    """One pack on its way through the layers."""

    def __init__(self, batch: PackedBatch, decoder: Decoder) -> None:
        self.batch = batch
        self.rotations = decoder.rotations(batch)
        device = decoder.embedding_VD.device
        width = decoder.architecture.head_width
        self.paths = passes.paths(batch.segments, device, None, width)
        self.last_paths = passes.paths(batch.segments, device, batch.last_S.tolist(), width)
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
        self.rules = score_rules(architecture, embedding_VD.device)
        positions = architecture.positions
        absolute = isinstance(positions, Alibi) and positions.table == "absolute"
        self.attention_kernel = passes.attention_by_table if absolute else passes.attention

    @property
    def bytes(self) -> int:
        """Bytes of the weights in memory. Streamed layers do not count."""
        layers: list[Layer] = self.layers if isinstance(self.layers, list) else []
        ends = (self.embedding_VD, self.final_norm_D)
        return sum(v.nbytes for v in ends if v is not None) + sum(layer.bytes for layer in layers)

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
                self.attention_of_last(layer, i, flow) if last else self.attention(layer, i, flow)
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
        """Return rows of the embedding table in the compute dtype, times the architecture's scale, rounded to that
        dtype.

        On a CPU only EMBEDDED_AT_ONCE tokens at a time are copied in the table's own dtype. A copy of all of them would
        leave a hole of that size in the memory for each pack of a window.
        """
        table_VD, scale = self.embedding_VD, self.architecture.embedding_scale
        if table_VD.device.type != "cpu" or table_VD.dtype == self.dtype:
            x_TD = table_VD[token_ids_T].to(self.dtype)
            return x_TD if scale == 1 else x_TD.mul_(torch.tensor(scale, dtype=self.dtype))
        x_TD = table_VD.new_empty((len(token_ids_T), table_VD.shape[1]), dtype=self.dtype)
        for ids, rows in zip(token_ids_T.split(EMBEDDED_AT_ONCE), x_TD.split(EMBEDDED_AT_ONCE), strict=True):
            rows.copy_(table_VD[ids])
        return x_TD if scale == 1 else x_TD.mul_(torch.tensor(scale, dtype=self.dtype))

    def rotations(self, batch: PackedBatch) -> dict[Rope | Alibi, Rotation]:
        """Return the tables of each position scheme that a layer has; None for one without rotation."""
        a = self.architecture
        longest = int(batch.position_ids_T.max()) + 1 if a.scaled_from is not None and len(batch) else 0
        long = longest > (a.scaled_from or 0)
        found: dict[Rope | Alibi, Rotation] = {}
        for scheme in {a.positions_in(i) for i in range(a.layers)}:
            found[scheme] = None
            if isinstance(scheme, Rope):
                frequency = inverse_frequencies(scheme, a.head_width, long).to(self.embedding_VD.device)
                found[scheme] = rope_tables(frequency, batch.position_ids_T, attention_factor(scheme))
        return found

    def norm(self, residual: Residual, weight_D: torch.Tensor | None, reader: Linear) -> Rows:
        """Norm the residual stream into rows of the kind that `reader` reads."""
        eps, block = self.architecture.norm_eps, reader.block
        return passes.norm(residual, weight_D, eps, int8=reader.int8, shift_D=reader.shift_I, block=block)

    def heads(self, qkv: Linear, rows: Rows, rotation: Rotation, norms: HeadNorms | None) -> Heads:
        """Return query, key and value of all rows."""
        a = self.architecture
        return passes.split_heads(qkv(rows), (a.query_width, a.kv_width), a.head_width, rotation, norms)

    def head_norms(self, query_E: torch.Tensor | None, key_E: torch.Tensor | None) -> HeadNorms | None:
        return None if query_E is None or key_E is None else HeadNorms(query_E, key_E, self.architecture.norm_eps)

    def add(self, linear: Linear, residual: Residual, rows: Rows, norm_D: torch.Tensor | None) -> None:
        """x += norm(linear(rows)), or without a norm."""
        if norm_D is None:
            linear.add_to(residual, rows)
        else:
            passes.add_normed(residual, linear(rows), norm_D, self.architecture.norm_eps)

    def attention(self, layer: Layer, i: int, flow: Flow) -> None:
        """x += output(attention(split(qkv(norm(x)))))"""
        rotation = flow.rotations[self.architecture.positions_in(i)]
        rows = self.norm(flow.residual, layer.attention_norm_D, layer.qkv)
        heads = self.heads(layer.qkv, rows, rotation, self.head_norms(layer.query_norm_E, layer.key_norm_E))
        mixed = self.attention_kernel(*heads, flow.paths, self.rules[i], int8=layer.output.int8)
        self.add(layer.output, flow.residual, mixed, layer.attention_post_norm_D)

    def attention_of_last(self, layer: Layer, i: int, flow: Flow) -> None:
        """As `attention`, for the last token of each sequence only. Afterwards the residual stream holds only these."""
        heads = self.heads_of_last(layer, i, flow)
        flow.residual = Residual(add_pending(flow.residual)[flow.batch.last_S])
        mixed = self.attention_kernel(*heads, flow.last_paths, self.rules[i], int8=layer.output.int8)
        self.add(layer.output, flow.residual, mixed, layer.attention_post_norm_D)

    def heads_of_last(self, layer: Layer, i: int, flow: Flow) -> Heads:
        """Return the queries of the last tokens, and the keys and values of all tokens."""
        a, last_S = self.architecture, flow.batch.last_S
        rotation, norms = flow.rotations[a.positions_in(i)], self.head_norms(layer.query_norm_E, layer.key_norm_E)
        rows = self.norm(flow.residual, layer.attention_norm_D, layer.qkv)
        queries = layer.qkv.outputs(0, a.query_width)
        others = layer.qkv.outputs(a.query_width, a.linears["qkv"][0])
        if queries is None or others is None:
            query, key, value = self.heads(layer.qkv, rows, rotation, norms)
            return query[last_S], key, value
        _, key, value = passes.split_heads(others(rows), (0, a.kv_width), a.head_width, rotation, norms)
        rotation = None if rotation is None else (rotation[0][last_S], rotation[1][last_S])
        last = queries(rows.select(last_S))
        query, _, _ = passes.split_heads(last, (a.query_width, 0), a.head_width, rotation, norms)
        return query, key, value

    def mlp(self, layer: Layer, flow: Flow) -> None:
        """x += down(gated(gate_up(norm(x))))"""
        rows = self.norm(flow.residual, layer.mlp_norm_D, layer.gate_up)
        down, activation = layer.down, self.architecture.activation
        hidden = passes.gated(layer.gate_up(rows), activation, block=down.block, int8=down.int8)
        self.add(down, flow.residual, hidden, layer.mlp_post_norm_D)


def score_rules(a: Architecture, device: torch.device) -> list[ScoreRule]:
    """Return what attention does to scores in each layer."""
    scale = 1 / math.sqrt(a.head_width if a.score_width is None else a.score_width)
    slopes_H = alibi_slopes(a.query_heads).to(device) if isinstance(a.positions, Alibi) else None
    return [ScoreRule(scale, slopes_H, a.softcap, a.window(i)) for i in range(a.layers)]
