"""The truth of the integer path: int8 activations and weights, int32 sums, in plain PyTorch on any device. Slow.

An int8 row stands for `values * scale`; a product `acc` of such rows with an int8 weight stands for
`acc * row_scale_T * scale_O + bias_O`. T tokens, D width, F feed-forward width, O x I a weight, G groups along I.
"""

from __future__ import annotations

import torch

from lightrm.kernels import reference
from lightrm.schemes import int4
from lightrm.schemes.hadamard import hadamard
from lightrm.schemes.int8 import quantize_rows

quantize = quantize_rows


def norm_quantize(
    x_TD: torch.Tensor, eps: float, shift_D: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm without a weight, then int8: the norm only scales a row, so it goes into the scale.

    shift_D: taken off the normed row before it is rounded; the reader's bias gives back what it is worth.
    """
    shrink_T = reference.shrink(x_TD.float().square().mean(-1), eps)
    if shift_D is not None:
        return quantize_rows(x_TD * shrink_T[:, None] - shift_D)
    values, scale_T = quantize_rows(x_TD)
    return values, scale_T * shrink_T


def add_sums(
    x_TD: torch.Tensor, acc_TD: torch.Tensor, row_scale_T: torch.Tensor, scale_D: torch.Tensor, bias_D: torch.Tensor
) -> None:
    """x += product, in place."""
    x_TD += dequantize(acc_TD, row_scale_T, scale_D, bias_D)


def add_norm_quantize(
    x_TD: torch.Tensor,
    acc_TD: torch.Tensor,
    row_scale_T: torch.Tensor,
    scale_D: torch.Tensor,
    bias_D: torch.Tensor,
    eps: float,
    shift_D: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """add_sums, then norm_quantize."""
    add_sums(x_TD, acc_TD, row_scale_T, scale_D, bias_D)
    return norm_quantize(x_TD, eps, shift_D)


def product(values_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """int8 x int8 -> int32 (T, O): float64 holds every such sum exactly."""
    return (values_TI.double() @ weight_OI.double().T).to(torch.int32)


widen = int4.widen


def dequantize(
    acc_TO: torch.Tensor, row_scale_T: torch.Tensor, scale_O: torch.Tensor, bias_O: torch.Tensor
) -> torch.Tensor:
    """float32 (T, O)."""
    return acc_TO.float() * (row_scale_T[:, None] * scale_O) + bias_O


def split_heads(
    acc_TO: torch.Tensor,
    row_scale_T: torch.Tensor,
    scale_O: torch.Tensor,
    bias_O: torch.Tensor,
    widths: tuple[int, int],
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
    head_width: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value of a fused product, float32 (T, heads, E); query and key turned by RoPE where there is one.

    widths: of the query, and of key and value; rotation: cos and sin, float32 (T, E / 2).
    """
    y_TO = dequantize(acc_TO, row_scale_T, scale_O, bias_O)
    columns = y_TO.split([widths[0], widths[1], widths[1]], dim=1)
    query, key, value = (x.reshape(len(x), x.shape[1] // head_width, head_width) for x in columns)
    if rotation is not None:
        query, key = reference.rotate(query, *rotation), reference.rotate(key, *rotation)
    return query, key, value


def silu_mul_quantize(
    acc_TF2: torch.Tensor,
    row_scale_T: torch.Tensor,
    scale_F2: torch.Tensor,
    block: int,
    bias_F2: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) * up, the block Hadamard transform along the row (none for block 1), int8."""
    gate_up = acc_TF2.float() * (row_scale_T[:, None] * scale_F2)
    if bias_F2 is not None:
        gate_up += bias_F2
    return quantize_rows(hadamard(reference.silu_mul(gate_up), block))
