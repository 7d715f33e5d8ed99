"""Products of int8 rows on a CPU: tensors in, tensors out, around the code that numba compiles.

Fast version of `integer.product`; what it takes depends on the CPU and on the shapes, see `takes`.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from lightrm.kernels.arena import empty
from lightrm.kernels.cpu import dot_tiles, few_rows, int16_rows
from lightrm.kernels.cpu.cpu_passes import launch
from lightrm.kernels.cpu.simd import FEATURES
from lightrm.schemes.int4 import Int4, block_of
from lightrm.schemes.int8 import Rowwise

DOTS = dot_tiles.AVAILABLE  # whether this CPU has a dot-product instruction for bytes
PAIRS = int16_rows.AVAILABLE and not DOTS  # whether it multiplies pairs of int16 instead
MOST_ROWS = 32 if FEATURES.get("amx-int8") else 256  # of DOTS: from more rows on, a library is as fast or faster
PAIRED_ROWS = 256  # that are multiplied at a time as pairs: as int16, they stay in cache


def described(others: str) -> str:
    """Return in words which products of int8 rows this CPU runs. others: what runs those that are not taken here."""
    if DOTS:
        return f"{others}; of up to {MOST_ROWS} rows: compiled by numba"
    return f"as pairs of int16, compiled by numba; of odd widths: {others}" if PAIRS else others


def takes(values_TI: torch.Tensor, weight: Rowwise | Int4) -> bool:
    """Whether these kernels run on this CPU and take this product."""
    (tokens, inputs), outputs = values_TI.shape, len(weight.scale_O)
    if DOTS:
        return 0 < tokens <= MOST_ROWS and inputs % dot_tiles.STEP == 0 and outputs >= dot_tiles.OUTPUTS
    return PAIRS and tokens > 0 and inputs % int16_rows.INPUTS == 0 and outputs % int16_rows.CHANNELS == 0


def product(values_TI: torch.Tensor, weight: Rowwise | Int4) -> torch.Tensor:
    """Multiply int8 (T, I) by an int8 or int4 weight (O, I): int32 (T, O), exact, without the scales of the weight."""
    return by_dots(values_TI, weight) if DOTS else by_pairs(values_TI, weight)


def by_dots(values_TI: torch.Tensor, weight: Rowwise | Int4) -> torch.Tensor:
    x_TI = in_tiles(values_TI, dot_tiles.TOKENS)
    begin_TO = torch.empty(len(x_TI), dot_tiles.OUTPUTS, dtype=torch.int32)
    acc_TO = empty(len(x_TI), len(weight.scale_O), dtype=torch.int32)
    if isinstance(weight, Rowwise):
        launch(few_rows.multiply_int8, x_TI, begin_TO, weight.values_OI, acc_TO)
    else:
        launch(few_rows.multiply_int4, x_TI, begin_TO, weight.packed, weight.multiplier_OG, *layout(weight), acc_TO)
    return acc_TO[: len(values_TI)]


def by_pairs(values_TI: torch.Tensor, weight: Rowwise | Int4) -> torch.Tensor:
    tokens = len(values_TI)
    acc_TO = empty(tokens + -tokens % int16_rows.ROWS, len(weight.scale_O), dtype=torch.int32)
    for first in range(0, tokens, PAIRED_ROWS):
        x_TI = in_tiles(values_TI[first : first + PAIRED_ROWS], int16_rows.ROWS).to(torch.int16)
        out_TO = acc_TO[first : first + len(x_TI)]
        if isinstance(weight, Rowwise):
            launch(int16_rows.multiply_int8, x_TI, weight.values_OI, out_TO)
        else:
            launch(int16_rows.multiply_int4, x_TI, weight.packed, weight.multiplier_OG, *layout(weight), out_TO)
    return acc_TO[:tokens]


def in_tiles(values_TI: torch.Tensor, rows: int) -> torch.Tensor:
    """Return the rows, and zeros up to whole tiles of `rows`."""
    x_TI = values_TI.contiguous()
    missing = -len(x_TI) % rows
    return functional.pad(x_TI, (0, 0, 0, missing)) if missing else x_TI


def layout(weight: Int4) -> tuple[int, int]:
    """Return the bytes of half a block, and how many neighbours of these share a multiplier."""
    half = block_of(2 * weight.packed.shape[1]) // 2
    return half, min(half, weight.group)
