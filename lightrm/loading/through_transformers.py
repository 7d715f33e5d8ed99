"""The third kind of folder that a model is loaded from: one that only transformers' own classes can run.

It is the way for every model type that lightrm has no decoder for, and, if asked for, for those that it has: then
transformers is the reference that lightrm's own decoder can be compared with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lightrm.checkpoints.class_checkpoint import ClassCheckpoint, open_class_checkpoint
from lightrm.checkpoints.config import Config, read_config, shown
from lightrm.checkpoints.detect import LAYOUTS, listed
from lightrm.checkpoints.families import read_architecture
from lightrm.checkpoints.head_outputs import check_outputs
from lightrm.checkpoints.named_class import OPEN_ASSISTANT, NamedClass, named_class
from lightrm.display.progress import Advance
from lightrm.engine.class_memory import class_residence, class_scheme, packed_scheme
from lightrm.engine.memory import Room
from lightrm.engine.residence import Residence
from lightrm.errors import InputError, MissingHeadError, TensorMismatchError, UnsupportedModelError
from lightrm.loading.class_loader import LoadedClass, load_class
from lightrm.loading.class_outline import Outline, outline_of
from lightrm.loading.options import EngineName, LoadOptions
from lightrm.loading.placement import Placement
from lightrm.schemes.grammar import Scheme

Calibration = Sequence[Sequence[int]]
ASKED = "asked for"  # why transformers runs a model, if the caller said so


@dataclass(frozen=True, slots=True)
class ThroughTransformers:
    """architecture: the outline of the class. why: transformers runs it."""

    checkpoint: ClassCheckpoint
    architecture: Outline
    why: str
    verb: str = "loaded"

    def scheme(self, options: LoadOptions, device: torch.device, room: Room) -> Scheme:
        a, stored = self.architecture, self.checkpoint.stored
        if self.checkpoint.packed:
            return packed_scheme(options.scheme, device, a.name)
        return class_scheme(options.scheme, a, device, room, options.token_budget, stored, a.name)

    def residence(
        self, scheme: Scheme, device: torch.device, room: Room, tokens: int | None, held: int = 0
    ) -> Residence:
        weights = self.checkpoint.bytes() if self.checkpoint.packed else None
        return class_residence(self.architecture, scheme, device, room, tokens, weights)

    def load(self, placement: Placement, calibration: Calibration, streamed: bool, advance: Advance) -> LoadedClass:
        if calibration:
            raise InputError(
                f"{self.architecture.name} runs in transformers, where lightrm rounds nothing to calibrate"
            )
        if placement.twin is not None:
            raise InputError(
                f"{self.architecture.name} runs in transformers, which shares no tensors: load it without beside="
            )
        found = load_class(self.checkpoint, self.architecture, placement, self.why)
        advance(self.architecture.layers)
        return found


def class_of(folder: Path, engine: EngineName) -> tuple[Config, NamedClass, str] | None:
    """Return the config, the class that transformers has for it, and why transformers runs it; None if lightrm's own
    decoder does, or should say what is wrong.

    Raises UnsupportedModelError if neither can.
    """
    if engine != "transformers" and not (folder / "config.json").is_file():
        return None
    config = read_config(folder)
    if engine == "transformers":
        return config, named_class(config, asked=True), ASKED
    try:
        read_architecture(config)
    except UnsupportedModelError as error:
        try:
            named = named_class(config, asked=False)
        except UnsupportedModelError as other:
            raise UnsupportedModelError(f"{error}; and through transformers: {other}") from error
        if engine == "lightrm":
            raise UnsupportedModelError(f"{error}; transformers has its class: engine='transformers'") from error
        return config, named, f"lightrm's own decoder does not run it: {reason(str(error), config)}"
    return None


def reason(error: str, config: Config) -> str:
    """Return why lightrm's own decoder does not run a model, in short."""
    return error.removeprefix(f"{config.path}: ").partition(";")[0]


def open_through_transformers(folder: Path, config: Config, named: NamedClass, why: str) -> ThroughTransformers:
    """Read names and shapes, and compare them with the class's. Raises a CheckpointError."""
    own = sorted(name for layout in LAYOUTS for name in layout.fields if config.has(name))
    if own and named.name != OPEN_ASSISTANT:
        raise UnsupportedModelError(
            f"{config.path} has {own[0]} {shown(config.raw[own[0]])}, which the code of its trainer reads and "
            f"{named.name} does not: its scores would be others"
        )
    checkpoint = open_class_checkpoint(folder, config, named, why == ASKED)
    outline = outline_of(config, named)
    source = checkpoint.source
    missing = [name for name in outline.head if name not in source.names]
    if missing:
        raise MissingHeadError(
            f"{folder}: {named.name} has its head in {listed(outline.head)}, and the weights do not hold "
            f"{listed(missing)}: a model without a trained head is no reward model"
        )
    last = [name for name in outline.head if name.endswith(".weight")][-1]
    check_outputs(config, last, source.shape(last)[0], checkpoint.layout)
    for name, shape in outline.tensors.items():
        if name in source.names and source.shape(name) != shape:
            raise TensorMismatchError(
                f"{folder}: {name} has shape {source.shape(name)}, {named.name} with this config.json asks for {shape}"
            )
    return ThroughTransformers(checkpoint, outline, why)


def stored_parameters(checkpoint: ClassCheckpoint) -> int:
    """Return how many numbers the weight files hold, by their headers."""
    return sum(math.prod(checkpoint.source.shape(name)) for name in checkpoint.source.names)
