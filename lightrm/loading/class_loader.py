"""Weights into a class of transformers: read by transformers from a local folder, checked, never by remote code.

bitsandbytes' schemes go through transformers' BitsAndBytesConfig, with the settings that the schemes of the same names
have in lightrm: double quantization for nf4, and an outlier threshold of 6 for bnb-int8. The head stays in float.
A GPTQ file brings its settings in its config: optimum puts GPTQModel's layers into the class.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from importlib import import_module, metadata
from itertools import chain
from typing import Any

import torch

from lightrm.checkpoints.class_checkpoint import ClassCheckpoint
from lightrm.checkpoints.detect import listed
from lightrm.checkpoints.head_outputs import label_names
from lightrm.checkpoints.named_class import INSTALL, version
from lightrm.engine.class_head import ClassHead
from lightrm.engine.class_memory import token_bytes
from lightrm.engine.padded_batches import Forward, Grouping, find_grouping
from lightrm.engine.padded_engine import PaddedEngine
from lightrm.engine.residence import Residence
from lightrm.errors import CheckpointError, NumericsError, SchemeError, TensorMismatchError
from lightrm.kernels.dispatch import KernelChoice
from lightrm.loading.attribute_choice import Weights, chosen
from lightrm.loading.class_outline import Outline, config_object, first
from lightrm.loading.placement import LoadReport, Placement
from lightrm.model.class_forward import ClassForward, PooledForward
from lightrm.schemes.grammar import Scheme
from lightrm.text.checkpoint_tokenizer import quiet
from lightrm.text.pair_texts import Segments

OUTLIER = 6.0
SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "mask_token_id")
# What training leaves in a file: an output layer, buffers of old versions, a pooler that this class does not have.
UNUSED = re.compile(
    r"lm_head\..+|embed_out\.weight|cls\.(predictions|seq_relationship)\..+|(lm|mask)_predictions\..+|(.*\.)?pooler\..+|"
    r"(.*\.)?(position_ids|token_type_ids|masked_bias|attention\.bias|attn\.bias|rotary_emb\.inv_freq)"
)


@dataclass(frozen=True, slots=True)
class LoadedClass:
    """A class of transformers with its weights, and the report on it."""

    forward: Forward
    outline: Outline
    device: torch.device
    grouping: Grouping
    pad: int
    report: LoadReport

    head: ClassHead

    def choosing(self, label: str | None, weights: Weights | None) -> LoadedClass:
        """Return the model with the head that gives the score that was asked for. Raises InputError."""
        return replace(self, head=chosen(self.head, label, weights))

    def engine(self, scheme: Scheme, residence: Residence, segments: Segments | None) -> PaddedEngine:
        each = token_bytes(self.outline, scheme)
        return PaddedEngine(
            self.forward, self.outline, self.head, scheme, self.device, residence, each, self.grouping, self.pad,
            self.outline.takes_types, segments,
        )  # fmt: skip


def load_class(checkpoint: ClassCheckpoint, outline: Outline, placement: Placement, why: str) -> LoadedClass:
    """Load a model. why: transformers runs it. Raises TensorMismatchError if the file lacks a tensor of the class or
    holds one that the class does not know, NumericsError if a weight is not finite."""
    started = time.perf_counter()
    scheme, device = placement.scheme, placement.device
    module, unexpected = read_module(checkpoint, outline, scheme, device)
    module.eval().requires_grad_(False)
    check_finite(checkpoint, module)
    forward: Forward
    if checkpoint.named.pooling is None:
        forward = ClassForward(module, outline.takes_types, parts_of(outline.head))
    else:
        weight, bias = (checkpoint.source.read(f"out_proj.{kind}").to(device).float() for kind in ("weight", "bias"))
        forward = PooledForward(module, weight, bias, checkpoint.named.pooling)
    pad = outline.pad if outline.pad is not None else 0
    config = checkpoint.config
    special = [i for name in SPECIAL_IDS if isinstance(i := config.raw.get(name), int)]
    try:
        grouping = find_grouping(
            forward, outline.vocabulary, [*special, pad], pad, outline.takes_types, device,
            torch.finfo(scheme.dtype).eps, outline.length_matters,
        )  # fmt: skip
    except Exception as error:  # of any kind: it is the class that raises it
        raise CheckpointError(f"{config.path}: {outline.name} does not score a text: {first(error)}") from error
    layers = f" with the layers of GPTQModel {metadata.version('gptqmodel')}" if checkpoint.packed else ""
    report = LoadReport(
        seconds=time.perf_counter() - started,
        bytes=sum(part.nbytes for part in chain(module.parameters(), module.buffers())),
        kernels=KernelChoice(f"transformers {version()}{layers}, {GROUPED[grouping]}", why),
        scheme=scheme,
        file_dtypes=tuple(sorted(checkpoint.stored)),
        ignored=unexpected,
    )
    return LoadedClass(forward, outline, device, grouping, pad, report, head_of(checkpoint, outline))


def head_of(checkpoint: ClassCheckpoint, outline: Outline) -> ClassHead:
    """Return the head in words, with the names of its outputs if there are several."""
    weights = [name for name in outline.head if "weight" in name]
    outputs = checkpoint.source.shape(weights[-1])[0]
    names = label_names(checkpoint.config, outputs) if outputs > 1 else ()
    return ClassHead(", ".join(f"{name} {outline.tensors[name]}" for name in weights), names)


GROUPED = {
    "padded": "padded batches",
    "equal lengths": "batches of one length, since its scores change with padding",
    "alone": "one text at a time, since it takes no batch",
}


def read_module(
    checkpoint: ClassCheckpoint, outline: Outline, scheme: Scheme, device: torch.device
) -> tuple[Any, tuple[str, ...]]:
    """Return the class with its weights on a device, and the names of tensors that it does not need."""
    transformers = import_module("transformers")
    made = getattr(transformers, checkpoint.named.runs)
    dtype = "dtype" if int(version().split(".")[0]) >= 5 else "torch_dtype"
    options: dict[str, Any] = {dtype: scheme.dtype}
    placed = checkpoint.packed or scheme.path == "bitsandbytes"  # by transformers, while it quantizes or unpacks
    options |= {"device_map": {"": str(device)}} if placed else {}
    if scheme.path == "bitsandbytes":
        options |= {"quantization_config": quantization(transformers, outline, scheme)}
    safe = all(path.suffix == ".safetensors" for path in checkpoint.source.opened)
    with quiet_loading(transformers), redirect_stdout(sys.stderr):  # where GPTQModel's log belongs
        try:
            module, info = made.from_pretrained(
                str(checkpoint.folder), config=config_object(checkpoint.config, checkpoint.named),
                local_files_only=True, use_safetensors=safe, output_loading_info=True, **options,
            )  # fmt: skip
        except ImportError as error:
            raise SchemeError(f"{scheme} cannot run through transformers: {first(error)}; {INSTALL}") from error
        except (RuntimeError, ValueError, OSError) as error:
            raise TensorMismatchError(
                f"{checkpoint.folder}: {checkpoint.named.runs} cannot be read: {first(error)}"
            ) from error
    head = set(outline.head) if checkpoint.named.pooling is not None else set()
    check_loaded(checkpoint, set(info["missing_keys"]), set(info["unexpected_keys"]) - head, info["mismatched_keys"])
    unexpected = tuple(sorted(set(info["unexpected_keys"]) - head))
    return (module if placed else module.to(device)), unexpected


def quantization(transformers: Any, outline: Outline, scheme: Scheme) -> Any:
    """Return transformers' settings of a scheme of bitsandbytes. The parts of the head are named, and stay in float."""
    parts = parts_of(outline.head)
    if scheme.weights == "int8":
        return transformers.BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=OUTLIER, llm_int8_skip_modules=parts
        )
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=scheme.dtype, llm_int8_skip_modules=parts,
    )  # fmt: skip


