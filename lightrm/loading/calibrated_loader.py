"""Loading with error-compensating rounding: calibration text flows through the layers while they are quantized.

Two residual streams run side by side: one through the quantized layers, one through the same layers in float. A matrix
is rounded for the quantized rows that it will read, and its target is what the float layer makes of the float rows.
What earlier layers lost is predicted from the quantized rows by regression and added to the weight (asymmetric
calibration: GPTAQ, arXiv 2504.02692; here for the residual stream too). An error that is the same in all rows is
corrected in the bias (Nagel et al., arXiv 1906.04721). One layer is in float at a time; both streams are kept between
layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from lightrm.checkpoints.checkpoint import Checkpoint
from lightrm.engine.packing import SHARE_NOTHING, packs
from lightrm.errors import SchemeError
from lightrm.kernels import passes
from lightrm.kernels.operands import HeadNorms, Held, Residual, Rows, Sums
from lightrm.kernels.products import add_pending
from lightrm.loading.folding import READ_NORMS
from lightrm.loading.gptq_rounding import Moments, compensated_int4, compensated_int8, regressed
from lightrm.loading.loader import Loader
from lightrm.loading.placement import Placement
from lightrm.model.decoder import Decoder, Layer
from lightrm.model.linear import Linear
from lightrm.schemes.int4 import group_for
from lightrm.schemes.int8 import Rowwise
from lightrm.schemes.quality import energies

PACK = 2048  # calibration tokens computed at once
Packs = list[torch.Tensor]  # one (T, width) for each pack
Sides = tuple[Packs, Packs]  # as they will be, in the scheme; as they would be in float


def loader_for(checkpoint: Checkpoint, placement: Placement, calibration: Sequence[Sequence[int]]) -> Loader:
    """Return the loader that a scheme needs. calibration: token ids of the texts, none if it was not asked for.

    Raises SchemeError if there is calibration text for a scheme that does not round.
    """
    if not calibration:
        return Loader(checkpoint, placement)
    if not placement.scheme.folds or placement.scheme.kind == checkpoint.holds:
        raise SchemeError(
            f"calibration compensates lightrm's own rounding: {placement.scheme} has nothing to calibrate"
        )
    return CompensatingLoader(checkpoint, placement, calibration)


class CompensatingLoader(Loader):
    """A Loader that rounds each matrix under the second moment of its calibration inputs.

    corrects: whether biases correct the mean error of the outputs.
    """

    corrects = True

    def __init__(self, checkpoint: Checkpoint, placement: Placement, calibration: Sequence[Sequence[int]]) -> None:
        super().__init__(checkpoint, placement)
        apart = self.architecture.scaled_from
        self.packs = [batch.to(self.device) for _, batch in packs(calibration, PACK, SHARE_NOTHING, apart)]
        self.calibration = f"{len(calibration)} texts of {sum(map(len, calibration))} tokens" if calibration else ""

    @torch.inference_mode()
    def layers(self, embedding_VD: torch.Tensor) -> list[Layer]:
        layers: list[Layer] = []
        decoder = Decoder(self.architecture, embedding_VD, layers, None, torch.float32)
        exact = [decoder.embed(pack.token_ids_T) for pack in self.packs]
        sides = [x.to(self.scheme.dtype, copy=True) for x in exact], exact
        for i in range(self.architecture.layers):
            layer, sides = self.passed(decoder, i, sides)
            layers.append(self.once(layer, self.beside(i)))
            self.advance(1)
        return layers

    def passed(self, decoder: Decoder, i: int, sides: Sides) -> tuple[Layer, Sides]:
        """Return one rounded layer, and both streams after it."""
        prefix = f"layers.{i}."
        before = [self.read(f"{prefix}{name}.weight") for name in READ_NORMS]
        others = self.other_norms(prefix)
        attention, mlp = ((self.read_norm(norm), self.applied(norm)) for norm in before)
        qkv = self.reader(prefix, "qkv", before[0], each(self.normed, sides, attention))
        heads = decoder.head_norms(others.get("query_norm_E"), others.get("key_norm_E"))
        mixed = each(partial(self.mixed, decoder, i, heads), sides, attention, qkv)
        output, sides = self.writer(prefix, "output", sides, mixed, others.get("attention_post_norm_D"))
        gate_up = self.reader(prefix, "gate_up", before[1], each(self.normed, sides, mlp))
        gated = each(partial(self.gated, decoder), sides, mlp, gate_up)
        down, sides = self.writer(prefix, "down", sides, gated, others.get("mlp_post_norm_D"))
        return Layer(attention[0], qkv[0], output, mlp[0], gate_up[0], down, **others), sides

    def applied(self, norm_D: torch.Tensor) -> torch.Tensor | None:
        """Return the weight of a norm as the float layer behind it applies it; None if it is folded."""
        return None if self.folding is not None and self.folding.norms else self.float_copy(norm_D)

    def normed(self, streams: Packs, norm_D: torch.Tensor | None) -> Packs:
        """Return what qkv or gate_up reads, in float."""
        norm_D = None if norm_D is None else norm_D.float()
        eps, block = self.architecture.norm_eps, self.folding.normed_block if self.folding else 1
        return [passes.norm(Residual(x_TD.float()), norm_D, eps, block=block).values_TI for x_TD in streams]

    def mixed(
        self,
        decoder: Decoder,
        i: int,
        norms: HeadNorms | None,
        streams: Packs,
        norm_D: torch.Tensor | None,
        qkv: Linear,
    ) -> Packs:
        """Return the output of attention in layer i, which `output` reads."""
        found = []
        for x_TD, pack in zip(streams, self.packs, strict=True):
            rotation = decoder.rotations(pack)[self.architecture.positions_in(i)]
            heads = decoder.heads(qkv, decoder.norm(Residual(x_TD), norm_D, qkv), rotation, norms)
            paths = passes.paths(pack.segments, x_TD.device, None, self.architecture.head_width)
            found.append(decoder.attention_kernel(*heads, paths, decoder.rules[i]).values_TI.float())
        return found

    def gated(self, decoder: Decoder, streams: Packs, norm_D: torch.Tensor | None, gate_up: Linear) -> Packs:
        """Return activation(gate) * up, rotated as at run time, which `down` reads."""
        block, activation = self.folding.gated_block if self.folding else 1, self.architecture.activation
        products = (gate_up(decoder.norm(Residual(x_TD), norm_D, gate_up)) for x_TD in streams)
        return [passes.gated(Sums(product.float()), activation, block=block).values_TI for product in products]

    def reader(self, prefix: str, name: str, norm_D: torch.Tensor, rows: Sides) -> tuple[Linear, Linear]:
        """Return a layer behind a norm, rounded and in float. Its target is what it makes of the float stream's
        rows."""
        plain = self.plain(prefix, name, norm_D)
        sums = Moments.of(rows[0], (want - have for have, want in zip(*rows, strict=True)), self.corrects)
        return self.rounded(prefix, name, plain, sums.through(weight_of(plain)), shifts=self.scheme.integer), plain

    def writer(
        self, prefix: str, name: str, sides: Sides, rows: Sides, norm_D: torch.Tensor | None
    ) -> tuple[Linear, Sides]:
        """Return a rounded layer that adds to the residual stream, and both streams after it.

        Its target is the float stream after the layer minus the quantized stream before it. If its product is normed
        before it is added (norm_D), the target is the float layer's product.
        """
        plain, eps = self.plain(prefix, name, None), self.architecture.norm_eps
        after = added(sides[1], rows[1], plain, norm_D, eps)
        if norm_D is None:
            lacking = (x - y - plain(Rows(have)).acc_TO for x, y, have in zip(after, sides[0], rows[0], strict=True))
        else:
            lacking = (plain(Rows(want)).acc_TO - plain(Rows(have)).acc_TO for have, want in zip(*rows, strict=True))
        linear = self.rounded(prefix, name, plain, Moments.of(rows[0], lacking, self.corrects), shifts=False)
        return linear, (added(sides[0], rows[0], linear, norm_D, eps), after)

    def plain(self, prefix: str, name: str, norm_D: torch.Tensor | None) -> Linear:
        """Return one layer in float32, folded as its rounded form will be."""
        parts = [self.folded(part, w, norm_D).to(self.device) for part, w in self.parts(prefix, name, "weight")]
        block = self.folding.block(name) if self.folding else 1
        return Linear(torch.cat(parts).float(), self.bias(prefix, name), block=block)

    def rounded(self, prefix: str, name: str, plain: Linear, sums: Moments, shifts: bool) -> Linear:
        """Round one layer. sums: of the rows that it reads, and of what `plain` lacks on them; shifts: center the
        rows."""
        weight = weight_of(plain)
        more = regressed(sums.halves) if len(sums.halves) > 1 else None
        aim = weight if more is None else weight + more
        held, stands_for = self.compensated(aim, sums.moment_II)
        self.note(f"{prefix}{name}", *energies(aim, stands_for))
        if not self.corrects:
            return self.linear_of(name, held, plain.bias_O)
        missing = sums.lack_O + (weight if shifts else weight - stands_for) @ sums.mean_I
        bias_O = missing if plain.bias_O is None else plain.bias_O + missing
        return self.linear_of(name, held, bias_O, sums.mean_I if shifts else None)

    def compensated(self, weight_OI: torch.Tensor, moment_II: torch.Tensor) -> tuple[Held, torch.Tensor]:
        """Return the rounded weight, and its dequantized form."""
        if self.scheme.weights == "int8":
            held = Rowwise(*compensated_int8(weight_OI, moment_II))
            return held, held.float()
        made = compensated_int4(weight_OI, moment_II, group_for(weight_OI.shape[1], self.scheme.group))
        return made, made.float()


def weight_of(plain: Linear) -> torch.Tensor:
    assert isinstance(plain.weight, torch.Tensor)
    return plain.weight


def each(step: Callable[..., Packs], *of: Any) -> Sides:
    """Apply a step to the quantized and to the float side."""
    quantized, exact = zip(*of, strict=True)
    return step(*quantized), step(*exact)


def added(streams: Packs, inputs: Packs, linear: Linear, norm_D: torch.Tensor | None, eps: float) -> Packs:
    """Add the product of a layer to the streams, in place; normed, if there is a norm."""
    found = []
    for x_TD, values_TI in zip(streams, inputs, strict=True):
        residual, rows = Residual(x_TD), linear.rows(values_TI.to(x_TD.dtype))
        if norm_D is None:
            linear.add_to(residual, rows)
        else:
            passes.add_normed(residual, linear(rows), norm_D, eps)
        found.append(add_pending(residual))
    return found
