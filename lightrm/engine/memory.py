"""How much memory each scheme needs, what fits, and which scheme "auto" therefore takes.

All numbers follow from the architecture, so a plan needs only a config.json. They count tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightrm.architecture import Architecture
from lightrm.display.sizes import size_text
from lightrm.errors import SchemeError
from lightrm.kernels.dispatch import kernels_for
from lightrm.kernels.operands import WIDENED_ROWS
from lightrm.schemes.grammar import NAMES, Scheme, parse_scheme
from lightrm.schemes.int4 import group_for

SMALL = 10**9  # parameters up to which fp32 is quick enough on a CPU to be the default
SHARE = 0.9  # of the free memory that a model may take
PLANNED_TOKENS = 2048  # of a pack where nothing else is said: enough to fill the units
PROCESS = 2**29  # of Python and PyTorch, which on a CPU use the same memory


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes that tensors may take. of: what they are part of, in words."""

    bytes: int
    of: str


def room_for(device: torch.device, memory: int | None, free: int) -> Room:
    """Return the room on a device. memory: bytes that the caller allows, including the process; None takes most of
    `free`."""
    if memory is None:
        return Room(int(SHARE * free), f"{size_text(free)} free")
    return Room(memory - overhead(device), f"{size_text(memory)} given")


def overhead(device: torch.device) -> int:
    """Return the bytes that Python and PyTorch take on a device."""
    return PROCESS if device.type == "cpu" else 0


def weight_bytes(a: Architecture, scheme: Scheme) -> int:
    """Return the bytes of a decoder's weights in memory. The value head, some kilobytes, is left out."""
    outputs = a.layers * sum(outputs for outputs, _ in a.linears.values())
    half = scheme.dtype.itemsize
    norms = norm_bytes(a, scheme)
    biases = half * a.bias_parameters
    if scheme.weights == "float":
        matrices = half * a.matrix_parameters
    elif scheme.weights == "nf4":  # a byte for each block of 64, four for each 256 of those, 1 KiB of tables a matrix
        blocks = a.matrix_parameters // 64
        matrices = a.matrix_parameters // 2 + blocks + 4 * (blocks // 256) + 7 * a.layers * 4 * (256 + 16)
    elif scheme.weights == "int8":
        matrices = a.matrix_parameters + 4 * outputs
    else:
        matrices = a.matrix_parameters // 2 + multipliers(a, scheme) + 4 * outputs
    return matrices + norms + biases + table_bytes(a, scheme)


def norm_bytes(a: Architecture, scheme: Scheme) -> int:
    """Return the bytes of the norms. Under a scheme that folds, the last one is in the head, and those before the
    linear layers are in these (see `loading.folding`), unless there are norms behind them."""
    read = 2 * a.layers * a.width
    others = a.layers * sum(a.norms.values()) - read
    size = 4 if a.norms_add_one else scheme.dtype.itemsize
    if scheme.folds:
        return 4 * (others + read * a.post_norms)
    return 4 * others + size * (read + a.width)


def table_bytes(a: Architecture, scheme: Scheme) -> int:
    """Return the bytes of the embedding table."""
    return a.vocabulary * a.width * (2 if scheme.folds else scheme.dtype.itemsize)


