"""lightrm's own folder of a quantized model: written once, mapped into memory afterwards.

    lightrm.json          the manifest, written last: format, scheme, layout, template, checksums, where it came from
    lightrm.safetensors   the decoder's tensors as held, and the value head with what was folded into it
    config.json, tokenizer files: copied

Loading maps the tensors and adds up each one: the sum of its 64-bit words is in the manifest, so a cut or altered file
is refused. It guards against accidents. The sha256 of the sources, also in the manifest, says what the weights came
from.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lightrm.architecture import Alibi, Architecture
from lightrm.bounds import FidelityNote
from lightrm.checkpoints.config import read_architecture, read_config
from lightrm.checkpoints.detect import LAYOUTS, Checkpoint
from lightrm.checkpoints.source import TensorSource
from lightrm.checkpoints.stored import (
    check_finished,
    copy_text_files,
    whole_folder,
    write_safetensors,
)
from lightrm.dispatch import kernels_for
from lightrm.errors import CorruptFileError, SchemeError
from lightrm.files import write_json
from lightrm.folding import Folding
from lightrm.heads import PostStep, ValueHead
from lightrm.linear import Linear, linear_for
from lightrm.loading import LoadReport
from lightrm.progress import Advance, ignored
from lightrm.schemes.grammar import Scheme, parse_scheme
from lightrm.schemes.int4 import Int4, dequantize
from lightrm.streaming import StreamedLayers
from lightrm.transformer import Decoder, Layer, Layers
from lightrm.twins import held_once
from lightrm.weights import ForeignWeight, Int4Weight, Int8Weight, PlainWeight

MANIFEST, WEIGHTS, FORMAT = "lightrm.json", "lightrm.safetensors", 3
READ = (2, FORMAT)  # format 2 knew no shifts
LINEARS = ("qkv", "output", "gate_up", "down")


@dataclass(frozen=True, slots=True)
class Manifest:
    """lightrm.json, read and checked."""

    folder: Path
    scheme: str
    layout: str
    template: str | None
    post: PostStep
    sums: dict[str, int]
    sqnr_db: dict[str, float]
    bytes: int
    fidelity: FidelityNote | None


def is_native(folder: Path) -> bool:
    return (folder / MANIFEST).exists() or (folder / WEIGHTS).exists()


def write(
    folder: Path, checkpoint: Checkpoint, decoder: Decoder, head: ValueHead, report: LoadReport, template: str | None
) -> None:
    """Write a loaded model. Raises CheckpointError if the destination is taken, SchemeError if it is not quantized."""
    if not report.scheme.folds:
        raise SchemeError(f"{report.scheme} is not a scheme of lightrm's own folders: use w8a8, w4a8 or w4a16")
    if any(isinstance(getattr(decoder.layers[0], name).weight, ForeignWeight) for name in LINEARS):
        raise SchemeError("these are the file's own values, quantized already: use that folder, or ask for w8a8")
    with whole_folder(folder) as draft:
        tensors = dict(tensors_of(decoder, head))
        write_safetensors(draft / WEIGHTS, tensors)
        config = dict(checkpoint.config.raw)
        config.pop("quantization_config", None)
        write_json(draft / "config.json", config)
        copy_text_files(checkpoint.tokenizer_folder(), draft)
        manifest = {
            "format": FORMAT,
            "lightrm": version("lightrm"),
            "scheme": report.scheme.name,
            "layout": checkpoint.layout.name,
            "template": template,
            "head": {"mean": head.post.mean, "std": head.post.std, "negate": head.post.negate},
            "sqnr_db": report.sqnr_db,
            "bytes": (draft / WEIGHTS).stat().st_size,
            "sums": {name: word_sum(tensor) for name, tensor in tensors.items()},
            "sources": {path.name: sha256(path) for source in checkpoint.sources for path in source.opened},
        }
        write_json(draft / MANIFEST, manifest)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def word_sum(tensor: torch.Tensor) -> int:
    """Sum of a tensor's 64-bit words, the rest bytes added, modulo 2^64 and signed: any one change shows."""
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    whole = len(flat) // 8 * 8
    words = flat[:whole]
    if words.storage_offset() % 8 or words.data_ptr() % 8:
        words = words.clone()
    total = int(words.view(torch.int64).sum()) + int(flat[whole:].sum())
    return (total + 2**63) % 2**64 - 2**63