def parts_of(head: Sequence[str]) -> list[str]:
    return sorted({name.partition(".")[0] for name in head})


def check_loaded(checkpoint: ClassCheckpoint, missing: set[str], unexpected: set[str], mismatched: Any) -> None:
    """Raise TensorMismatchError unless the file's tensors are those of the class."""
    name = checkpoint.named.runs
    if missing:
        raise TensorMismatchError(
            f"{checkpoint.folder}: {len(missing)} tensors of {name} are missing: {listed(sorted(missing))}; a shard is "
            "incomplete, or config.json belongs to another model"
        )
    if mismatched:
        raise TensorMismatchError(
            f"{checkpoint.folder}: tensors of other shapes than {name} has: {list(mismatched)[:3]}"
        )
    strange = sorted(tensor for tensor in unexpected if not UNUSED.fullmatch(tensor))
    if strange:
        raise TensorMismatchError(
            f"{checkpoint.folder}: {name} has no place for {listed(strange)}: is config.json another model's?"
        )


def check_finite(checkpoint: ClassCheckpoint, module: torch.nn.Module) -> None:
    for name, part in chain(module.named_parameters(), module.named_buffers()):
        if part.is_floating_point() and "inv_freq" not in name and not bool(torch.isfinite(part).all()):
            raise NumericsError(f"{checkpoint.folder}: {name} holds NaN or Inf values")


@contextmanager
def quiet_loading(transformers: Any) -> Iterator[None]:
    """Suppress what transformers and bitsandbytes print while they load."""
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        with quiet(transformers):
            yield
    finally:
        if shown:
            bars.enable_progress_bar()