def multipliers(a: Architecture, scheme: Scheme) -> int:
    """Return the bytes of int4's multipliers: one for each group of each output channel."""
    return a.layers * sum(outputs * inputs // group_for(inputs, scheme.group) for outputs, inputs in a.linears.values())


def activation_bytes(a: Architecture, scheme: Scheme, tokens: int) -> int:
    """Return what a pack needs beside the weights at its widest moment, in a layer's attention or in its MLP.

    Float32 copies of the residual stream are included: norms make them, and allocators keep them.
    """
    qkv, size, widest = a.linears["qkv"][0], scheme.dtype.itemsize, max(a.width, a.ffn_width)
    if scheme.integer:
        stream, attention = 2 * 4 * a.width, a.width + 8 * qkv
        mlp = a.width + 8 * a.ffn_width + a.ffn_width
        widened = 0 if scheme.weights == "int8" else WIDENED_ROWS * (widest + 4 * tokens)
        return tokens * (stream + max(attention, mlp)) + widened
    stream, attention = (size + 3 * 4) * a.width, size * (a.width + 2 * qkv) + 3 * 4 * a.query_width
    mlp = size * (a.width + 4 * a.ffn_width)
    widened = 0
    if scheme.weights == "nf4":  # a whole matrix at a time
        widened = size * a.width * a.ffn_width
    elif scheme.weights == "int8":  # int32 and three float32 copies of the product, in bitsandbytes
        mlp = size * 2 * a.width + 2 * a.ffn_width * (4 * 4 + size)
    elif scheme.weights == "int4":
        widened = WIDENED_ROWS * widest * (1 + 2 * size)
    return tokens * (stream + max(attention, mlp)) + widened


def schemes_of(device: torch.device) -> list[Scheme]:
    """Return the schemes of a device in the order of NAMES, also bitsandbytes' where it is not installed."""
    return [parse_scheme(name, device) for name in NAMES if name != "fp16" or device.type != "cpu"]


def choose_scheme(
    text: str,
    device: torch.device,
    a: Architecture,
    room: Room,
    tokens: int | None = None,
    holds: str | None = None,
    stored: torch.dtype | None = None,
) -> Scheme:
    """Return the scheme of a name. "auto" takes the first that fits from a list for the device, and says why; if none
    fits, half precision with streamed layers.

    tokens: of a pack, None for PLANNED_TOKENS; holds: the scheme that keeps the values of an already quantized file;
    stored: dtype of the file's float weights. Raises SchemeError on an unknown scheme, or one that cannot run here.
    """
    if text != "auto":
        scheme = parse_scheme(text, device)
        if not kernels_for(device, scheme.path).runs:
            raise SchemeError(f"{scheme} cannot run: {kernels_for(device, scheme.path).reason}, or take another scheme")
        return scheme
    if holds is not None:
        kept = parse_scheme(holds, device, "the file's own values")
        if kernels_for(device, kept.path).runs:
            return kept
    tried: list[str] = []
    for name, why in preferred(a, device, stored):
        scheme = parse_scheme(name, device)
        need = weight_bytes(a, scheme) + activation_bytes(a, scheme, tokens or PLANNED_TOKENS)
        if need <= room.bytes:
            before = f"; {', '.join(tried)} would not fit" if tried else ""
            return parse_scheme(name, device, f"{why}: {size_text(need)} of {room.of}{before}")
        tried.append(f"{name} ({size_text(need)})")
    half, reason = half_for(device, stored)
    why = f"{', '.join(tried)} would not fit into {room.of}: layers are streamed; {reason}"
    return parse_scheme(half, device, why)


def half_for(device: torch.device, stored: torch.dtype | None) -> tuple[str, str]:
    """Return the half precision for weights stored in a dtype, with the reason.

    Weights stored in a half precision stay in it: bf16 has numbers that fp16 does not have, and the other way round.
    """
    if stored == torch.bfloat16:
        return "bf16", "the dtype they are stored in"
    if device.type != "cuda":
        return "bf16", "the half precision of CPUs"
    return "fp16", "the dtype they are stored in" if stored == torch.float16 else "the finer half precision"


def preferred(a: Architecture, device: torch.device, stored: torch.dtype | None) -> list[tuple[str, str]]:
    """Return the schemes that "auto" tries in turn, each with the reason for it."""
    small = [("w8a8", "8 bits, the most that fits"), ("w4a8", "4 bits, the most that fits")]
    if device.type == "cuda":
        return [half_for(device, stored), *small]
    if a.parameters <= SMALL:
        return [("fp32", "exact, and small enough to be quick"), *small]
    if kernels_for(device, "integer").slow_products:
        return [("fp32", "exact, and no slower than int8 on this CPU"), ("bf16", "half of fp32"), *small]
    return [("w8a8", "8 bits, the quickest on a CPU"), small[1]]
