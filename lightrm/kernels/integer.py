"""The truth of the integer path: int8 activations and weights, int32 sums, in plain PyTorch on any device. Slow.

An int8 row stands for `values * scale`; `operands.Sums` says what a product of such rows stands for. T tokens, D width,
F feed-forward width, O x I a weight, G groups along I.
"""

from __future__ import annotations

import torch

from lightrm.kernels import reference
from lightrm.kernels.operands import Activation, HeadNorms, Heads, Rotation, Rows, Sums
from lightrm.schemes import int4
from lightrm.schemes.hadamard import hadamard
from lightrm.schemes.int8 import quantize_rows


def quantize(x_TI: torch.Tensor) -> Rows:
    """Round each row to int8."""
    return Rows(*quantize_rows(x_TI))


def norm_quantize(
    x_TD: torch.Tensor,
    eps: float,
    weight_D: torch.Tensor | None = None,
    shift_D: torch.Tensor | None = None,
    block: int = 1,
) -> Rows:
    """RMSNorm, the block Hadamard transform (none if block is 1), then int8. Without a shift the norm only scales a
    row, so it goes into the row's scale.

    weight_D: of the norm, None for ones. shift_D: subtracted from the transformed row before it is rounded; the bias of
    the layer behind adds its product.
    """
    shrink_T = reference.shrink(x_TD.float().square().mean(-1), eps)
    if weight_D is not None:
        x_TD = x_TD * weight_D
    if block > 1:
        x_TD = hadamard(x_TD, block)
    if shift_D is not None:
        return quantize(x_TD * shrink_T[:, None] - shift_D)
    values, scale_T = quantize_rows(x_TD)
    return Rows(values, scale_T * shrink_T)


def add_sums(x_TD: torch.Tensor, sums: Sums) -> None:
    """x += product, in place."""
    x_TD += sums.float()


def add_norm_quantize(
    x_TD: torch.Tensor,
    sums: Sums,
    eps: float,
    weight_D: torch.Tensor | None = None,
    shift_D: torch.Tensor | None = None,
    block: int = 1,
) -> Rows:
    """add_sums, then norm_quantize."""
    add_sums(x_TD, sums)
    return norm_quantize(x_TD, eps, weight_D, shift_D, block)


def add_normed(x_TD: torch.Tensor, sums: Sums, weight_D: torch.Tensor, eps: float) -> None:
    """x += RMSNorm(product) * weight, in place."""
    x_TD += reference.rms_norm(sums.float(), weight_D.float(), eps).to(x_TD.dtype)


def product(values_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """int8 x int8 -> int32 (T, O). float64 holds every such sum exactly."""
    return (values_TI.double() @ weight_OI.double().T).to(torch.int32)


widen = int4.widen


def split_heads(
    sums: Sums, widths: tuple[int, int], head_width: int, rotation: Rotation, norms: HeadNorms | None = None
) -> Heads:
    """Return query, key and value of a fused product, (T, heads, E); query and key normed if `norms` are given, and
    under RoPE if `rotation` is given.

    widths: of the query, and of key and value; floats keep their dtype, integer sums become float32.
    """
    y_TO = sums.acc_TO if sums.row_scale_T is None else sums.float()
    columns = y_TO.split([widths[0], widths[1], widths[1]], dim=1)
    query, key, value = (x.unflatten(1, (x.shape[1] // head_width, head_width)) for x in columns)
    if norms is not None:
        query = reference.rms_norm(query, norms.query_E, norms.eps)
        key = reference.rms_norm(key, norms.key_E, norms.eps)
    if rotation is not None:
        query, key = reference.rotate(query, *rotation), reference.rotate(key, *rotation)
    return query, key, value


def gated_quantize(sums: Sums, block: int, activation: Activation = "silu") -> Rows:
    """activation(gate) * up, then the block Hadamard transform along the row (none if block is 1), then int8."""
    return quantize(hadamard(reference.gated(sums.float(), activation), block))
