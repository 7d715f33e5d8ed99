"""What everyone but a loader asks of a model's files, whichever engine runs the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from lightrm.checkpoints.config import Config
from lightrm.checkpoints.score_position import Reading
from lightrm.checkpoints.source import TensorSource
from lightrm.text.templates import Ending


class Named(Protocol):
    """The kind of a checkpoint. ending, whole, steps, asked: as in `checkpoints.layout`."""

    @property
    def name(self) -> str: ...
    @property
    def describes(self) -> str: ...
    @property
    def ending(self) -> Ending: ...
    @property
    def whole(self) -> bool: ...
    @property
    def steps(self) -> str: ...
    @property
    def asked(self) -> bool: ...


class ModelFiles(Protocol):
    """A model folder. sources: its weights. template: name of its prompt template, None if unknown."""

    @property
    def folder(self) -> Path: ...
    @property
    def base_folder(self) -> Path: ...
    @property
    def config(self) -> Config: ...
    @property
    def layout(self) -> Named: ...
    @property
    def sources(self) -> tuple[TensorSource, ...]: ...
    @property
    def template(self) -> str | None: ...
    @property
    def reading(self) -> Reading: ...
    @property
    def reward_id(self) -> int | None: ...

    @property
    def inner(self) -> Mapping[str, Any] | None:
        """The settings of a file that holds its own tokenizer."""

    def tokenizer_folder(self) -> Path: ...
    def bytes(self) -> int: ...
