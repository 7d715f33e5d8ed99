"""Checkpoint -> Decoder and ValueHead: read a tensor, check it, fold it, quantize it on the device, drop it.

Never more than about one tensor of the model is in float. Shapes and names are checked before the first weight is read,
so a wrong folder fails within a second.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from lightrm.checkpoints.checkpoint import Checkpoint
from lightrm.checkpoints.inventory import check_tensors, real_architecture
from lightrm.display.progress import Advance, ignored
from lightrm.engine.shared_weights import Part, share_equal
from lightrm.engine.streaming import StreamedLayers
from lightrm.errors import NumericsError, TensorMismatchError
from lightrm.kernels import products
from lightrm.kernels.dispatch import kernels_for
from lightrm.kernels.operands import Held, Parts
from lightrm.loading.folding import READ_NORMS, Folding
from lightrm.loading.head_loader import read_head
from lightrm.loading.packers import Packer, WholePacker, packer_for
from lightrm.loading.placement import Loaded, LoadReport, Placement
from lightrm.model.decoder import Decoder, Layer, field_of
from lightrm.model.linear import Linear, linear_for
from lightrm.schemes.int8 import Rowwise
from lightrm.schemes.quality import energies, ratio_db

CHECKED_AT_ONCE = 2**20


class Loader:
    """Places the tensors of one checkpoint on a device."""

    def __init__(self, checkpoint: Checkpoint, placement: Placement) -> None:
        self.checkpoint = checkpoint
        self.scheme, self.device, self.twin = placement.scheme, placement.device, placement.twin
        self.beside = placement.beside
        self.shared = 0
        self.architecture = placement.applied(real_architecture(checkpoint))
        self.keeps_file = self.scheme.kind == checkpoint.holds
        self.folding = Folding(self.architecture) if self.scheme.folds and not self.keeps_file else None
        self.dtypes: set[str] = set()
        self.sqnr_db: dict[str, float] = {}
        self.checked: set[int] = set()  # layers that were read before
        self.measures = True
        self.calibration = ""  # of a loader that calibrates: on how much text
        self.advance: Advance = ignored

    def load(self, streamed: bool = False, advance: Advance = ignored) -> Loaded:
        """Load the model. streamed: layers stay in the file, and are read and checked in the first pass over them.
        advance: called after each layer that is placed."""
        self.advance = advance
        started = time.perf_counter()
        a = self.architecture
        check_tensors(self.checkpoint)
        final_norm = self.read("final_norm.weight")
        head = read_head(self, final_norm)
        embedding = self.embedding()
        layers = StreamedLayers(a.layers, self.layer, self.device) if streamed else self.layers(embedding)
        norm = self.once(self.norm(final_norm), None if self.twin is None else self.twin.final_norm_D)
        watching = () if self.twin is None else self.twin.watching
        decoder = Decoder(a, embedding, layers, norm, self.scheme.dtype, watching)
        report = LoadReport(
            seconds=time.perf_counter() - started,
            bytes=decoder.bytes,
            kernels=kernels_for(self.device, self.scheme.path),
            scheme=self.scheme,
            file_dtypes=tuple(sorted(self.dtypes)),
            ignored=self.checkpoint.ignored,
            sqnr_db=self.sqnr_db,
            shared=self.shared,
            calibration=self.calibration,
        )
        return Loaded(decoder, head, report)

    def read(self, ours: str) -> torch.Tensor:
        """Return one tensor by our name, a norm's weight as it is applied. Raises NumericsError if it is not finite."""
        tensor = self.checkpoint.read(ours)
        if self.architecture.norms_add_one and ours.endswith("norm.weight") and not ours.startswith("gate."):
            tensor = tensor.float() + 1  # in float32: in half precision, w near 0 would lose its last bits
        if not self.measures:
            return tensor
        self.dtypes.add(str(tensor.dtype).removeprefix("torch."))
        if not tensor.is_floating_point():
            raise TensorMismatchError(
                f"{self.checkpoint.tensors[ours][1]} holds {tensor.dtype} values, expected floats: a quantizer's file "
                "without its scales?"
            )
        parts = torch.split(tensor.reshape(-1), CHECKED_AT_ONCE)
        count = sum(int((~torch.isfinite(part)).sum()) for part in parts)
        if count:
            raise NumericsError(f"{self.checkpoint.tensors[ours][1]} holds {count} NaN or Inf values")
        return tensor

    def norm(self, weight_D: torch.Tensor) -> torch.Tensor | None:
        """Return the weight of a norm as the model holds it; None if it is folded into the layer that reads it."""
        if self.folding:
            return None
        dtype = torch.float32 if self.architecture.norms_add_one else self.scheme.dtype  # 1 + w is applied unrounded
        return weight_D.to(self.device, dtype, copy=True)

    def read_norm(self, weight_D: torch.Tensor) -> torch.Tensor | None:
        """Return the weight of a norm that qkv or gate_up reads, as the model holds it; None if it is folded."""
        applied = self.folding is not None and not self.folding.norms
        return self.float_copy(weight_D) if applied else self.norm(weight_D)

    def other_norms(self, prefix: str) -> dict[str, torch.Tensor]:
        """Return the norms of a block that no linear layer reads, float32, by the names of `Layer`."""
        names = [name for name in self.architecture.norms if name not in READ_NORMS]
        return {field_of(name): self.float_copy(self.read(f"{prefix}{name}.weight")) for name in names}

    def float_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, torch.float32, copy=True)

    def embedding(self) -> torch.Tensor:
        """Return the table in the compute dtype; under int8 in float16, since a lookup does no arithmetic."""
        table_VD = self.read("embedding.weight")
        dtype = torch.float16 if self.folding or self.scheme.integer else self.scheme.dtype
        placed = torch.empty(table_VD.shape, dtype=dtype, device=self.device)
        signal = noise = 0.0
        rows = max(1, CHECKED_AT_ONCE // table_VD.shape[1])
        for part, source in zip(torch.split(placed, rows), torch.split(table_VD, rows), strict=True):
            exact = self.float_copy(source)
            part.copy_(self.folding.embedding(exact) if self.folding else exact)
            energy, lost = energies(exact, part)
            signal, noise = signal + energy, noise + lost
        self.note("embedding", signal, noise)
        return self.once(placed, None if self.twin is None else self.twin.embedding_VD)

    def note(self, name: str, signal: float, noise: float) -> None:
        if not math.isfinite(noise):
            raise NumericsError(f"{name} overflows half precision under {self.scheme}: load with bf16 or fp32")
        self.sqnr_db[name] = ratio_db(signal, noise)

    def layers(self, embedding_VD: torch.Tensor) -> list[Layer]:
        layers = []
        for i in range(self.architecture.layers):
            layers.append(self.layer(i))
            self.advance(1)
        return layers

    def layer(self, i: int) -> Layer:
        """Return a layer. The first time, its tensors are checked and its SQNR is measured."""
        self.measures = i not in self.checked
        made = self.made(i)
        self.checked.add(i)
        return self.once(made, self.beside(i))

    def once(self, part: Part, twin: Part | None) -> Part:
        held, saved = share_equal(part, twin)
        self.shared += saved
        return held

    def made(self, i: int) -> Layer:
        prefix = f"layers.{i}."
        norms = [self.read(f"{prefix}{name}.weight") for name in READ_NORMS]
        return Layer(
            attention_norm_D=self.read_norm(norms[0]),
            qkv=self.linear(prefix, "qkv", norms[0]),
            output=self.linear(prefix, "output", None),
            mlp_norm_D=self.read_norm(norms[1]),
            gate_up=self.linear(prefix, "gate_up", norms[1]),
            down=self.linear(prefix, "down", None),
            **self.other_norms(prefix),
        )

    def linear(self, prefix: str, name: str, norm_D: torch.Tensor | None) -> Linear:
        """Return one linear layer from its parts in the file. norm_D: weight of the norm before it, None if there is
        none."""
        if self.keeps_file and (kept := self.file_weight(prefix, name)) is not None:
            return self.linear_of(name, kept, self.bias(prefix, name))
        packer = self.packer(*self.architecture.linears[name])
        for start, folded in self.folded_parts(prefix, name, norm_D):
            packer.put(start, folded)
            del folded  # before the next part is read
        if self.measures:
            self.note(f"{prefix}{name}", packer.signal, packer.noise)
        return self.linear_of(name, packer.weight(), self.bias(prefix, name))

    def packer(self, outputs: int, inputs: int) -> Packer | WholePacker:
        # A layer that the file does not pack stays float, unless its rows are int8.
        whole = self.keeps_file and not self.scheme.integer
        scheme = replace(self.scheme, weights="float") if whole else self.scheme
        return packer_for(scheme, outputs, inputs, self.device, self.measures)

    def file_weight(self, prefix: str, name: str) -> Held | None:
        """Return the quantized values of one linear layer as the file holds them; None if the file does not pack all
        its parts."""
        whole = f"{prefix}{name}.weight"
        names = [f"{prefix}{part}.weight" for part in self.architecture.parts[name]]
        names = [whole] if whole in self.checkpoint.tensors else names
        found = [self.checkpoint.packed(ours) for ours in names]
        parts = [products.placed(part, self.device) for part in found if part is not None]
        if len(parts) < len(names):
            return None
        for ours, part in zip(names, parts, strict=True):
            if not bool(torch.isfinite(part.factors).all()):
                raise NumericsError(f"the scales of {self.checkpoint.tensors[ours][1]} hold NaN or Inf")
        self.dtypes.add(self.scheme.name)
        self.sqnr_db[f"{prefix}{name}"] = math.inf
        eight = [part for part in parts if isinstance(part, Rowwise)]
        if eight:
            return Rowwise(torch.cat([part.values_OI for part in eight]), torch.cat([part.scale_O for part in eight]))
        return Parts(tuple(part for part in parts if not isinstance(part, Rowwise)))

    def linear_of(
        self, name: str, held: Held, bias_O: torch.Tensor | None, shift_I: torch.Tensor | None = None
    ) -> Linear:
        """Make the layer that the scheme runs from a held weight. shift_I: subtracted from its rows, see
        `model.linear`."""
        block = self.folding.block(name) if self.folding is not None else 1
        return linear_for(self.scheme, held, bias_O, block, shift_I)

    def bias(self, prefix: str, name: str) -> torch.Tensor | None:
        """Return the bias of one linear layer, float32, folded; None if the file has none."""
        biases = [self.folded_bias(part, bias) for part, bias in self.parts(prefix, name, "bias")]
        return torch.cat(biases) if biases else None

    def parts(self, prefix: str, name: str, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the file's tensors of one linear layer by part; a fused tensor is divided into its parts."""
        whole, rows = f"{prefix}{name}.{kind}", self.architecture.parts[name]
        if whole in self.checkpoint.tensors:
            tensor = self.read(whole)
            yield from zip(rows, torch.split(tensor, list(rows.values())), strict=True)
            return
        for part in rows:
            if f"{prefix}{part}.{kind}" in self.checkpoint.tensors:
                yield part, self.read(f"{prefix}{part}.{kind}")

    def folded(self, part: str, weight: torch.Tensor, norm_D: torch.Tensor | None) -> torch.Tensor:
        """Return the weight of a part as it will be packed: on the device, rotated if the scheme asks for it."""
        if self.folding is None:
            return weight
        placed = self.float_copy(weight)
        if part == "output":
            return self.folding.output(placed)
        if part == "down":
            return self.folding.down(placed)
        assert norm_D is not None
        self.folding.reads_residual(placed, self.float_copy(norm_D))
        return self.folding.value(placed) if part == "value" else placed

    def folded_parts(self, prefix: str, name: str, norm_D: torch.Tensor | None) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the parts of one linear layer, folded, and the row at which each starts. Holds one at a time."""
        start = 0
        for part, weight in self.parts(prefix, name, "weight"):
            folded = self.folded(part, weight, norm_D)
            del weight
            yield start, folded
            start += len(folded)
            del folded  # before the next part is read

    def folded_bias(self, part: str, bias: torch.Tensor) -> torch.Tensor:
        placed = self.float_copy(bias)
        if self.folding is not None and part == "value":
            return self.folding.value(placed)
        if self.folding is not None and part in ("output", "down"):
            return self.folding.writes_residual(placed)
        return placed