def tensors_of(decoder: Decoder, head: ValueHead) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a quantized model, by the name it has in the file."""
    yield "embedding", decoder.embedding_VD
    for i in range(len(decoder.layers)):
        layer = decoder.layers[i]
        for name in LINEARS:
            linear = getattr(layer, name)
            for part, tensor in parts_of(linear.weight).items():
                yield f"layers.{i}.{name}.{part}", tensor
            if linear.bias_O is not None and bool(linear.bias_O.any()):
                yield f"layers.{i}.{name}.bias", linear.bias_O.float()
            if (shift_I := getattr(linear, "shift_I", None)) is not None:
                yield f"layers.{i}.{name}.shift", shift_I
    for k, (weight, bias) in enumerate(zip(head.weights, head.biases, strict=True)):
        yield f"head.{k}.weight", weight
        if bias is not None:
            yield f"head.{k}.bias", bias


def parts_of(weight: PlainWeight | Int8Weight | Int4Weight) -> dict[str, torch.Tensor]:
    if isinstance(weight, Int8Weight):
        return {"values": weight.values_OI, "scale": weight.scale_O}
    assert isinstance(weight, Int4Weight)
    held = weight.held
    return {"packed": held.packed, "multiplier": held.multiplier_OG, "scale": held.scale_O}


def read_manifest(folder: Path) -> Manifest:
    """Raises CorruptFileError on anything but a whole folder of a format that this version knows."""
    check_finished(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise CorruptFileError(f"{folder} holds {WEIGHTS} but no {MANIFEST}: a copy is incomplete, or writing stopped")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["format"] not in READ:
            cure = "update lightrm" if raw["format"] > FORMAT else "quantize its source again"
            raise CorruptFileError(
                f"{folder} was written by lightrm {raw.get('lightrm')} in format {raw['format']}, this version reads "
                f"format {FORMAT}: {cure}"
            )
        post = PostStep(raw["head"]["mean"], raw["head"]["std"], raw["head"]["negate"])
        sqnr = {name: float(db) for name, db in raw["sqnr_db"].items()}
        note = None
        if (kept := raw.get("fidelity")) and not older_note(kept):
            note = FidelityNote.read(kept)
        return Manifest(
            folder, raw["scheme"], raw["layout"], raw["template"], post, raw["sums"], sqnr, int(raw["bytes"]), note
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"{path} is not a manifest of lightrm: {error!r}; copy or quantize it again") from error


def older_note(kept: dict[str, Any]) -> bool:
    """Of a bound that nothing uses any more: the model is as good as it was, its bound has to be measured again."""
    return "bound" not in kept or isinstance(kept["bound"]["prompts"], int)


def note_fidelity(folder: Path, note: FidelityNote) -> None:
    """Keep what was measured in the manifest, whole or not at all."""
    path = folder / MANIFEST
    raw = json.loads(path.read_text(encoding="utf-8")) | {"fidelity": asdict(note)}
    write_json(path, raw)


def open_native(folder: Path) -> tuple[Manifest, Checkpoint]:
    """The manifest, and the folder in the form that the text side and the repr ask for."""
    manifest = read_manifest(folder)
    layout = next((layout for layout in LAYOUTS if layout.name == manifest.layout), None)
    if layout is None:
        raise CorruptFileError(f"{folder}: no layout {manifest.layout!r}: update lightrm")
    config = read_config(folder)
    own = replace(layout, template=lambda config: manifest.template)
    checkpoint = Checkpoint(folder, folder, config, read_architecture(config), own, {}, ())
    checkpoint.check_config()
    return manifest, checkpoint


def chosen_scheme(manifest: Manifest, text: str, device: torch.device) -> Scheme:
    """The folder's own for "auto". int4 runs with int8 or 16-bit activations, whichever it was written for."""
    own = parse_scheme(manifest.scheme, device, f"the folder holds {manifest.scheme}")
    if text == "auto":
        return own
    asked = parse_scheme(text, device)
    if (asked.weights, asked.group) != (own.weights, own.group):
        raise SchemeError(f"{manifest.folder} holds {own}, which cannot become {asked}: load its source with {asked}")
    return asked


