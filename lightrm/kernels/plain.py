"""The passes in plain PyTorch, where no kernel of ours runs: `integer` for int8, PyTorch's routines for floats."""

from lightrm.kernels.integer import (
    add_norm_quantize,
    add_sums,
    norm_quantize,
    quantize,
    silu_mul_quantize,
    split_heads,
    widen,
)
from lightrm.kernels.library import norm_each, rms_norm, silu_mul, value_head

__all__ = [
    "add_norm_quantize", "add_sums", "norm_each", "norm_quantize", "quantize", "rms_norm", "silu_mul",
    "silu_mul_quantize", "split_heads", "value_head", "widen",
]  # fmt: skip
