"""Products by bitsandbytes, as its own layers compute them: nf4 (arXiv 2305.14314) and LLM.int8 (arXiv 2208.07339)."""

from __future__ import annotations

import logging

import bitsandbytes
import torch
from bitsandbytes import functional

from lightrm.kernels import library
from lightrm.kernels.reference import OUTLIER
from lightrm.schemes.blockwise import Blockwise, Nested
from lightrm.schemes.int8 import LEVELS, Rowwise

VERSION = bitsandbytes.__version__
BLOCK, NESTED_BLOCK = 64, 256
ROUNDED_AT_ONCE = 2**20  # a multiple of BLOCK

# It warns at every product that int8 activations pass through float16. They always do in this method.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def quantize_blockwise(weight_OI: torch.Tensor) -> Blockwise:
    """As bitsandbytes' quantize_4bit with compress_statistics, a few blocks at a time: for a whole weight, it would
    need ten times the weight's memory."""
    outputs, inputs = weight_OI.shape
    flat = weight_OI.reshape(-1)
    packed = torch.empty((len(flat) + 1) // 2, dtype=torch.uint8, device=flat.device)
    maxima = []
    for start in range(0, len(flat), ROUNDED_AT_ONCE):
        part = flat[start : start + ROUNDED_AT_ONCE]
        made, state = functional.quantize_4bit(part, blocksize=BLOCK, quant_type="nf4")
        packed[start // 2 : start // 2 + made.numel()] = made.view(-1)
        maxima.append(state.absmax)
    maximum = torch.cat(maxima)
    offset = maximum.mean()
    codes, inner = functional.quantize_blockwise(maximum - offset, blocksize=NESTED_BLOCK)
    nested = Nested(inner.code, inner.absmax, NESTED_BLOCK, float(offset))
    level = functional.get_4bit_type("nf4", flat.device, BLOCK)
    return Blockwise(packed, codes, level, (outputs, inputs), BLOCK, "nf4", weight_OI.dtype, nested)


def blockwise_product(x_TI: torch.Tensor, weight: Blockwise, bias_O: torch.Tensor | None) -> torch.Tensor:
    """Multiply by a 4-bit weight. On a CPU, bitsandbytes (0.50.2) uses wrong scales for rows that end inside a block;
    such weights are dequantized and multiplied by PyTorch."""
    if x_TI.device.type == "cpu" and weight.shape[1] % weight.block:
        return library.linear(x_TI, weight.rows(0, weight.shape[0]).to(x_TI.dtype), bias_O)
    inner = offset = None
    if weight.nested is not None:
        n = weight.nested
        inner = functional.QuantState(absmax=n.outer, blocksize=n.block, code=n.table, dtype=torch.float32)
        offset = torch.tensor(n.offset, device=x_TI.device)
    state = functional.QuantState(
        absmax=weight.maximum,
        shape=torch.Size(weight.shape),
        code=weight.level,
        blocksize=weight.block,
        quant_type=weight.kind,
        dtype=x_TI.dtype,
        offset=offset,
        state2=inner,
    )
    y_TO: torch.Tensor = bitsandbytes.matmul_4bit(x_TI, weight.packed.view(-1, 1).t(), quant_state=state, bias=bias_O)
    return y_TO


def mixed_product(x_TI: torch.Tensor, weight: Rowwise, bias_O: torch.Tensor | None) -> torch.Tensor:
    state = bitsandbytes.MatmulLtState()
    state.CB, state.SCB = weight.values_OI, weight.scale_O * LEVELS
    state.has_fp16_weights = state.is_training = False
    y_TO: torch.Tensor = bitsandbytes.matmul(x_TI, weight.values_OI, state=state, threshold=OUTLIER, bias=bias_O)
    return y_TO
