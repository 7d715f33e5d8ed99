"""lightrm's own folder of a quantized model: written once, memory-mapped afterwards.

    lightrm.json          the manifest, written last: format, scheme, layout, template, checksums, where it came from
    lightrm.safetensors   the decoder's tensors in their final format, and the value head with what was folded into it
    config.json, tokenizer files, chat template: copied

Every byte has a checksum: the manifest holds those of all other files, of each tensor and of the header of the weights,
and its own. So a folder loads as it was written, or not at all. The manifest also holds the sha256 of the source files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lightrm.architecture import LINEARS, PostStep
from lightrm.checkpoints.checkpoint import Checkpoint
from lightrm.checkpoints.config import read_config
from lightrm.checkpoints.detect import LAYOUTS
from lightrm.checkpoints.families import read_architecture
from lightrm.checkpoints.safe import SafeFile
from lightrm.checkpoints.stored import (
    MANIFEST,
    check_finished,
    copy_text_files,
    text_files,
    whole_folder,
    write_safetensors,
)
from lightrm.checksums import SEAL, file_sum, sealed, tensor_sum
from lightrm.display.progress import item_progress
from lightrm.errors import CorruptFileError, SchemeError
from lightrm.files import read_json, write_json
from lightrm.judge.bounds import FidelityNote
from lightrm.kernels.operands import Parts
from lightrm.loading import layer_tensors
from lightrm.loading.placement import Loaded
from lightrm.model.decoder import Decoder
from lightrm.model.head import ValueHead
from lightrm.schemes.grammar import Scheme, parse_scheme

WEIGHTS, CONFIG, FORMAT = "lightrm.safetensors", "config.json", 4


@dataclass(frozen=True, slots=True)
class Manifest:
    """lightrm.json, read and checked.

    files: checksum of each other file. sums: of the tensors. header: checksum of the header of the weights.
    """

    folder: Path
    scheme: str
    layout: str
    template: str | None
    post: PostStep
    sums: dict[str, str]
    sqnr_db: dict[str, float]
    bytes: int
    fidelity: FidelityNote | None
    header: str
    files: dict[str, str]


def is_native(folder: Path) -> bool:
    """Whether a folder is of this kind, or was meant to be."""
    return (folder / MANIFEST).exists() or (folder / WEIGHTS).exists()


def write(folder: Path, checkpoint: Checkpoint, loaded: Loaded, template: str | None, progress: bool = False) -> None:
    """Write a loaded model. progress: show a bar. Raises CheckpointError if the destination exists, SchemeError if the
    model is not quantized."""
    decoder, head, report = loaded
    if not report.scheme.folds:
        raise SchemeError(f"{report.scheme} is not a scheme of lightrm's own folders: use w8a8, w4a8 or w4a16")
    kept = any(isinstance(getattr(decoder.layers[0], name).weight, Parts) for name in LINEARS)
    if kept or report.scheme.kind == checkpoint.holds:
        raise SchemeError("these are the file's own values, quantized already: use that folder, or another scheme")
    with whole_folder(folder) as draft:
        tensors = dict(tensors_of(decoder, head))
        with item_progress(2 * len(tensors), "tensors written and checked", progress) as advance:
            write_safetensors(draft / WEIGHTS, tensors, advance)
            sums = {}
            for name, tensor in tensors.items():
                sums[name] = tensor_sum(tensor)
                advance(1)
        config = dict(checkpoint.config.raw)
        for name in ("quantization_config", "compression_config"):
            config.pop(name, None)
        write_json(draft / CONFIG, config)
        copy_text_files(checkpoint.tokenizer_folder(), draft)
        manifest = {
            "format": FORMAT,
            "lightrm": version("lightrm"),
            "scheme": report.scheme.name,
            "layout": checkpoint.layout.name,
            "template": template,
            "head": asdict(head.post),
            "sqnr_db": report.sqnr_db,
            "bytes": (draft / WEIGHTS).stat().st_size,
            "header": tensor_sum(SafeFile(draft / WEIGHTS).header()),
            "sums": sums,
            "files": {name: file_sum(draft / name) for name in (CONFIG, *text_files(draft))},
            "sources": {path.name: sha256(path) for source in checkpoint.sources for path in source.opened},
        }
        write_json(draft / MANIFEST, sealed(manifest))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def tensors_of(decoder: Decoder, head: ValueHead) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of a quantized model, with its name in the file."""
    yield "embedding", decoder.embedding_VD
    for i in range(len(decoder.layers)):
        for name, tensor in layer_tensors.tensors_of(decoder.layers[i], decoder.architecture):
            if not name.endswith(".bias"):
                yield f"layers.{i}.{name}", tensor
            elif bool(tensor.any()):
                yield f"layers.{i}.{name}", tensor.float()
    yield from stacked("head", head.weights, head.biases)
    if (gate := head.gate) is not None:
        yield from stacked("gate", gate.weights, gate.biases)
        yield "gate.factor", gate.factor
        if gate.transform_KK is not None:
            yield "gate.transform", gate.transform_KK


