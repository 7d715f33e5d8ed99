"""The one door to kernels: shapes and dtypes are checked here, then one implementation is chosen.

The layers above call `ops.attention(...)` and never learn what ran. `kernels_for` says which implementation a
device gets and why; the model's repr shows that sentence.

Integer ops: an int8 row stands for `values * scale`, and a product `acc` of such rows with an int8 weight for
`acc * row_scale_T * scale_O + bias_O`. See `kernels.integer` for the truth of each.

Shapes: T tokens, D width, F feed-forward width, H query heads, J key/value heads, E head width, O x I a weight,
G groups along I.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch

from lightrm.errors import SchemeError
from lightrm.kernels import gemm, integer, library
from lightrm.packing import Segment
from lightrm.schemes.blockwise import Blockwise
from lightrm.schemes.grammar import Path

WIDENED_ROWS = 1024  # output channels of a 4-bit weight that are widened at one time


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """Which implementation runs, with the reason in words.

    slow: a faster one belongs here and cannot run; slow_products: this CPU has no quick exact int8 product;
    runs: whether there is one at all.
    """

    name: str
    reason: str
    slow: bool = False
    slow_products: bool = False
    runs: bool = True

    def __str__(self) -> str:
        return f"{self.name}, because {self.reason}"


def kernels_for(device: torch.device, path: Path = "float") -> KernelChoice:
    """What runs on a device under schemes of one path."""
    if path == "bitsandbytes":
        library_, error = bitsandbytes_kernels()
        if library_ is None:
            reason = f"bitsandbytes cannot be imported ({error}): pip install bitsandbytes"
            return KernelChoice("none", reason, runs=False)
        return KernelChoice("bitsandbytes", f"the scheme is its own; version {library_.VERSION}")
    if path == "float":
        return KernelChoice("torch", f"products in float on {device.type} go through PyTorch's own fused routines")
    if device.type != "cpu":
        return KernelChoice("reference", f"the fused kernels for {device.type} are not here yet: right, but slow", True)
    product, why = gemm.cpu_product()
    slow_products = product is gemm.float_blocks
    error = fused_rows()[1]
    if error:
        reason = f"numba cannot be imported ({error}): install it; int8 products: {why}"
        return KernelChoice("plain PyTorch passes", reason, True, slow_products)
    return KernelChoice("numba", f"this is a CPU; int8 products: {why}", False, slow_products)


@cache
def imported(name: str) -> tuple[ModuleType | None, str]:
    """A room of `kernels` that stands on a library of its own, or None and why not."""
    try:
        return importlib.import_module(f"lightrm.kernels.{name}"), ""
    except Exception as error:  # numba and bitsandbytes refuse what they do not know by errors of many kinds
        return None, f"{type(error).__name__}: {error}"


def fused_rows() -> tuple[ModuleType, str]:
    """The passes between integer products on a CPU: numba's, or the plain ones and why."""
    found, error = imported("cpu")
    return found or integer, error


def bitsandbytes_kernels() -> tuple[ModuleType | None, str]:
    """The products of bitsandbytes' schemes, or None and why not."""
    return imported("bnb")


def bitsandbytes() -> ModuleType:
    found, _ = bitsandbytes_kernels()
    if found is None:
        raise SchemeError(kernels_for(torch.device("cpu"), "bitsandbytes").reason)
    return found


def passes(like: torch.Tensor) -> ModuleType:
    return fused_rows()[0] if like.device.type == "cpu" else integer


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Root-mean-square normalization of each row (arXiv 1910.07467), (T, D) -> (T, D); no weight is a weight of 1."""
    if weight_D is not None:
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


def hadamard(x_TF: torch.Tensor, block: int) -> torch.Tensor:
    """The block Hadamard transform of `schemes.hadamard`, without signs, in x's dtype; block 1 does nothing."""
    return x_TF if block == 1 else library.hadamard(x_TF, block)


def widen(packed: torch.Tensor, multiplier_OG: torch.Tensor) -> torch.Tensor:
    """int4 in groups -> int8 (O, I), the channel's scale left out."""
    check(len(packed) == len(multiplier_OG), "widen", packed=packed, multiplier=multiplier_OG)
    widened: torch.Tensor = passes(packed).widen(packed, multiplier_OG)
    return widened


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


