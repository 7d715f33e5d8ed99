"""The options of `lightrm.load` as one record. A reference model is opened with a changed copy of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from numbers import Integral
from typing import Literal, get_args

from lightrm.engine.step_scores import REDUCERS
from lightrm.errors import InputError
from lightrm.loading.attribute_choice import Weights
from lightrm.text.conversation import text_of

Table = Literal["relative", "absolute"]
EngineName = Literal["auto", "lightrm", "transformers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """The options of `lightrm.load`, where each is described. Raises InputError on a value that is never allowed."""

    scheme: str = "auto"
    engine: EngineName = "auto"
    device: str = "auto"
    template: str | None = None
    max_length: int | None = None
    strict: bool = False
    parse_specials: bool = False
    alibi: Table = "relative"
    revision: str | None = None
    base: str | os.PathLike[str] | None = None
    token_budget: int | None = None
    memory: str | int | None = None
    layout: str | None = None
    label: str | None = None
    weights: Weights | None = None
    reduce: str | None = None
    system: str | None = None

    def __post_init__(self) -> None:
        if self.alibi not in get_args(Table):
            raise InputError(f"alibi must be {' or '.join(map(repr, get_args(Table)))}, found {self.alibi!r}")
        if self.reduce is not None and self.reduce not in REDUCERS:
            raise InputError(f"reduce must be one of {', '.join(map(repr, REDUCERS))}, found {self.reduce!r}")
        if self.system is not None:
            text_of(self.system, "system")
        if self.engine not in get_args(EngineName):
            raise InputError(f"engine must be {', '.join(map(repr, get_args(EngineName)))}, found {self.engine!r}")
        if self.token_budget is not None:
            positive("token_budget", self.token_budget)


def positive(name: str, value: int) -> int:
    """Return a whole number of 1 or more. Raises InputError on anything else."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} must be a positive whole number, found {value!r}")
    return int(value)
