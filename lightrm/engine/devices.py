"""Choosing the device that a model runs on, and how much memory is free there."""

from __future__ import annotations

import psutil
import torch

from lightrm.engine.residence import MOST_TOKENS
from lightrm.errors import SchemeError


def free_bytes(device: torch.device) -> int:
    """Return the memory that a model could take on a device now, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def choose_device(name: str) -> torch.device:
    """Return the device of a name; "auto" takes CUDA if there is any. Raises SchemeError if there is no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SchemeError(f"no device {name!r}: {error}") from error
    if device.type not in MOST_TOKENS:
        raise SchemeError(f"device {name!r} is not supported: lightrm runs on 'cpu' and 'cuda'")
    seen = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= seen:
        raise SchemeError(f"device {name!r} was asked for, but PyTorch sees {seen} CUDA devices")
    return device
