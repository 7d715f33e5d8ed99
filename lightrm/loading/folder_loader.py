"""lightrm's own folder (`quantized_folder`) -> Decoder and ValueHead: tensors are mapped and checked against their
sums.

The weights stay on the disk until they are used. Every pass checks through `files.Watched` that the file is unchanged.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import torch

from lightrm.architecture import Architecture, PostStep
from lightrm.checkpoints.checkpoint import Checkpoint
from lightrm.checkpoints.safe import SafeFile
from lightrm.checkpoints.stored import MANIFEST
from lightrm.checksums import tensor_sum
from lightrm.display.progress import Advance, ignored
from lightrm.engine.shared_weights import share_equal
from lightrm.engine.streaming import StreamedLayers
from lightrm.errors import CorruptFileError
from lightrm.kernels.dispatch import kernels_for
from lightrm.kernels.operands import Held
from lightrm.loading import layer_tensors
from lightrm.loading.folding import Folding
from lightrm.loading.head_loader import attribute_names
from lightrm.loading.placement import Loaded, LoadReport, Placement
from lightrm.loading.quantized_folder import CONFIG, WEIGHTS, Manifest
from lightrm.model.decoder import Decoder, Layer, Layers
from lightrm.model.gate import Gate
from lightrm.model.head import ValueHead
from lightrm.model.linear import Linear, linear_for
from lightrm.schemes.grammar import Scheme
from lightrm.schemes.int4 import Int4


def restore(
    manifest: Manifest,
    checkpoint: Checkpoint,
    placement: Placement,
    streamed: bool = False,
    advance: Advance = ignored,
) -> Loaded:
    """Map the tensors, check their sums, and put the model together. Raises CorruptFileError.

    streamed: layers are read as they are used, and checked the first time. advance: called after each placed layer.
    """
    started = time.perf_counter()
    scheme, device, twin = placement.scheme, placement.device, placement.twin
    tensors = Tensors(manifest, device, streamed)
    check_fits(tensors, checkpoint.architecture, scheme)
    head = head_of(tensors, checkpoint, manifest.post)
    checkpoint.check_config(len(head.weights[-1]) if head.weights else None)
    embedding, shared = share_equal(tensors["embedding"], None if twin is None else twin.embedding_VD)
    a = placement.applied(replace(checkpoint.architecture, vocabulary=len(embedding)))
    layers: Layers
    if streamed:
        layers = StreamedLayers(a.layers, lambda i: layer_of(tensors, i, a, scheme), device)
    else:
        layers = []
        for i in range(a.layers):
            layer, saved = share_equal(layer_of(tensors, i, a, scheme), placement.beside(i))
            layers.append(layer)
            shared += saved
            advance(1)
    watching = (tensors.file.watched.check,) if device.type == "cpu" else ()
    decoder = Decoder(a, embedding, layers, None, scheme.dtype, watching + (() if twin is None else twin.watching))
    report = LoadReport(
        seconds=time.perf_counter() - started,
        bytes=decoder.bytes,
        kernels=kernels_for(device, scheme.path),
        scheme=scheme,
        file_dtypes=(scheme.weights,),
        ignored=(),
        sqnr_db=manifest.sqnr_db,
        shared=shared,
        fidelity=manifest.fidelity,
    )
    return Loaded(decoder, head, report)


def head_of(tensors: Tensors, checkpoint: Checkpoint, post: PostStep) -> ValueHead:
    weights, biases = layers_of(tensors, "head")
    names = attribute_names(checkpoint, len(weights[-1])) if weights else ()
    gate = None
    if checkpoint.layout.gate is not None:
        factor, transform = copied(tensors["gate.factor"]), copied(tensors.get("gate.transform"))
        assert factor is not None
        gate = Gate(checkpoint.layout.gate, *layers_of(tensors, "gate"), factor, transform)
    return ValueHead(weights, biases, post, names, gate)


def layers_of(tensors: Tensors, stem: str) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor | None, ...]]:
    """Return the weights and biases of an MLP."""
    count = sum(name.startswith(f"{stem}.") and name.endswith(".weight") for name in tensors.names)
    weights = tuple(tensors[f"{stem}.{k}.weight"].clone() for k in range(count))
    return weights, tuple(copied(tensors.get(f"{stem}.{k}.bias")) for k in range(count))


def copied(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Return a tensor in memory of its own. A float product of a mapped one, which begins anywhere, may differ in its
    last bits."""
    return None if tensor is None else tensor.clone()


