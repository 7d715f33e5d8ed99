"""How much memory a class of transformers needs under each scheme, and how many tokens it computes at once.

Counted are the weights of the class's outline, and what its layers hold of a batch. transformers keeps all weights in
memory, so nothing is streamed.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Protocol

import torch

from lightrm.display.sizes import size_text
from lightrm.engine.memory import PLANNED_TOKENS, SMALL, Room, overhead
from lightrm.engine.residence import LEAST_TOKENS, MOST_TOKENS, Residence
from lightrm.errors import SchemeError
from lightrm.kernels.dispatch import kernels_for
from lightrm.schemes.grammar import BITSANDBYTES, DTYPES, Scheme, parse_scheme

NAMES = (*DTYPES, *BITSANDBYTES)
GPTQ = "gptq"
RUNS_GPTQ = {"optimum": "optimum", "gptqmodel": "GPTQModel"}
BLOCK = 64  # weights that share a scale in nf4
COPIES = 6  # of the attention scores that eager attention holds at once


class Size(Protocol):
    """The part of an outline that memory follows from: see `loading.class_outline`."""

    @property
    def width(self) -> int: ...
    @property
    def ffn_width(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def parameters(self) -> int: ...
    @property
    def linear(self) -> int: ...
    @property
    def linear_rows(self) -> int: ...
    @property
    def widths(self) -> tuple[int, ...]: ...
    @property
    def longest_eager(self) -> int: ...


def class_weight_bytes(size: Size, scheme: Scheme) -> int:
    """Return the bytes of all weights. Under nf4 and bnb-int8 only the backbone's linear layers are quantized."""
    whole = scheme.dtype.itemsize
    if scheme.weights == "nf4":  # a byte for each block of 64, four for each 256 of those
        blocks = size.linear // BLOCK
        linear = size.linear // 2 + blocks + 4 * (blocks // 256)
    elif scheme.weights == "int8":
        linear = size.linear + 4 * size.linear_rows
    else:
        linear = size.linear * whole
    return linear + (size.parameters - size.linear) * whole


def token_bytes(size: Size, scheme: Scheme) -> int:
    """Return what a token of a batch needs beside the weights, at the widest moment of a layer."""
    item = scheme.dtype.itemsize
    # In bitsandbytes, int32 and float32 copies of a product stand beside it.
    wide = 4 * 4 + item if scheme.weights == "int8" else 3 * item
    return (4 * item + 3 * 4) * size.width + wide * size.ffn_width + COPIES * item * size.heads * size.longest_eager


def class_scheme(
    text: str, size: Size, device: torch.device, room: Room, tokens: int | None, stored: set[str], name: str
) -> Scheme:
    """Return the scheme of a name; "auto" takes fp32 if the model is small and it fits, else a half precision.

    stored: dtypes of the file's float weights. name: of the class, for messages. Raises SchemeError on any other
    scheme, or on one that cannot run here.
    """
    if text == "auto":
        half = "fp16" if device.type == "cuda" and stored == {"float16"} else "bf16"
        exact = parse_scheme("fp32", device)
        need = class_weight_bytes(size, exact) + (tokens or PLANNED_TOKENS) * token_bytes(size, exact)
        if size.parameters > SMALL:
            return parse_scheme(half, device, f"half of fp32, which is for models of up to {SMALL:,} parameters")
        if need > room.bytes:
            return parse_scheme(half, device, f"fp32 ({size_text(need)}) would not fit into {room.of}")
        return parse_scheme("fp32", device, f"exact, and small enough to be quick: {size_text(need)} of {room.of}")
    if text.partition("-g")[0] not in NAMES:
        parse_scheme(text, device)  # an unknown name is an error of its own
        raise SchemeError(f"{name} runs in transformers, where there are auto, {', '.join(NAMES)}; found {text!r}")
    scheme = parse_scheme(text, device)
    kernels = kernels_for(device, scheme.path)
    if not kernels.runs:
        raise SchemeError(f"{scheme} cannot run: {kernels.reason}, or take another scheme")
    uneven = [width for width in size.widths if width % BLOCK]
    if scheme.weights == "nf4" and device.type == "cpu" and uneven:
        raise SchemeError(
            f"{scheme} cannot run: on a CPU, bitsandbytes needs linear layers whose inputs are a multiple of {BLOCK}, "
            f"and {name} has one of {uneven[0]}; take bf16 or bnb-int8"
        )
    return scheme


def packed_scheme(text: str, device: torch.device, name: str) -> Scheme:
    """Return the scheme of a GPTQ file, which keeps its values. Raises SchemeError on any other, or if optimum or
    GPTQModel is missing."""
    if text not in ("auto", GPTQ):
        raise SchemeError(
            f"the file of {name} holds GPTQ's values, which transformers runs as they are; found {text!r}: take "
            "the full-precision files, or scheme='auto'"
        )
    missing = [label for package, label in RUNS_GPTQ.items() if find_spec(package) is None]
    if missing:
        raise SchemeError(
            f"transformers runs GPTQ files through optimum and GPTQModel, and {' and '.join(missing)} cannot be "
            "imported: pip install 'lightrm[interop]'"
        )
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    return Scheme(GPTQ, "int4", False, half, reason="the file's own values, of 4 or 8 bits")


def class_residence(
    size: Size, scheme: Scheme, device: torch.device, room: Room, tokens: int | None, weights: int | None = None
) -> Residence:
    """Return how many tokens are computed at once. tokens: as the caller asked. weights: their bytes, None to count
    those of the scheme. Raises SchemeError with the numbers if the model does not fit."""
    weights, each = weights or class_weight_bytes(size, scheme), token_bytes(size, scheme)
    left = room.bytes - weights
    least, most = tokens or LEAST_TOKENS, tokens or MOST_TOKENS[device.type]
    fit = max(0, left) // each
    if fit < least:
        raise SchemeError(
            f"{scheme} of this model needs {size_text(weights + least * each)}, and there are {size_text(room.bytes)} "
            f"for it of {room.of} on {device}; transformers does not stream layers: give it more memory, or "
            f"take a smaller scheme of {', '.join(NAMES)}"
        )
    chosen = min(fit, most)
    reason = f"what fits beside the weights into {room.of}" if fit < most else f"the most that pays on {device.type}"
    found = Residence(chosen, 0, left, weights + chosen * each + overhead(device), reason, "batches")
    return found if tokens is None else replace(found, reason="as asked")