def norm_quantize(x_TD: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm without a weight, then int8 per row: float32 (T, D) -> int8 (T, D), float32 (T,)."""
    check(x_TD.ndim == 2 and x_TD.dtype == torch.float32, "norm_quantize", x=x_TD)
    values, scale_T = passes(x_TD).norm_quantize(x_TD, eps)
    return values, scale_T


def quantize(x_TI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 per row: float32 (T, I) -> int8 (T, I), float32 (T,)."""
    check(x_TI.ndim == 2 and x_TI.dtype == torch.float32, "quantize", x=x_TI)
    values, scale_T = passes(x_TI).quantize(x_TI.contiguous())
    return values, scale_T


def int8_product(values_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """int8 (T, I) x int8 (O, I) -> int32 (T, O), exact."""
    fits = values_TI.ndim == 2 and values_TI.shape[1] == weight_OI.shape[1] and values_TI.dtype == torch.int8
    check(fits and weight_OI.dtype == torch.int8, "int8_product", values=values_TI, weight=weight_OI)
    product = gemm.cpu_product()[0] if values_TI.device.type == "cpu" else integer.product
    return product(values_TI, weight_OI)


def int4_product(values_TI: torch.Tensor, packed: torch.Tensor, multiplier_OG: torch.Tensor) -> torch.Tensor:
    """int8 (T, I) x int4 (O, I) -> int32 (T, O), exact; the weight is widened WIDENED_ROWS channels at a time."""
    outputs, inputs = len(packed), 2 * packed.shape[1]
    fits = values_TI.shape[1:] == (inputs,) and len(multiplier_OG) == outputs and inputs % multiplier_OG.shape[1] == 0
    check(fits, "int4_product", values=values_TI, packed=packed, multiplier=multiplier_OG)
    acc_TO = torch.empty(len(values_TI), outputs, dtype=torch.int32, device=values_TI.device)
    for start in range(0, outputs, WIDENED_ROWS):
        rows = slice(start, min(start + WIDENED_ROWS, outputs))
        acc_TO[:, rows] = int8_product(values_TI, widen(packed[rows], multiplier_OG[rows]))
    return acc_TO


def quantize_blockwise(weight_OI: torch.Tensor) -> Blockwise:
    """Any float dtype (O, I) -> nf4 in blocks of 64 with double quantization, by bitsandbytes."""
    check(weight_OI.ndim == 2, "quantize_blockwise", weight=weight_OI)
    made: Blockwise = bitsandbytes().quantize_blockwise(weight_OI)
    return made


def blockwise_product(x_TI: torch.Tensor, weight: Blockwise, bias_O: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias by bitsandbytes, (T, I) -> (T, O) in x's dtype."""
    check(x_TI.ndim == 2 and x_TI.shape[1] == weight.shape[1], "blockwise_product", x=x_TI, packed=weight.packed)
    y_TO: torch.Tensor = bitsandbytes().blockwise_product(x_TI, weight, bias_O)
    return y_TO


def mixed_product(
    x_TI: torch.Tensor, values_OI: torch.Tensor, scale_O: torch.Tensor, bias_O: torch.Tensor | None
) -> torch.Tensor:
    """LLM.int8 by bitsandbytes, (T, I) -> (T, O) in x's dtype; see `kernels.reference.mixed_product`."""
    fits = x_TI.ndim == 2 and x_TI.shape[1] == values_OI.shape[1] and len(values_OI) == len(scale_O)
    check(fits and values_OI.dtype == torch.int8, "mixed_product", x=x_TI, values=values_OI, scale=scale_O)
    y_TO: torch.Tensor = bitsandbytes().mixed_product(x_TI, values_OI, scale_O, bias_O)
    return y_TO


def split_heads(
    acc_TO: torch.Tensor,
    row_scale_T: torch.Tensor,
    scale_O: torch.Tensor,
    bias_O: torch.Tensor,
    widths: tuple[int, int],
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value of a fused product, float32, query and key turned by RoPE (cos and sin (T, E/2)).

    widths: columns of the query, and of key and value each.
    """
    fits = acc_TO.shape == (len(row_scale_T), len(scale_O)) and widths[0] + 2 * widths[1] == len(scale_O)
    check(fits and bias_O.shape == scale_O.shape, "split_heads", acc=acc_TO, row_scale=row_scale_T, scale=scale_O)
    query, key, value = passes(acc_TO).split_heads(acc_TO, row_scale_T, scale_O, bias_O, widths, rotation)
    return query, key, value


def add_product(
    x_TD: torch.Tensor, acc_TD: torch.Tensor, row_scale_T: torch.Tensor, scale_D: torch.Tensor, bias_D: torch.Tensor
) -> None:
    """x += acc * row_scale * scale + bias, in place."""
    fits = x_TD.shape == acc_TD.shape == (len(row_scale_T), len(scale_D)) and bias_D.shape == scale_D.shape
    check(fits, "add_product", x=x_TD, acc=acc_TD, row_scale=row_scale_T, scale=scale_D)
    passes(x_TD).add_product(x_TD, acc_TD, row_scale_T, scale_D, bias_D)


def silu_mul_quantize(
    acc_TF2: torch.Tensor, row_scale_T: torch.Tensor, scale_F2: torch.Tensor, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) * up, a block Hadamard transform, int8 per row: int32 (T, 2F) -> int8 (T, F), float32 (T,).

    block: a power of two that divides F; 1 leaves the row as it is.
    """
    fits = acc_TF2.shape == (len(row_scale_T), len(scale_F2)) and acc_TF2.shape[1] % (2 * block) == 0
    check(fits, "silu_mul_quantize", acc=acc_TF2, row_scale=row_scale_T, scale=scale_F2)
    values, scale_T = passes(acc_TF2).silu_mul_quantize(acc_TF2, row_scale_T, scale_F2, block)
    return values, scale_T


def check(fits: bool, op: str, **tensors: torch.Tensor) -> None:
    if not fits:
        shapes = ", ".join(
            f"{name} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            for name, tensor in tensors.items()
        )
        raise ValueError(f"ops.{op}: shapes or dtypes do not fit together: {shapes}")
