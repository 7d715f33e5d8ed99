"""What every launch of a Triton kernel needs: the right device, whole rows, sizes that are powers of two.

Every launch sets enable_fp_fusion=False: a product and a sum that a compiler joins round once instead of twice, by its
mood and version, and a row of int8 would then differ from its twin where a number lies between two levels.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from triton import knobs

VERSION = triton.__version__
ON_CARD = torch.float16  # products between kernels: rounded to 11 bits, then to 8 when they become rows
INTERPRETED = bool(knobs.runtime.interpret)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its tensors lie on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def whole_rows(x: torch.Tensor) -> torch.Tensor:
    """A row's numbers side by side; rows may lie apart."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def vector(x: torch.Tensor) -> torch.Tensor:
    """A vector's numbers side by side."""
    return x if x.stride(0) == 1 or len(x) == 1 else x.contiguous()


def check_in_place(x_TD: torch.Tensor) -> None:
    """Raises ValueError if a kernel could not write into it where it lies."""
    if x_TD.stride(-1) != 1 and x_TD.shape[-1] != 1:
        raise ValueError(f"a tensor that is added to in place needs its rows whole, found strides {x_TD.stride()}")


def power(width: int) -> int:
    """The least power of two that holds it."""
    return 1 << (width - 1).bit_length()


def pieces(whole: int, piece: int) -> int:
    return -(-whole // piece)


def warps_for(block: int) -> int:
    """For a program that holds a row of `block` numbers: some 32 of them a thread."""
    return min(16, max(1, block // 1024))


def precision(dtype: torch.dtype) -> str:
    """float32 tensors are multiplied as float32, not as tf32."""
    return "ieee" if dtype == torch.float32 else "tf32"
