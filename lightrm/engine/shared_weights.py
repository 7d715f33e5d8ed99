"""Two models with a common base: tensors with equal bytes are held in memory once.

Tensors in the same place of both models are compared. Any dataclass is searched for tensors, whatever it means.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch

Part = TypeVar("Part")


def share_equal(new: Part, old: Any) -> tuple[Part, int]:
    """Return `new` with its tensors replaced by those of `old` where the bytes are equal, and how many bytes that
    saves."""
    if isinstance(new, torch.Tensor):
        same = isinstance(old, torch.Tensor) and equal(new, old)
        return (old, new.nbytes) if same else (new, 0)
    if isinstance(new, tuple) and isinstance(old, tuple) and len(new) == len(old):
        pairs = [share_equal(a, b) for a, b in zip(new, old, strict=True)]
        parts: Any = tuple(part for part, _ in pairs)
        return parts, sum(saved for _, saved in pairs)
    if is_dataclass(new) and not isinstance(new, type) and type(new) is type(old):
        found = {field.name: share_equal(getattr(new, field.name), getattr(old, field.name)) for field in fields(new)}
        made = replace(new, **{name: part for name, (part, _) in found.items()})
        return made, sum(saved for _, saved in found.values())
    return new, 0


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.device == b.device and torch.equal(a, b)