def stacked(
    stem: str, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the layers of an MLP."""
    for k, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        yield f"{stem}.{k}.weight", weight
        if bias is not None:
            yield f"{stem}.{k}.bias", bias


def read_manifest(folder: Path) -> Manifest:
    """Read a manifest. Raises CorruptFileError unless the folder is complete and of a known format."""
    raw = raw_manifest(folder)
    path = folder / MANIFEST
    try:
        kept = {"probability": False} | raw["head"]  # folders of older versions hold no probabilities
        post = PostStep(kept["mean"], kept["std"], kept["negate"], kept["probability"])
        flags = isinstance(post.negate, bool) and isinstance(post.probability, bool)
        if not math.isfinite(post.mean) or not post.std > 0 or not flags:
            raise ValueError(f"the head's last step is {raw['head']}")
        sqnr = {name: float(db) for name, db in raw["sqnr_db"].items()}
        note = None
        if (measured := raw.get("fidelity")) is not None:
            note = FidelityNote.read(measured)
        return Manifest(
            folder, str(raw["scheme"]), str(raw["layout"]), raw["template"], post, dict(raw["sums"]), sqnr,
            int(raw["bytes"]), note, str(raw["header"]), dict(raw["files"]),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CorruptFileError(f"{path} is not a manifest of lightrm: {error!r}; copy or quantize it again") from error


def raw_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest's object, checked against its own checksum. Raises CorruptFileError."""
    check_finished(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise CorruptFileError(f"{folder} holds {WEIGHTS} but no {MANIFEST}: a copy is incomplete, or writing stopped")
    raw = read_json(path, CorruptFileError)
    found = raw.get("format")
    if type(found) is not int:
        raise CorruptFileError(f"{path} is not a manifest of lightrm: its format is {found!r}; copy it again")
    if raw.get(SEAL) != sealed(raw)[SEAL] and (SEAL in raw or found >= FORMAT):  # format 3 had no checksum
        raise CorruptFileError(f"{path} was altered: it does not match its own checksum; copy or quantize it again")
    if found != FORMAT:
        cure = "update lightrm" if found > FORMAT else "quantize its source again"
        raise CorruptFileError(
            f"{path} was written by lightrm {raw.get('lightrm')} in format {found}, this version reads format "
            f"{FORMAT}: {cure}"
        )
    return raw


def note_fidelity(folder: Path, note: FidelityNote) -> None:
    """Store what was measured in the manifest, whole or not at all."""
    raw = raw_manifest(folder) | {"fidelity": asdict(note)}
    write_json(folder / MANIFEST, sealed(raw))


def check_files(manifest: Manifest) -> None:
    """Raise CorruptFileError if a file beside the weights is missing, changed, or not of this folder."""
    for name in dict.fromkeys((CONFIG, *text_files(manifest.folder), *manifest.files)):
        path, expected = manifest.folder / name, manifest.files.get(name)
        try:
            found = file_sum(path) if path.is_file() else None
        except OSError as error:
            raise CorruptFileError(f"{path} cannot be read: {error.strerror or error}") from error
        if found != expected:
            what = "is missing" if found is None else "was altered" if expected else "is not a file of this folder"
            raise CorruptFileError(
                f"{path} {what}, by the checksums in {MANIFEST}: copy the folder again, or change the source and "
                "quantize that"
            )


def open_native(folder: Path) -> tuple[Manifest, Checkpoint]:
    """Return the manifest, and the folder as a Checkpoint for the text side and the repr."""
    manifest = read_manifest(folder)
    check_files(manifest)
    layout = next((layout for layout in LAYOUTS if layout.name == manifest.layout), None)
    if layout is None:
        raise CorruptFileError(
            f"{folder / MANIFEST}: there is no layout {manifest.layout!r}: update lightrm, or copy it again"
        )
    config = read_config(folder)
    own = replace(layout, template=lambda config: manifest.template)
    checkpoint = Checkpoint(folder, folder, config, read_architecture(config), own, {}, ())
    checkpoint.check_config()
    return manifest, checkpoint


def chosen_scheme(manifest: Manifest, text: str, device: torch.device) -> Scheme:
    """Return the scheme to run; the folder's own for "auto". int4 weights run with int8 or with 16-bit activations."""
    try:
        own = parse_scheme(manifest.scheme, device, f"the folder holds {manifest.scheme}")
        if not own.folds:
            raise SchemeError(f"{own} is not a scheme of lightrm's own folders")
    except (SchemeError, ValueError) as error:
        raise CorruptFileError(f"{manifest.folder / MANIFEST}: {error}") from error
    if text == "auto":
        return own
    asked = parse_scheme(text, device)
    if (asked.weights, asked.group) != (own.weights, own.group):
        raise SchemeError(f"{manifest.folder} holds {own}, which cannot become {asked}: load its source with {asked}")
    return asked
