"""Where and in which form a loader places a model, and its report afterwards."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from lightrm.architecture import Alibi, Architecture
from lightrm.checkpoints.detect import listed
from lightrm.display.sizes import size_text
from lightrm.engine.engine import Engine
from lightrm.engine.residence import Residence
from lightrm.judge.bounds import FidelityNote
from lightrm.kernels.dispatch import KernelChoice
from lightrm.loading.attribute_choice import Weights, chosen
from lightrm.model.decoder import Decoder, Layer
from lightrm.model.head import ValueHead
from lightrm.schemes.grammar import Scheme
from lightrm.text.pair_texts import Segments


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and in which form a model is placed.

    alibi: the position table, for a model with ALiBi. twin: a resident model; tensors equal to its own are shared.
    draft: folder in which a calibration keeps what it has finished; None keeps nothing.
    """

    scheme: Scheme
    device: torch.device
    alibi: Alibi = field(default_factory=Alibi)
    twin: Decoder | None = None
    draft: Path | None = None

    def beside(self, i: int) -> Layer | None:
        """Return the twin's layer i."""
        return None if self.twin is None or i >= len(self.twin.layers) else self.twin.layers[i]

    def applied(self, a: Architecture) -> Architecture:
        """Return the architecture with the position table that was asked for."""
        return replace(a, positions=self.alibi) if isinstance(a.positions, Alibi) else a


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What loading did.

    seconds: wall time.
    bytes: of the weights in memory, without streamed layers. shared: how many of them another model holds too.
    ignored: tensors of the file that a scorer does not need.
    sqnr_db: signal to quantization noise of each matrix by our names, in dB, inf if nothing was lost.
    fidelity: what was measured of a quantized folder, if anything.
    calibration: how much text was used for calibration, in words.
    """

    seconds: float
    bytes: int
    kernels: KernelChoice
    scheme: Scheme
    file_dtypes: tuple[str, ...]
    ignored: tuple[str, ...]
    sqnr_db: dict[str, float] = field(default_factory=dict)
    shared: int = 0
    fidelity: FidelityNote | None = None
    calibration: str = ""

    @property
    def worst(self) -> tuple[str, float] | None:
        """The matrix with the lowest SQNR; None if all are exact."""
        lossy = {name: db for name, db in self.sqnr_db.items() if math.isfinite(db)}
        return min(lossy.items(), key=lambda item: item[1]) if lossy else None

    def __str__(self) -> str:
        ignored = f"; ignored {listed(self.ignored, 3)}" if self.ignored else ""
        worst = f"; least SQNR {self.worst[1]:.1f} dB, {self.worst[0]}" if self.worst else ""
        shared = f", {size_text(self.shared)} of it shared," if self.shared else ""
        calibrated = f", calibrated on {self.calibration}" if self.calibration else ""
        return (
            f"{size_text(self.bytes)}{shared} as {self.scheme} ({self.scheme.reason}){calibrated} from "
            f"{'/'.join(self.file_dtypes)} in {self.seconds:.1f} s; kernels: {self.kernels}{worst}{ignored}"
        )


class Loaded(NamedTuple):
    """A loaded model and the report on it."""

    decoder: Decoder
    head: ValueHead
    report: LoadReport

    def choosing(self, label: str | None, weights: Weights | None) -> Loaded:
        """Return the model with the head that gives the score that was asked for. Raises InputError."""
        return self._replace(head=chosen(self.head, label, weights))

    def engine(self, scheme: Scheme, residence: Residence, segments: Segments | None) -> Engine:
        """Return what scores with it. segments: of token types, which a decoder does not have."""
        return Engine(self.decoder, self.head, scheme, residence)
