"""Products of few int8 rows on a CPU: tensors in, tensors out, around the code that numba compiles.

Fast version of `integer.product`; what it takes depends on the CPU and on the shapes, see `takes`.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from lightrm.kernels.arena import empty
from lightrm.kernels.cpu import few_rows
from lightrm.kernels.cpu.cpu_passes import launch
from lightrm.kernels.cpu.dot_tiles import AVAILABLE, OUTPUTS, STEP, TOKENS
from lightrm.kernels.cpu.simd import FEATURES
from lightrm.schemes.int4 import Int4, block_of
from lightrm.schemes.int8 import Rowwise

MOST_ROWS = 32 if FEATURES.get("amx-int8") else 256  # from more rows on, a library is as fast or faster


def takes(values_TI: torch.Tensor, weight: Rowwise | Int4) -> bool:
    """Whether these kernels run on this CPU and take this product."""
    outputs = len(weight.scale_O)
    return AVAILABLE and 0 < len(values_TI) <= MOST_ROWS and values_TI.shape[1] % STEP == 0 and outputs >= OUTPUTS


def product(values_TI: torch.Tensor, weight: Rowwise | Int4) -> torch.Tensor:
    """Multiply int8 (T, I) by an int8 or int4 weight (O, I): int32 (T, O), exact, without the scales of the weight."""
    tokens, outputs = len(values_TI), len(weight.scale_O)
    x_TI = values_TI.contiguous()
    if missing := -tokens % TOKENS:
        x_TI = functional.pad(x_TI, (0, 0, 0, missing))
    begin_TO = torch.empty(len(x_TI), OUTPUTS, dtype=torch.int32)
    acc_TO = empty(len(x_TI), outputs, dtype=torch.int32)
    if isinstance(weight, Rowwise):
        launch(few_rows.multiply_int8, x_TI, begin_TO, weight.values_OI, acc_TO)
    else:
        half = block_of(x_TI.shape[1]) // 2
        run = min(half, weight.group)
        launch(few_rows.multiply_int4, x_TI, begin_TO, weight.packed, weight.multiplier_OG, half, run, acc_TO)
    return acc_TO[:tokens]
