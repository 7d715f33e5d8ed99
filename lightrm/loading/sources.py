"""The kinds of folder that a model is loaded from, behind one interface: a checkpoint, lightrm's own folder, and a
checkpoint that transformers runs (`through_transformers`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lightrm.architecture import Architecture
from lightrm.checkpoints.checkpoint import Checkpoint
from lightrm.checkpoints.detect import open_checkpoint
from lightrm.checkpoints.hub import resolve
from lightrm.checkpoints.inventory import check_tensors, real_architecture
from lightrm.checkpoints.model_files import ModelFiles
from lightrm.checkpoints.output_layer_heads import PUBLISHED
from lightrm.display.progress import Advance
from lightrm.engine.memory import Room, choose_scheme
from lightrm.engine.residence import Residence, choose_residence
from lightrm.engine.scoring_engine import ScoreHead, ScoringEngine, Shape
from lightrm.errors import InputError, UnsupportedModelError
from lightrm.loading import folder_loader, quantized_folder
from lightrm.loading.attribute_choice import Weights
from lightrm.loading.calibrated_loader import loader_for
from lightrm.loading.options import EngineName, LoadOptions
from lightrm.loading.placement import Loaded, LoadReport, Placement
from lightrm.loading.through_transformers import ThroughTransformers, class_of, open_through_transformers
from lightrm.schemes.grammar import Scheme
from lightrm.text.pair_texts import Segments

Calibration = Sequence[Sequence[int]]  # token ids of texts; none where nothing is calibrated


class AnyLoaded(Protocol):
    """A loaded model and the report on it."""

    @property
    def report(self) -> LoadReport: ...
    @property
    def head(self) -> ScoreHead:
        """The whole head, with all attributes."""

    def choosing(self, label: str | None, weights: Weights | None) -> AnyLoaded:
        """Return the model with the head that gives the score that was asked for. Raises InputError."""

    def engine(self, scheme: Scheme, residence: Residence, segments: Segments | None) -> ScoringEngine:
        """Return what scores with it. segments: how token types follow from ids, for pairs of texts."""


class Source(Protocol):
    """A folder that was read as far as it can be without its weights."""

    @property
    def checkpoint(self) -> ModelFiles: ...
    @property
    def architecture(self) -> Shape: ...
    @property
    def verb(self) -> str:
        """What loading does with a layer."""

    def scheme(self, options: LoadOptions, device: torch.device, room: Room) -> Scheme:
        """Return the scheme to load in. Raises SchemeError if the one asked for cannot be had."""

    def residence(
        self, scheme: Scheme, device: torch.device, room: Room, tokens: int | None, held: int = 0
    ) -> Residence:
        """Return where the weights are while the model scores. tokens, held: as in `engine.residence`. Raises
        SchemeError if the model does not fit."""

    def load(self, placement: Placement, calibration: Calibration, streamed: bool, advance: Advance) -> AnyLoaded:
        """Read the weights. streamed: layers stay in the file; advance: called after each layer that is placed."""


@dataclass(frozen=True, slots=True)
class Published:
    """A checkpoint in the form that its trainers, or another quantizer, published it in."""

    checkpoint: Checkpoint
    architecture: Architecture
    verb: str = "loaded"

    def scheme(self, options: LoadOptions, device: torch.device, room: Room) -> Scheme:
        holds, stored = self.checkpoint.holds, self.checkpoint.stored
        return choose_scheme(options.scheme, device, self.architecture, room, options.token_budget, holds, stored)

    def residence(
        self, scheme: Scheme, device: torch.device, room: Room, tokens: int | None, held: int = 0
    ) -> Residence:
        return choose_residence(self.architecture, scheme, device, room, tokens, held)

    def load(self, placement: Placement, calibration: Calibration, streamed: bool, advance: Advance) -> Loaded:
        return loader_for(self.checkpoint, placement, calibration).load(streamed, advance)


@dataclass(frozen=True, slots=True)
class Quantized:
    """A folder that `lightrm quantize` wrote."""

    manifest: quantized_folder.Manifest
    checkpoint: Checkpoint
    verb: str = "mapped"

    @property
    def architecture(self) -> Architecture:
        return self.checkpoint.architecture

    def scheme(self, options: LoadOptions, device: torch.device, room: Room) -> Scheme:
        return quantized_folder.chosen_scheme(self.manifest, options.scheme, device)

    def residence(
        self, scheme: Scheme, device: torch.device, room: Room, tokens: int | None, held: int = 0
    ) -> Residence:
        return choose_residence(self.architecture, scheme, device, room, tokens, held)

    def load(self, placement: Placement, calibration: Calibration, streamed: bool, advance: Advance) -> Loaded:
        if calibration:
            raise InputError(f"{self.checkpoint.folder} is quantized already: pass calibration when loading its source")
        return folder_loader.restore(self.manifest, self.checkpoint, placement, streamed, advance)


def open_source(
    path_or_id: str | os.PathLike[str],
    revision: str | None = None,
    base: str | os.PathLike[str] | None = None,
    layout: str | None = None,
    engine: EngineName = "auto",
) -> Published | Quantized | ThroughTransformers:
    """Read configs, tensor names and shapes, all as for `lightrm.load`. layout: its name, if the files do not tell it.
    Raises a CheckpointError."""
    folder = resolve(path_or_id, revision)
    if quantized_folder.is_native(folder):
        if engine == "transformers":
            raise UnsupportedModelError(f"{folder} was quantized by lightrm, whose own engine alone runs it")
        opened = Quantized(*quantized_folder.open_native(folder))
        if layout not in (None, opened.manifest.layout):
            raise InputError(f"{folder} holds a model of layout {opened.manifest.layout}, and not of {layout!r}")
        return opened
    if (found := class_of(folder, engine)) is not None:
        if layout is not None or base is not None:
            raise InputError("layout and base are for models that lightrm's own decoder runs; this one has neither")
        return open_through_transformers(folder, *found)
    asked = PUBLISHED.get(str(path_or_id)) if layout is None else layout
    checkpoint = open_checkpoint(folder, os.fspath(base) if base is not None else None, asked)
    check_tensors(checkpoint)
    return Published(checkpoint, real_architecture(checkpoint))
