"""A checkpoint -> a folder of GPTQ files (version 1), for auto-gptq, GPTQModel, optimum and other tools that read them.

    model.safetensors      each matrix of a layer as qweight, qzeros, scales and g_idx; every other tensor as it was
    config.json            the source's, with a quantization_config; the same settings in quantize_config.json
    head and text files    as they were

4 or 8 bits, symmetric, one group size for all, no activation order: what the kernels of all these tools run. Weights
are not rotated, since other programs know no rotation. lightrm reads the folder back under `w4a16`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from lightrm.architecture import LINEARS, Architecture
from lightrm.checkpoints.checkpoint import Checkpoint
from lightrm.checkpoints.detect import HEAD_FILES, open_checkpoint
from lightrm.checkpoints.hub import resolve
from lightrm.checkpoints.inventory import real_architecture
from lightrm.checkpoints.stored import check_free, copy_text_files, whole_folder, write_safetensors
from lightrm.display.progress import item_progress
from lightrm.engine.devices import choose_device
from lightrm.errors import CheckpointError, SchemeError
from lightrm.files import write_json
from lightrm.kernels.operands import Parts
from lightrm.loading.calibrated_loader import CompensatingLoader
from lightrm.loading.gptq_rounding import compensated_grouped
from lightrm.loading.loader import Loader
from lightrm.loading.options import LoadOptions
from lightrm.loading.packers import Packer, WholePacker
from lightrm.loading.placement import LoadReport, Placement
from lightrm.loading.quantized_folder import is_native
from lightrm.loading.symmetric import Factor
from lightrm.loading.text_side import text_side
from lightrm.model.decoder import Decoder, Layer
from lightrm.schemes import grouped
from lightrm.schemes.grammar import parse_scheme
from lightrm.text.conversation import Prompt

FOUR, EIGHT = "w4a16", "w8a16"  # eight bits are a form of these files, and no scheme that lightrm rounds to
WIDTHS = 32  # auto-gptq's layers take widths that are multiples of it


def export_gptq(
    path_or_id: str | os.PathLike[str],
    destination: Path,
    *,
    scheme: str = "w4a16",
    device: str = "auto",
    template: str | None = None,
    revision: str | None = None,
    calibration: Iterable[tuple[Prompt, str]] | None = None,
    calibration_tokens: int | None = None,
    progress: bool = False,
    draft: Path | None = None,
) -> LoadReport:
    """Quantize a checkpoint and write it as GPTQ files; arguments as for `lightrm.load`.

    scheme: "w4a16", or "w8a16" for values of 8 bits, with an optional -gN. draft: folder in which a calibration keeps
    what it has finished, and from which a stopped one goes on.

    Raises CheckpointError if the destination exists or the source is quantized, SchemeError for another scheme or for
    widths that the format does not support.
    """
    check_free(destination)
    place = choose_device(device)
    bits = 8 if scheme.startswith(EIGHT) else 4
    wanted = replace(parse_scheme(scheme.replace(EIGHT, FOUR, 1), place), name=scheme)
    if wanted.kind not in (EIGHT, FOUR):
        raise SchemeError(
            f"GPTQ files hold 4- or 8-bit weights for 16-bit activations: ask for {FOUR}[-gN] or {EIGHT}[-gN], not "
            f"{wanted}"
        )
    folder = resolve(path_or_id, revision)
    if is_native(folder):
        raise CheckpointError(f"{folder} is quantized already: export its source")
    checkpoint = open_checkpoint(folder)
    if checkpoint.holds is not None:
        raise CheckpointError(f"{folder} is quantized already ({checkpoint.holds}): export its source")
    group = common_group(checkpoint.architecture, wanted.group)
    text = text_side(checkpoint, real_architecture(checkpoint), LoadOptions(template=template))
    ids = [] if calibration is None else text.first_texts(calibration, calibration_tokens)
    with item_progress(checkpoint.architecture.layers, "layers rounded", progress) as advance:
        loaded = GptqLoader(checkpoint, Placement(wanted, place, draft=draft), ids, group, bits).load(advance=advance)
    write(destination, checkpoint, loaded.decoder, group, bits)
    return loaded.report


def common_group(a: Architecture, asked: int) -> int:
    """Return the largest power of two up to `asked` that divides the inputs of every layer."""
    widths = (a.width, a.query_width, a.kv_width, a.ffn_width)
    if any(width % WIDTHS for width in widths):
        raise SchemeError(f"GPTQ tools take widths that are multiples of {WIDTHS}, this model has {widths}")
    group = asked
    while any(inputs % group for _, inputs in a.linears.values()):
        group //= 2
    return group


class GptqLoader(CompensatingLoader):
    """Rounds to the values of GPTQ files, compensated if there is calibration text. Folds and rotates nothing.

    Biases stay as the file has them: other programs cannot load one if the architecture has none.
    """

    corrects = False

    def __init__(
        self, checkpoint: Checkpoint, placement: Placement, calibration: Sequence[Sequence[int]], group: int, bits: int
    ) -> None:
        super().__init__(checkpoint, placement, calibration)
        self.folding, self.group, self.bits = None, group, bits

    def layers(self, embedding_VD: torch.Tensor) -> list[Layer]:
        return super().layers(embedding_VD) if self.packs else Loader.layers(self, embedding_VD)

    def packer(self, outputs: int, inputs: int) -> Packer | WholePacker:
        return WholePacker(partial(grouped.quantize, group=self.group, bits=self.bits), self.device)

    def compensated(
        self, packer: Packer | WholePacker, start: int, weight_OI: torch.Tensor, factor: Factor
    ) -> torch.Tensor:
        made, lost_OI = compensated_grouped(weight_OI, factor, self.group, self.bits)
        assert isinstance(packer, WholePacker)
        packer.place(start, made)
        return lost_OI


def write(folder: Path, checkpoint: Checkpoint, decoder: Decoder, group: int, bits: int) -> None:
    """Write a model whose layers are in GPTQ's format. The layers are dropped one by one."""
    settings = {
        "bits": bits,
        "group_size": group,
        "damp_percent": 0.01,
        "desc_act": False,
        "static_groups": False,
        "sym": True,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": "model",
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "meta": {"quantizer": [f"lightrm:{version('lightrm')}"]},
    }
    with whole_folder(folder) as draft:
        tensors = dict(packed_tensors(checkpoint, decoder))
        tensors |= dict(other_tensors(checkpoint))
        write_safetensors(draft / "model.safetensors", tensors)
        for place in dict.fromkeys((checkpoint.base_folder, checkpoint.folder)):
            for name in HEAD_FILES:
                if (place / name).is_file():
                    shutil.copyfile(place / name, draft / name)
        copy_text_files(checkpoint.tokenizer_folder(), draft)
        write_json(draft / "quantize_config.json", settings)
        write_json(draft / "config.json", checkpoint.config.raw | {"quantization_config": settings})


