"""The one door to kernels: shapes and dtypes are checked here, then one implementation is chosen.

The layers above call `ops.attention(...)` and never learn what ran. `kernels_for` says which implementation a
device gets and why; the model's repr shows that sentence.

Shapes: T tokens, D width, F feed-forward width, H query heads, J key/value heads, E head width, O x I a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightrm.kernels import library
from lightrm.packing import Segment


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """Which implementation runs, with the reason in words."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}, because {self.reason}"


def kernels_for(device: torch.device) -> KernelChoice:
    return KernelChoice("torch", f"unquantized weights on {device.type} go through PyTorch's own fused routines")


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square normalization of each row (arXiv 1910.07467), (T, D) -> (T, D)."""
    check(x_TD.shape[-1:] == weight_D.shape, "rms_norm", x=x_TD, weight=weight_D)
    return library.rms_norm(x_TD, weight_D, eps)


def linear(x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias, (T, I) -> (T, O)."""
    check(x_TI.ndim == 2 and x_TI.shape[1] == weight_OI.shape[1], "linear", x=x_TI, weight=weight_OI)
    return library.linear(x_TI, weight_OI, bias_O)


def rotate(x_THE: torch.Tensor, cos_TE: torch.Tensor, sin_TE: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, half-split convention; cos and sin float32 (T, E/2)."""
    tokens, _, width = x_THE.shape
    check(cos_TE.shape == sin_TE.shape == (tokens, width // 2), "rotate", x=x_THE, cos=cos_TE, sin=sin_TE)
    return library.rotate(x_THE, cos_TE, sin_TE)


def silu_mul(gate_up_TF2: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of a row that holds gate, then up: (T, 2F) -> (T, F)."""
    check(gate_up_TF2.shape[-1] % 2 == 0, "silu_mul", gate_up=gate_up_TF2)
    return library.silu_mul(gate_up_TF2)


def attention(
    query_THE: torch.Tensor,
    key_TJE: torch.Tensor,
    value_TJE: torch.Tensor,
    segments: Sequence[Segment],
    slopes_H: torch.Tensor | None = None,
    absolute_bias: bool = False,
) -> torch.Tensor:
    """Packed causal attention over a forest of segments, (T, H, E); J divides H. See `kernels.reference`."""
    tokens, heads, width = query_THE.shape
    fits = key_TJE.shape == value_TJE.shape and key_TJE.shape[::2] == (tokens, width) and heads % key_TJE.shape[1] == 0
    check(fits, "attention", query=query_THE, key=key_TJE, value=value_TJE)
    return library.attention(query_THE, key_TJE, value_TJE, segments, slopes_H, absolute_bias)


def check(fits: bool, op: str, **tensors: torch.Tensor) -> None:
    if not fits:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"ops.{op}: the shapes do not fit together: {shapes}")
