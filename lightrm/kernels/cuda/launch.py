"""What every launch of a Triton kernel needs: the right device, contiguous rows, sizes that are powers of two.

Every launch sets enable_fp_fusion=False. A fused multiply-add rounds once instead of twice, and whether the compiler
fuses depends on its version; an int8 row would then differ from the reference where a number lies between two levels.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from triton import knobs

VERSION = triton.__version__
PRODUCT_DTYPE = torch.float16  # products between kernels: rounded to 11 bits, then to 8 when they become rows
INTERPRETED = bool(knobs.runtime.interpret)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device the current one: Triton launches there, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def whole_rows(x: torch.Tensor) -> torch.Tensor:
    """Return x with each row contiguous; rows may lie apart."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def vector(x: torch.Tensor) -> torch.Tensor:
    """Return x contiguous."""
    return x if x.stride(0) == 1 or len(x) == 1 else x.contiguous()


def check_in_place(x_TD: torch.Tensor) -> None:
    """Raise ValueError if a kernel could not write to this tensor in place."""
    if x_TD.stride(-1) != 1 and x_TD.shape[-1] != 1:
        raise ValueError(f"a tensor that is added to in place needs its rows whole, found strides {x_TD.stride()}")


def power(width: int) -> int:
    """Return the smallest power of two that is not below a width."""
    return 1 << (width - 1).bit_length()


def pieces(whole: int, piece: int) -> int:
    return -(-whole // piece)


def warps_for(block: int) -> int:
    """Return the warps of a program that holds a row of `block` numbers: about 32 numbers per thread."""
    return min(16, max(1, block // 1024))


def precision(dtype: torch.dtype) -> str:
    """Return Triton's precision for a dtype: float32 is multiplied as float32, not as tf32."""
    return "ieee" if dtype == torch.float32 else "tf32"
