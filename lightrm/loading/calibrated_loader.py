"""Loading with error-compensating rounding: calibration text flows through the layers while they are quantized.

Two residual streams run side by side: one through the quantized layers, one through the same layers in float. A matrix
is rounded for the quantized rows that it will read, and its target is what the float layer makes of the float rows.
What earlier layers lost is predicted from the quantized rows by regression and added to the weight (asymmetric
calibration: GPTAQ, arXiv 2504.02692; here for the residual stream too). An error that is the same in all rows is
corrected in the bias (Nagel et al., arXiv 1906.04721). One layer is in float at a time; both streams are kept between
layers, in files if there is a draft. Rows pass by once, pack by pack, and leave sums behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from lightrm.checkpoints.checkpoint import Checkpoint
from lightrm.engine.packing import SHARE_NOTHING, packs
from lightrm.errors import SchemeError
from lightrm.kernels import passes
from lightrm.kernels.operands import HeadNorms, Residual, Rows, Sums
from lightrm.kernels.products import add_pending, large_product
from lightrm.loading.calibration_draft import EXACT, QUANTIZED, Draft, KeptStreams, Streams
from lightrm.loading.calibration_identity import identity
from lightrm.loading.calibration_rows import Exact, put
from lightrm.loading.folding import READ_NORMS
from lightrm.loading.gptq_rounding import compensated_int4, compensated_int8, factored
from lightrm.loading.layer_tensors import layer_of, tensors_of
from lightrm.loading.loader import Loader
from lightrm.loading.packers import Packer, WholePacker
from lightrm.loading.placement import Placement
from lightrm.loading.regression import judged, regressed
from lightrm.loading.second_moments import HalfRows, Moments
from lightrm.loading.symmetric import Factor
from lightrm.model.decoder import Decoder, Layer
from lightrm.model.linear import Linear
from lightrm.model.packed_batch import PackedBatch
from lightrm.schemes.quality import energy

PACK = 2048  # calibration tokens computed at once
GATED_AT_ONCE = 512  # of them, where rows are widest
ROUNDED_AT_ONCE = 2**24  # weights that are rounded at once: 64 MB in float
Both = tuple[torch.Tensor, torch.Tensor]  # of the quantized and of the exact stream
Feed = Callable[[int, torch.Tensor, torch.Tensor], Iterator[Both]]  # pack, streams -> what a matrix reads, in parts
Fed = tuple[int, torch.Tensor, torch.Tensor, Iterator[Both]]  # pack, streams, and what its feed yields


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
        self.draft: Draft | None = None
        if calibration and placement.draft is not None:
            self.draft = Draft(placement.draft, identity(self, calibration))

    @torch.inference_mode()
    def layers(self, embedding_VD: torch.Tensor) -> list[Layer]:
        try:
            return self.all_layers(embedding_VD)
        finally:
            if self.draft is not None:
                self.draft.close()

    def all_layers(self, embedding_VD: torch.Tensor) -> list[Layer]:
        layers = [] if self.draft is None else [self.kept(self.draft, i) for i in range(self.draft.finished)]
        decoder = Decoder(self.architecture, embedding_VD, layers, None, torch.float32)
        streams = self.streams(decoder)
        self.advance(len(layers))
        for i in range(len(layers), self.architecture.layers):
            layer = self.passed(decoder, i, streams)
            if self.draft is not None:
                assert isinstance(streams, KeptStreams)
                self.draft.keep(i, dict(tensors_of(layer, self.architecture)), self.facts(i), streams)
            layers.append(self.once(layer, self.beside(i)))
        return layers

    def streams(self, decoder: Decoder) -> Streams:
        """Return both streams before the first layer that is not finished."""
        dtype = self.scheme.dtype
        made: Streams = Streams([[torch.empty(0)] * len(self.packs)] * 2)
        if self.draft is not None:
            made = kept = self.draft.streams([len(pack) for pack in self.packs], self.architecture.width, dtype)
            if self.draft.finished:
                return made
        for k, pack in enumerate(self.packs):
            x_TD = decoder.embed(pack.token_ids_T)
            made.put(EXACT, k, x_TD)
            made.put(QUANTIZED, k, x_TD.to(dtype, copy=True))
        if self.draft is not None:
            kept.advance()
        return made

    def kept(self, draft: Draft, i: int) -> Layer:
        """Return a layer that an earlier run finished."""
        tensors, facts = draft.layer(i)
        self.sqnr_db |= {f"layers.{i}.{name}": float(db) for name, db in facts["sqnr_db"].items()}
        self.dtypes |= set(facts["dtypes"])
        placed = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        return self.once(layer_of(placed, self.architecture, self.linear_of), self.beside(i))

    def facts(self, i: int) -> dict[str, Any]:
        prefix = f"layers.{i}."
        found = {name.removeprefix(prefix): str(db) for name, db in self.sqnr_db.items() if name.startswith(prefix)}
        return {"sqnr_db": found, "dtypes": sorted(self.dtypes)}

    def passed(self, decoder: Decoder, i: int, streams: Streams) -> Layer:
        """Return one rounded layer. Both streams are after it then."""
        prefix = f"layers.{i}."
        before = [self.read(f"{prefix}{name}.weight") for name in READ_NORMS]
        others = self.other_norms(prefix)
        attention, mlp = ((self.read_norm(norm), self.applied(norm)) for norm in before)
        qkv, plain = self.reader(prefix, "qkv", before[0], attention, streams)
        heads = decoder.head_norms(others.get("query_norm_E"), others.get("key_norm_E"))
        mixed = self.fed(streams, partial(self.mixed, decoder, i, heads, attention, (qkv, plain)))
        del plain  # a float layer is in memory while others read what it makes
        output = self.writer(decoder, prefix, "output", streams, mixed, others.get("attention_post_norm_D"))
        gate_up, plain = self.reader(prefix, "gate_up", before[1], mlp, streams)
        gated = self.fed(streams, partial(self.gated, decoder, mlp, (gate_up, plain)))
        del plain
        down = self.writer(decoder, prefix, "down", streams, gated, others.get("mlp_post_norm_D"))
        return Layer(attention[0], qkv, output, mlp[0], gate_up, down, **others)

    def applied(self, norm_D: torch.Tensor) -> torch.Tensor | None:
        """Return the weight of a norm as the float layer behind it applies it; None if it is folded."""
        return None if self.folding is not None and self.folding.norms else self.float_copy(norm_D)

    def both(self, streams: Streams) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield the number of each pack, and its rows in the quantized and in the exact stream."""
        for k in range(len(self.packs)):
            yield k, streams.get(QUANTIZED, k).to(self.device), streams.get(EXACT, k).to(self.device)

    def fed(self, streams: Streams, feed: Feed) -> Iterator[Fed]:
        """Yield what `both` does, and with it what a matrix reads. Lets go of the feed at the end."""
        for k, x_TD, y_TD in self.both(streams):
            yield k, x_TD, y_TD, feed(k, x_TD, y_TD)

    def normed(self, x_TD: torch.Tensor, norm_D: torch.Tensor | None) -> torch.Tensor:
        """Return what qkv or gate_up reads, in float."""
        norm_D = None if norm_D is None else norm_D.float()
        eps, block = self.architecture.norm_eps, self.folding.normed_block if self.folding else 1
        return passes.norm(Residual(x_TD.float()), norm_D, eps, block=block).values_TI

    def mixed(
        self,
        decoder: Decoder,
        i: int,
        heads: HeadNorms | None,
        norms: tuple[torch.Tensor | None, torch.Tensor | None],
        qkv: tuple[Linear, Linear],
        k: int,
        *streams: torch.Tensor,
    ) -> Iterator[Both]:
        """Yield the output of attention in layer i, which `output` reads."""
        pack: PackedBatch = self.packs[k]
        rotation = decoder.rotations(pack)[self.architecture.positions_in(i)]
        paths = passes.paths(pack.segments, self.device, None, self.architecture.head_width)
        found = []
        for x_TD, norm_D, linear in zip(streams, norms, qkv, strict=True):
            split = decoder.heads(linear, decoder.norm(Residual(x_TD), norm_D, linear), rotation, heads)
            found.append(decoder.attention_kernel(*split, paths, decoder.rules[i]).values_TI.float())
        yield found[0], found[1]

    def gated(
        self,
        decoder: Decoder,
        norms: tuple[torch.Tensor | None, torch.Tensor | None],
        gate_up: tuple[Linear, Linear],
        k: int,
        *streams: torch.Tensor,
    ) -> Iterator[Both]:
        """Yield activation(gate) * up, rotated as at run time, which `down` reads."""
        block, activation = self.folding.gated_block if self.folding else 1, self.architecture.activation
        for parts in zip(*(x_TD.split(GATED_AT_ONCE) for x_TD in streams), strict=True):
            found = []
            for x_TD, norm_D, linear in zip(parts, norms, gate_up, strict=True):
                product = linear(decoder.norm(Residual(x_TD), norm_D, linear)).float()
                found.append(passes.gated(Sums(product), activation, block=block).values_TI)
                del product
            yield found[0], found[1]

    def reader(
        self,
        prefix: str,
        name: str,
        norm_D: torch.Tensor,
        norms: tuple[torch.Tensor | None, torch.Tensor | None],
        streams: Streams,
    ) -> tuple[Linear, Linear]:
        """Return a layer behind a norm, rounded and in float. Its target is what it makes of the float stream's
        rows, so what it lacks is the product with what the rows lack."""
        plain = self.plain(prefix, name, norm_D)
        weight_OI = plain.weight_OI
        few_JI = weight_OI[judged(len(weight_OI))]

        def rows() -> Iterator[HalfRows]:
            for k, x_TD, y_TD in self.both(streams):
                have_TI, want_TI = self.normed(x_TD, norms[0]), self.normed(y_TD, norms[1])
                yield k % 2, have_TI, want_TI.sub_(have_TI)

        sums = Moments.of(rows(), lambda _, lack_TI: lack_TI @ few_JI.T, self.corrects)
        more_II = regressed(sums)

        def aim(some: slice) -> torch.Tensor:
            part_OI = weight_OI[some]
            return part_OI.clone() if more_II is None else large_product(part_OI, more_II.T).add_(part_OI)

        wanted_O = weight_OI @ (sums.mean_I + sums.mean_O)
        return self.rounded(prefix, name, plain, aim, sums, wanted_O, shifts=self.scheme.integer), plain

    def writer(
        self,
        decoder: Decoder,
        prefix: str,
        name: str,
        streams: Streams,
        fed: Iterator[Fed],
        norm_D: torch.Tensor | None,
    ) -> Linear:
        """Return a rounded layer that adds to the residual stream. Both streams are after it then.

        Its target is the float stream after the layer minus the quantized stream before it. If its product is normed
        before it is added (norm_D), the target is the float layer's product. The bias is left out of both.
        """
        plain = self.plain(prefix, name, None)
        weight_OI, few = plain.weight_OI, judged(len(plain.weight_OI))
        read = [self.room(len(pack), weight_OI.shape[1]) for pack in self.packs]

        def sides() -> Iterator[HalfRows]:
            for k, x_TD, y_TD, parts in fed:
                at = 0
                for have_TI, want_TI in parts:
                    part = slice(at, at + len(have_TI))
                    at += len(have_TI)
                    put(read[k], part, self.rows_of(have_TI))
                    made_TO = large_product(want_TI, weight_OI)
                    if norm_D is None:
                        target_TO = made_TO + (y_TD[part] - x_TD[part])
                        y_TD[part] += plain.with_bias(made_TO)
                    else:
                        target_TO, made = made_TO.clone(), Sums(plain.with_bias(made_TO))
                        passes.add_normed(Residual(y_TD[part]), made, norm_D, self.architecture.norm_eps)
                    del made_TO, want_TI
                    yield k % 2, have_TI, target_TO
                    del target_TO, have_TI
                streams.put(EXACT, k, y_TD)

        sums = Moments.of(sides(), lambda x_TI, y_TO: y_TO[:, few] - x_TI @ weight_OI[few].T, self.corrects)
        better_OI = regressed(sums, weight_OI)

        def aim(some: slice) -> torch.Tensor:
            return (weight_OI if better_OI is None else better_OI)[some].clone()

        linear = self.rounded(prefix, name, plain, aim, sums, sums.mean_O, shifts=False)
        for k, rows in enumerate(read):
            residual = Residual(streams.get(QUANTIZED, k).to(self.device))
            decoder.add(linear, residual, rows, norm_D)
            streams.put(QUANTIZED, k, add_pending(residual))
        return linear

    def rows_of(self, x_TI: torch.Tensor) -> Rows:
        """Return rows as a layer of the scheme reads them."""
        return passes.quantize(x_TI) if self.scheme.integer else Rows(x_TI.to(self.scheme.dtype))

    def room(self, tokens: int, inputs: int) -> Rows:
        """Return memory for such rows."""
        dtype = torch.int8 if self.scheme.integer else self.scheme.dtype
        values_TI = torch.empty(tokens, inputs, dtype=dtype, device=self.device)
        return Rows(values_TI, torch.empty(tokens, device=self.device) if self.scheme.integer else None)

    def plain(self, prefix: str, name: str, norm_D: torch.Tensor | None) -> Exact:
        """Return one layer in float32, folded as its rounded form will be."""
        weight_OI = torch.empty(self.architecture.linears[name], device=self.device)
        for start, folded in self.folded_parts(prefix, name, norm_D):
            weight_OI[start : start + len(folded)] = folded
            del folded  # before the next part is read
        block = self.folding.block(name) if self.folding else 1
        return Exact(weight_OI, self.bias(prefix, name), block=block)

    def rounded(
        self,
        prefix: str,
        name: str,
        plain: Exact,
        aim: Callable[[slice], torch.Tensor],
        sums: Moments,
        wanted_O: torch.Tensor,
        shifts: bool,
    ) -> Linear:
        """Round one layer, some outputs at a time. aim: outputs -> what to round, which may be changed. sums: of the
        rows that it reads. wanted: mean of its output on them, without its bias. shifts: center the rows."""
        factor, mean_I = factored(sums.merged()), sums.mean_I
        outputs, inputs = plain.weight_OI.shape
        packer, bias_O, step = self.packer(outputs, inputs), wanted_O.clone(), max(ROUNDED_AT_ONCE // inputs, 1)
        for start in range(0, outputs, step):
            some = slice(start, min(start + step, outputs))
            aim_OI = aim(some)
            lost_OI = self.compensated(packer, start, aim_OI, factor)
            packer.signal, packer.noise = packer.signal + energy(aim_OI), packer.noise + energy(lost_OI.T)
            if not shifts:
                bias_O[some] -= aim_OI.sub_(lost_OI) @ mean_I
        self.note(f"{prefix}{name}", packer.signal, packer.noise)
        self.advance(self.share(name))
        if not self.corrects:
            return self.linear_of(name, packer.weight(), plain.bias_O)
        return self.linear_of(name, packer.weight(), plain.with_bias(bias_O), mean_I if shifts else None)

    def share(self, name: str) -> float:
        """Return what share of a layer's weights, and of its time, about, is in one of its matrices."""
        sizes = {each: outputs * inputs for each, (outputs, inputs) in self.architecture.linears.items()}
        ends = [round(64 * sum(list(sizes.values())[:k]) / sum(sizes.values())) for k in range(len(sizes) + 1)]
        at = list(sizes).index(name)
        return (ends[at + 1] - ends[at]) / 64  # such numbers add up to 1 exactly

    def compensated(
        self, packer: Packer | WholePacker, start: int, weight_OI: torch.Tensor, factor: Factor
    ) -> torch.Tensor:
        """Round some outputs into a packer, from `start` on. Return what they lost, float32 (O, I)."""
        assert isinstance(packer, Packer)
        if self.scheme.weights == "int8":
            rows, lost_OI = compensated_int8(weight_OI, factor)
            packer.place(start, (rows.values_OI, rows.scale_O))
        else:
            made, lost_OI = compensated_int4(weight_OI, factor, packer.group)
            packer.place(start, (made.packed, made.multiplier_OG, made.scale_O))
        return lost_OI
