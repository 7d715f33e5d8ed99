"""Other programs' scores in a fidelity report: the same checkpoint and token ids, through transformers' own class.

    hf:fp32 hf:bf16 hf:fp16    the class in that dtype, its head in float32
    hf:nf4 hf:int8             the same, with linear layers quantized by bitsandbytes
    hf:gptq                    a GPTQ folder, as optimum loads it and GPTQModel computes it

No code of a checkpoint's own is run. Where transformers itself lacks the class, there is no such row.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version

import torch

from lightrm.display.sizes import parse_size
from lightrm.engine.devices import free_bytes
from lightrm.engine.memory import room_for
from lightrm.errors import CheckpointError, SchemeError
from lightrm.loading.options import LoadOptions
from lightrm.loading.sources import open_source
from lightrm.opening import open_model
from lightrm.schemes.grammar import OTHERS, PACKED, PROGRAM
from lightrm.scorer import RewardModel


def is_other(scheme: str) -> bool:
    """Whether a name of a scheme stands for another program's scores."""
    return scheme.startswith(PROGRAM)


def check_others(
    schemes: Sequence[str],
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    options: LoadOptions,
    device: torch.device,
) -> None:
    """Raise SchemeError if another program cannot score this model here. Only names and shapes are read.

    source: the full-precision weights; folder: the model, whose own values hf:gptq takes.
    """
    room = room_for(device, None if options.memory is None else parse_size(options.memory), free_bytes(device))
    for scheme in schemes:
        asked = asked_of(scheme, options)
        try:
            path = folder if scheme == PACKED else source
            found = open_source(path, engine="transformers")
            if scheme == PACKED and not getattr(found.checkpoint, "packed", False):
                raise SchemeError(f"{path} is no GPTQ folder")
            parsed = found.scheme(asked, device, room)
            found.residence(parsed, device, room, None)
        except SchemeError as error:
            raise SchemeError(f"{scheme} cannot run: {error}") from error
        except CheckpointError as error:
            raise refusal(scheme, error) from error


def asked_of(scheme: str, options: LoadOptions) -> LoadOptions:
    """Return the options that load a model as another program runs it. Raises SchemeError on an unknown name."""
    if scheme not in (*OTHERS, PACKED):
        raise SchemeError(f"no scheme {scheme!r}; of other programs there are {', '.join((*OTHERS, PACKED))}")
    return replace(options, scheme=OTHERS.get(scheme, "auto"), engine="transformers", layout=None)


def open_other(path: str | os.PathLike[str], scheme: str, options: LoadOptions, progress: bool) -> RewardModel:
    """Open a model as another program runs it. Raises SchemeError if that program cannot."""
    try:
        return open_model(path, asked_of(scheme, options), progress=progress)
    except CheckpointError as error:
        raise refusal(scheme, error) from error


def refusal(scheme: str, error: CheckpointError) -> SchemeError:
    return SchemeError(f"{scheme} runs transformers' own class, and no code of a checkpoint's own: {error}")


def programs(schemes: Sequence[str]) -> str:
    """Return the versions of the programs that some rows are of; empty if lightrm computes them all."""
    names = ["transformers"] if any(map(is_other, schemes)) else []
    names += ["bitsandbytes"] if {"hf:nf4", "hf:int8"} & set(schemes) else []
    names += ["optimum", "gptqmodel"] if PACKED in schemes else []
    return ", ".join(f"{name} {version(name)}" for name in names)
