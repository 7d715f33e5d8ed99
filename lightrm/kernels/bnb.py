"""Products by bitsandbytes, as its own layers compute them: nf4 (arXiv 2305.14314) and LLM.int8 (arXiv 2208.07339)."""

from __future__ import annotations

import logging

import bitsandbytes
import torch
from bitsandbytes import functional

from lightrm.kernels import library
from lightrm.kernels.reference import OUTLIER
from lightrm.schemes.blockwise import Blockwise, Nested
from lightrm.schemes.int8 import LEVELS

VERSION = bitsandbytes.__version__
BLOCK = 64

# It warns at every product that int8 activations pass through float16. They always do in this method.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def quantize_blockwise(weight_OI: torch.Tensor) -> Blockwise:
    outputs, inputs = weight_OI.shape
    packed, state = functional.quantize_4bit(
        weight_OI.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    inner = state.state2
    nested = Nested(inner.code, inner.absmax, inner.blocksize, float(state.offset))
    dtype = weight_OI.dtype
    return Blockwise(packed.view(-1), state.absmax, state.code, (outputs, inputs), BLOCK, "nf4", dtype, nested)


def blockwise_product(x_TI: torch.Tensor, weight: Blockwise, bias_O: torch.Tensor | None) -> torch.Tensor:
    """On a CPU, bitsandbytes (0.50.2) widens rows that end inside a block by wrong maxima: they take the plain way."""
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


def mixed_product(
    x_TI: torch.Tensor, values_OI: torch.Tensor, scale_O: torch.Tensor, bias_O: torch.Tensor | None
) -> torch.Tensor:
    state = bitsandbytes.MatmulLtState()
    state.CB, state.SCB = values_OI, scale_O * LEVELS
    state.has_fp16_weights = state.is_training = False
    y_TO: torch.Tensor = bitsandbytes.matmul(x_TI, values_OI, state=state, threshold=OUTLIER, bias=bias_O)
    return y_TO
