"""The passes in plain PyTorch, where no kernel of ours runs: `integer` for int8, PyTorch's routines for floats."""

from lightrm.kernels.integer import (
    add_norm_quantize,
    add_normed,
    add_sums,
    gated_quantize,
    norm_quantize,
    quantize,
    split_heads,
    widen,
)
from lightrm.kernels.library import gated, norm_each, rms_norm, value_head

__all__ = [
    "add_norm_quantize", "add_normed", "add_sums", "gated", "gated_quantize", "norm_each", "norm_quantize", "quantize",
    "rms_norm", "split_heads", "value_head", "widen",
]  # fmt: skip
