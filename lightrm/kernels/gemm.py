"""int8 x int8 -> int32 matrix products of libraries that sum exactly, and the choice between them.

`torch._int_mm` is the fast one if PyTorch has oneDNN and the CPU has int8 instructions. It is tested once before use:
on old CPUs without VNNI, instructions that saturate at 16 bits have given wrong sums, and without int8 instructions it
is several times slower than float32. The other product works everywhere: a float32 product of at most 1024 terms of
size 127 * 128 stays below 2^24, up to where float32 holds every whole number. Both give the same sums, bit for bit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import lru_cache

import torch
from torch.nn import functional

from lightrm.kernels.arena import empty

LEAST_ROWS, MULTIPLE = 32, 8  # what cuBLAS takes: more than 16 rows, widths in whole eights
EXACT_TERMS = 2**24 // 2**14  # |int8 * int8| is at most 2^14
RUNS = 8  # of a small layer: Windows counts CPU time in steps of 16 ms
ONE_AT_A_TIME = threading.Lock()  # a measurement sets PyTorch's number of threads, and sets it back
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def int_mm(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    if x_TI.device.type != "cpu":
        return torch._int_mm(x_TI, weight_OI.T)
    acc_TO = empty(len(x_TI), len(weight_OI), dtype=torch.int32)
    return torch._int_mm(x_TI, weight_OI.T, out=acc_TO)


def float_blocks(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """Multiply in float32, exactly, in blocks of 1024 inputs."""
    acc_TO = torch.zeros(len(x_TI), len(weight_OI), dtype=torch.int32, device=x_TI.device)
    for x, weight in zip(x_TI.split(EXACT_TERMS, 1), weight_OI.split(EXACT_TERMS, 1), strict=True):
        acc_TO += (x.float() @ weight.float().T).to(torch.int32)
    return acc_TO


def product(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """Multiply int8 (T, I) by int8 (O, I): int32 (T, O) on the tensors' device."""
    if x_TI.device.type == "cpu":
        return cpu_product()[0](x_TI, weight_OI)
    return card_product(x_TI, weight_OI)


def card_product(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """Multiply by torch._int_mm where cuBLAS supports the shape. Few rows are padded with zeros; odd widths use float
    blocks."""
    if x_TI.shape[1] % MULTIPLE or len(weight_OI) % MULTIPLE:
        return float_blocks(x_TI, weight_OI)
    few = len(x_TI) < LEAST_ROWS
    padded = functional.pad(x_TI, (0, 0, 0, LEAST_ROWS - len(x_TI))) if few else x_TI
    return int_mm(padded.contiguous(), weight_OI)[: len(x_TI)]


@lru_cache(maxsize=1)
def cpu_product() -> tuple[Product, str]:
    """Return the int8 product that this CPU runs, and why.

    The first call chooses. Other threads wait for it, since a second measurement could choose the other product.
    """
    with ONE_AT_A_TIME:
        return chosen_product()


@lru_cache(maxsize=1)
def chosen_product() -> tuple[Product, str]:
    if not torch.backends.mkldnn.is_available():
        return float_blocks, "float32 blocks, exact, because this PyTorch has no oneDNN"
    generator = torch.Generator().manual_seed(0)
    x = torch.where(torch.rand(33, 1200, generator=generator) < 0.5, 127, -128).to(torch.int8)
    weight = torch.cat([x[:16], -127 * torch.ones(17, 1200, dtype=torch.int8)])
    try:
        found = int_mm(x, weight)
    except RuntimeError as error:
        return float_blocks, f"float32 blocks, exact, because torch._int_mm says: {str(error).splitlines()[0]}"
    if not torch.equal(found, float_blocks(x, weight)):
        return float_blocks, "float32 blocks, exact, because torch._int_mm saturates on this CPU"
    if 2 * seconds(float_blocks) < seconds(int_mm):
        return float_blocks, "float32 blocks, exact, because torch._int_mm takes more than twice as long on this CPU"
    return int_mm, f"torch._int_mm, {torch.backends.cpu.get_cpu_capability()}"


def seconds(product: Product) -> float:
    """Return the time of a small layer in one thread: CPU time, which other work of this machine does not lengthen."""
    x, weight = torch.ones(32, 1024, dtype=torch.int8), torch.ones(256, 1024, dtype=torch.int8)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        product(x, weight)
        started = time.thread_time()
        for _ in range(RUNS):
            product(x, weight)
        return (time.thread_time() - started) / RUNS
    finally:
        torch.set_num_threads(threads)