def restore(
    manifest: Manifest,
    checkpoint: Checkpoint,
    scheme: Scheme,
    device: torch.device,
    alibi: Alibi,
    twin: Decoder | None = None,
    streamed: bool = False,
    advance: Advance = ignored,
) -> tuple[Decoder, ValueHead, LoadReport]:
    """Map the tensors, check their sums, and put the model together. Raises CorruptFileError.

    twin: a resident model whose equal tensors are taken instead; streamed: layers are read, and checked once, as they
    are used. advance: called after each layer that is placed.
    """
    started = time.perf_counter()
    tensors = Tensors(manifest, device, streamed)
    head = head_of(tensors, manifest.post)
    checkpoint.check_config(len(head.weights[-1]) if head.weights else None)
    embedding, shared = held_once(tensors["embedding"], None if twin is None else twin.embedding_VD)
    a = replace(checkpoint.architecture, vocabulary=len(embedding))
    if isinstance(a.positions, Alibi):
        a = replace(a, positions=alibi)
    layers: Layers
    if streamed:
        layers = StreamedLayers(a.layers, lambda i: layer_of(tensors, i, a, scheme), device)
    else:
        layers = []
        for i in range(a.layers):
            beside = None if twin is None or i >= len(twin.layers) else twin.layers[i]
            layer, saved = held_once(layer_of(tensors, i, a, scheme), beside)
            layers.append(layer)
            shared += saved
            advance(1)
    decoder = Decoder(a, embedding, layers, None, scheme.dtype)
    kernels = kernels_for(device, scheme.path)
    seconds = time.perf_counter() - started
    report = LoadReport(seconds, decoder.bytes, kernels, scheme, (scheme.weights,), (), manifest.sqnr_db, shared)
    report = replace(report, fidelity=manifest.fidelity)
    return decoder, head, report


def head_of(tensors: Tensors, post: PostStep) -> ValueHead:
    count = sum(name.startswith("head.") and name.endswith(".weight") for name in tensors.names)
    weights = tuple(tensors[f"head.{k}.weight"] for k in range(count))
    return ValueHead(weights, tuple(tensors.get(f"head.{k}.bias") for k in range(count)), post)


class Tensors:
    """The tensors of a folder by name, each checked against its sum the first time: mapped, or read into memory of
    their own, which is theirs alone to give back."""

    def __init__(self, manifest: Manifest, device: torch.device, read: bool) -> None:
        self.path, self.sums, self.device = manifest.folder / WEIGHTS, manifest.sums, device
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size != manifest.bytes:
            raise CorruptFileError(f"{self.path} has {size} bytes, its manifest says {manifest.bytes}: copy it again")
        self.source = TensorSource([self.path])
        self.take = self.source.read if read else self.source.mapped
        self.names = frozenset(self.source.names)
        if self.names != self.sums.keys():
            raise CorruptFileError(
                f"{self.path} holds other tensors than its manifest lists: copy or quantize it again"
            )
        self.checked: set[str] = set()

    def get(self, name: str) -> torch.Tensor | None:
        return self[name] if name in self.names else None

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.names:
            raise CorruptFileError(f"{self.path} lacks tensor {name!r}: quantize it again")
        tensor = self.take(name)
        if name not in self.checked and word_sum(tensor) != self.sums[name]:
            raise CorruptFileError(f"{self.path}: tensor {name!r} was altered: copy or quantize it again")
        self.checked.add(name)
        return tensor.to(self.device)


def layer_of(tensors: Tensors, i: int, a: Architecture, scheme: Scheme) -> Layer:
    def linear(name: str) -> Linear:
        stem = f"layers.{i}.{name}."
        block = Folding(a).gated_block if name == "down" else 1
        weight: Int8Weight | Int4Weight
        if scheme.weights == "int8":
            weight = Int8Weight(tensors[stem + "values"], tensors[stem + "scale"])
        else:
            weight = Int4Weight(Int4(*(tensors[stem + part] for part in ("packed", "multiplier", "scale"))))
        bias, shift = tensors.get(stem + "bias"), tensors.get(stem + "shift")
        if shift is not None and not scheme.integer:  # 16-bit rows are not shifted: the bias takes it back
            assert bias is not None
            assert isinstance(weight, Int4Weight)
            bias, shift = bias - dequantize(weight.held) @ shift, None
        return linear_for(scheme, weight, bias, block, shift)

    return Layer(None, linear("qkv"), linear("output"), None, linear("gate_up"), linear("down"))