def packed_tensors(checkpoint: Checkpoint, decoder: Decoder) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the matrices of the layers under the file's names. A layer is dropped once it is done."""
    fused, layers = decoder.architecture.parts, decoder.layers
    assert isinstance(layers, list)
    for i in range(decoder.architecture.layers):
        layer = layers.pop(0)
        for name in LINEARS:
            weight = getattr(layer, name).weight
            assert isinstance(weight, Parts)
            joined = grouped.joined([part for part in weight.parts if isinstance(part, grouped.Grouped)])
            whole = f"layers.{i}.{name}.weight"
            parts = {whole: joined.shape[0]}
            if (order_O := checkpoint.order(whole)) is not None:
                joined = joined.reordered(order_O.argsort())  # as the file has them
            if whole not in checkpoint.tensors:
                parts = {f"layers.{i}.{part}.weight": rows for part, rows in fused[name].items()}
            start = 0
            for ours, count in parts.items():
                stem = checkpoint.tensors[ours][1].removesuffix(".weight")
                yield from layer_tensors(stem, grouped.columns(joined, start, start + count))
                start += count


def layer_tensors(stem: str, weight: grouped.Grouped) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield one layer in the format of `checkpoints.gptq_files`; version 1 stores zero points minus one."""
    yield f"{stem}.qweight", weight.packed.cpu().contiguous()
    yield f"{stem}.qzeros", grouped.pack_words(weight.zero_GO.cpu() - 1, weight.bits)
    yield f"{stem}.scales", weight.scale_GO.cpu().contiguous()
    yield f"{stem}.g_idx", weight.group_I.to("cpu", torch.int32)


def other_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield embedding, norms, biases and the head as they were. A head in a file of its own is copied with that
    file."""
    adapter = checkpoint.adapter
    plain = {} if adapter is None else {stored: name for name, stored in adapter.replaced.items()}
    for ours, (source, foreign) in checkpoint.tensors.items():
        matrix = ours.startswith("layers.") and ours.endswith(".weight") and "norm" not in ours
        if not matrix and not any(path.name in HEAD_FILES for path in source.opened):
            yield plain.get(foreign, foreign), checkpoint.read(ours)
