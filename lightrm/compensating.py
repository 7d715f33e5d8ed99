"""Loading with error-compensating rounding: calibration text flows through the layers as they are quantized.

Each layer's inputs come from the layers before it in the form in which they will run, so that a layer also makes up
for what the earlier ones lost. One layer is in float at a time; the calibration rows are kept between layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lightrm import ops
from lightrm.architecture import Alibi
from lightrm.checkpoints.detect import Checkpoint
from lightrm.errors import SchemeError
from lightrm.linear import Linear, Product, settled
from lightrm.loading import Loader
from lightrm.packing import PackedBatch
from lightrm.progress import item_progress
from lightrm.schemes.compensation import compensated_int4, compensated_int8
from lightrm.schemes.grammar import Scheme
from lightrm.schemes.int4 import dequantize, group_for
from lightrm.schemes.int8 import dequantize_rows
from lightrm.schemes.quality import energies
from lightrm.transformer import Decoder, Layer
from lightrm.weights import Held, Int4Weight, Int8Weight


def loader_for(
    checkpoint: Checkpoint,
    scheme: Scheme,
    device: torch.device,
    alibi: Alibi,
    packs: Sequence[PackedBatch],
    twin: Decoder | None = None,
) -> Loader:
    """The loader that a scheme needs. Raises SchemeError if packs are given for one that does not calibrate."""
    if not packs:
        return Loader(checkpoint, scheme, device, alibi, twin)
    if not scheme.folds or scheme.kind == checkpoint.holds:
        raise SchemeError(f"calibration compensates lightrm's own rounding: {scheme} has nothing to calibrate")
    return CompensatingLoader(checkpoint, scheme, device, alibi, packs)


class CompensatingLoader(Loader):
    """A Loader whose matrices are rounded under the second moment of their calibration inputs."""

    def __init__(
        self, checkpoint: Checkpoint, scheme: Scheme, device: torch.device, alibi: Alibi, packs: Sequence[PackedBatch]
    ) -> None:
        super().__init__(checkpoint, scheme, device, alibi)
        self.packs = [pack.to(device) for pack in packs]

    @torch.inference_mode()
    def layers(self, embedding_VD: torch.Tensor) -> list[Layer]:
        layers: list[Layer] = []
        decoder = Decoder(self.architecture, embedding_VD, layers, None, torch.float32)
        streams = [embedding_VD[pack.token_ids_T].float() for pack in self.packs]
        with item_progress(self.architecture.layers, "layers rounded") as advance:
            for i in range(self.architecture.layers):
                prefix = f"layers.{i}."
                norms = [self.read(f"{prefix}{name}.weight") for name in ("attention_norm", "mlp_norm")]
                attention, mlp = (self.norm(norm) for norm in norms)
                qkv = self.rounded(prefix, "qkv", norms[0], [self.normed(x, attention) for x in streams])
                mixed = [self.mixed(decoder, qkv, attention, x, p) for x, p in zip(streams, self.packs, strict=True)]
                output = self.rounded(prefix, "output", None, mixed)
                rows = [output.rows(self.cast(m)) for m in mixed]
                streams = [self.added(x, output, r) for x, r in zip(streams, rows, strict=True)]
                gate_up = self.rounded(prefix, "gate_up", norms[1], [self.normed(x, mlp) for x in streams])
                products = [gate_up(gate_up.normed(self.cast(x), mlp, self.architecture.norm_eps)) for x in streams]
                down = self.rounded(prefix, "down", None, [self.gated(product) for product in products])
                streams = [self.added(x, down, down.gated(p)) for x, p in zip(streams, products, strict=True)]
                layers.append(Layer(attention, qkv, output, mlp, gate_up, down))
                advance(1)
        return layers

    def normed(self, x_TD: torch.Tensor, norm_D: torch.Tensor | None) -> torch.Tensor:
        return ops.rms_norm(x_TD, None if norm_D is None else norm_D.float(), self.architecture.norm_eps)

    def cast(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.scheme.dtype)

    def added(self, x_TD: torch.Tensor, linear: Linear, rows: Any) -> torch.Tensor:
        return settled(linear.onto(self.cast(x_TD), rows)).float()

    def mixed(
        self, decoder: Decoder, qkv: Linear, norm_D: torch.Tensor | None, x_TD: torch.Tensor, pack: PackedBatch
    ) -> torch.Tensor:
        """Attention's output, what `output` reads, float32."""
        heads = decoder.heads(qkv, norm_D, self.cast(x_TD), decoder.rotation(pack))
        paths = ops.paths(pack.segments, x_TD)
        return ops.attention(*heads, paths, decoder.slopes_H, decoder.absolute_bias).flatten(1).float()

    def gated(self, product: Product) -> torch.Tensor:
        """silu(gate) * up, rotated where it will be, what `down` reads, float32."""
        return ops.silu_mul(product.float(), self.folding.gated_block if self.folding else 1)

    def rounded(self, prefix: str, name: str, norm_D: torch.Tensor | None, inputs: list[torch.Tensor]) -> Linear:
        """int8 rows that come out of a norm are centered: much of each is the same in all of them."""
        centers = norm_D is not None and self.scheme.integer
        mean_I = torch.cat(inputs).mean(0) if centers else torch.zeros(inputs[0].shape[1], device=self.device)
        moment = torch.zeros(len(mean_I), len(mean_I), device=self.device)
        for rows in inputs:
            centered = rows - mean_I
            moment.addmm_(centered.T, centered)
        parts = [self.folded(part, w, norm_D).to(self.device) for part, w in self.parts(prefix, name, "weight")]
        weight = torch.cat(parts).float()
        held, stands_for = self.compensated(weight, moment)
        self.note(f"{prefix}{name}", *energies(weight, stands_for))
        return self.linear_of(prefix, name, held, (mean_I, weight @ mean_I) if centers else None)

    def compensated(self, weight_OI: torch.Tensor, moment_II: torch.Tensor) -> tuple[Held, torch.Tensor]:
        """The rounded weight, and what it stands for in float."""
        if self.scheme.weights == "int8":
            values, scale = compensated_int8(weight_OI, moment_II)
            return Int8Weight(values, scale), dequantize_rows(values, scale)
        made = compensated_int4(weight_OI, moment_II, group_for(weight_OI.shape[1], self.scheme.group))
        return Int4Weight(made), dequantize(made)