class Tensors:
    """The tensors of a folder by name, each checked against its sum the first time. They are mapped, or read into
    memory of their own, which is freed when a streamed layer is dropped."""

    def __init__(self, manifest: Manifest, device: torch.device, read: bool) -> None:
        self.path, self.sums, self.device = manifest.folder / WEIGHTS, manifest.sums, device
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size != manifest.bytes:
            raise CorruptFileError(f"{self.path} has {size} bytes, its manifest says {manifest.bytes}: copy it again")
        self.file = SafeFile(self.path)
        self.take = self.file.read if read else self.file.mapped
        self.names = frozenset(self.file.tensors)
        if tensor_sum(self.file.header()) != manifest.header:
            raise CorruptFileError(f"{self.path}: its header was altered: copy or quantize it again")
        if self.names != self.sums.keys():
            raise CorruptFileError(
                f"{self.path} holds other tensors than {MANIFEST} lists: copy both again, or quantize the source again"
            )
        self.checked: set[str] = set()

    def get(self, name: str) -> torch.Tensor | None:
        return self[name] if name in self.names else None

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.names:
            raise CorruptFileError(f"{self.path} lacks tensor {name!r}: quantize it again")
        tensor = self.take(name)
        if name not in self.checked and tensor_sum(tensor) != self.sums[name]:
            raise CorruptFileError(f"{self.path}: tensor {name!r} was altered: copy or quantize it again")
        self.checked.add(name)
        return tensor.to(self.device)


def check_fits(tensors: Tensors, a: Architecture, scheme: Scheme) -> None:
    """Raise CorruptFileError unless the weights have the shapes of config.json's architecture."""
    expected: dict[str, tuple[int, ...]] = {}
    found = {name: tensors.file.shape(name) for name in tensors.names}
    folded = Folding(a).norms
    layers = {name.split(".")[1] for name in found if name.startswith("layers.")}
    if len(layers) == a.layers:  # a count that no file could hold is not tried
        for i, (name, (outputs, inputs)) in itertools.product(range(a.layers), a.linears.items()):
            stem = f"layers.{i}.{name}."
            groups = found.get(stem + "multiplier", (0, 0))[-1]
            if scheme.weights == "int8":
                expected[stem + "values"] = (outputs, inputs)
            else:
                expected |= {
                    stem + "packed": (outputs, inputs // 2),
                    stem + "multiplier": (outputs, groups),
                }
            expected[stem + "scale"] = (outputs,)
            expected |= {f"layers.{i}.{norm}": (width,) for norm, width in a.norms.items() if norm not in folded}
            optional = {stem + "bias": (outputs,), stem + "shift": (inputs,)}
            expected |= {part: shape for part, shape in optional.items() if part in found}
    decoder = {name: shape for name, shape in found.items() if name.startswith("layers.")}
    if len(layers) != a.layers or decoder != expected or found.get("embedding", (0, 0))[1:] != (a.width,):
        wrong = next((n for n in sorted(decoder.keys() | expected) if decoder.get(n) != expected.get(n)), "embedding")
        raise CorruptFileError(
            f"{tensors.path} is not of the model in {CONFIG}, which has {a.layers} layers of width {a.width}: tensor "
            f"{wrong!r} has shape {found.get(wrong)}; one of the two was altered, copy or quantize them again"
        )


def layer_of(tensors: Tensors, i: int, a: Architecture, scheme: Scheme) -> Layer:
    folding = Folding(a)

    def linear(name: str, weight: Held, bias: torch.Tensor | None, shift: torch.Tensor | None) -> Linear:
        if shift is not None and not scheme.integer:  # 16-bit rows are not shifted: the bias takes it back
            assert bias is not None
            assert isinstance(weight, Int4)
            bias, shift = bias - weight.float() @ shift, None
        return linear_for(scheme, weight, bias, folding.block(name), shift)

    stem = f"layers.{i}."
    held = {name.removeprefix(stem): tensors[name] for name in tensors.file.tensors if name.startswith(stem)}
    return layer_tensors.layer_of(held, a, linear)
