"""A model and the options of `lightrm.load`, as text or plain values: they cross from one process to another."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from typing import Any

from lightrm.errors import InputError
from lightrm.opening import load
from lightrm.scorer import RewardModel
from lightrm.text.columns import kind

OBJECTS = ("path_or_id", "beside", "calibration", "progress")  # the model itself, and what cannot be written down
Options = Mapping[str, Any]


def load_with(model: str | os.PathLike[str], options: Options | None = None) -> RewardModel:
    """Return the loaded model. Raises InputError on what `checked` refuses; otherwise as `lightrm.load`."""
    return load(model, **checked(model, options))


def checked(model: object, options: Options | None) -> dict[str, Any]:
    """Return the options as `lightrm.load` takes them. Raises InputError unless the model is a path or a hub id, and
    every option has a name that it takes and that can be passed between processes."""
    if not isinstance(model, str | os.PathLike):
        raise InputError(
            f"model must be a folder, a hub id or 'demo', found {kind(model)}: each process loads the model by itself"
        )
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise InputError(f"options must be a dictionary of lightrm.load's options, found {kind(options)}")
    known = [name for name in inspect.signature(load).parameters if name not in OBJECTS]
    strays = [str(name) for name in options if name not in known]
    if strays:
        raise InputError(f"options has {strays[0]!r}; those that can be passed on are {', '.join(known)}")
    return {str(name): value for name, value in options.items()}


def read_options(text: str, source: str) -> dict[str, Any]:
    """Return options that are written as a JSON object. source: who says so, for the error. Raises InputError."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InputError(f'{source} must be a JSON object such as {{"scheme": "w8a8"}}, found {text!r:.80}') from error
    if not isinstance(found, dict):
        raise InputError(f'{source} must be a JSON object such as {{"scheme": "w8a8"}}, found {text!r:.80}')
    return found
