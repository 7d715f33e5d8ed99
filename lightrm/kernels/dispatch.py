"""Which implementation runs on which device, and why. Only `passes` and `products` ask here, and what shows the reason.

- CPU: numba's passes and attention; numba's products of few rows, or of all rows where the CPU has AVX2 and no VNNI;
  PyTorch's other products
- CUDA, capability >= 8.0: Triton's products and passes
- CUDA, capability 7.5: PyTorch's int8 products and attention, Triton's passes, since its products do not compile there
- otherwise: plain PyTorch, correct and slow, and the reason says so
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, cast

import torch

from lightrm.errors import SchemeError
from lightrm.kernels import gemm, library, plain, reference
from lightrm.kernels.cuda.tiles import LEAST_PASSES, LEAST_PRODUCTS, capability
from lightrm.kernels.protocols import (
    Attention,
    BlockwiseProducts,
    CardAttention,
    CardProducts,
    CompiledProducts,
    Passes,
    Rounding,
)
from lightrm.schemes.grammar import Path
from lightrm.schemes.int4 import Int4
from lightrm.schemes.int8 import Rowwise


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """Which implementation runs, and the reason in words.

    slow: a faster implementation exists for this device and cannot run. slow_products: there is no fast exact int8
    product. runs: whether any implementation can run.
    """

    name: str
    reason: str
    slow: bool = False
    slow_products: bool = False
    runs: bool = True

    def __str__(self) -> str:
        return f"{self.name}, because {self.reason}"


def kernels_for(device: torch.device, path: Path = "float") -> KernelChoice:
    """Return what runs the schemes of one path on a device."""
    if path == "bitsandbytes":
        library_, error = bitsandbytes_kernels()
        if library_ is None:
            reason = f"bitsandbytes cannot be imported ({error}): pip install bitsandbytes"
            return KernelChoice("none", reason, runs=False)
        return KernelChoice("bitsandbytes", f"the scheme is its own; version {library_.VERSION}")
    if device.type != "cpu":
        return on_card(device, path)
    if path == "float":
        attention = "" if imported("cpu.cpu_passes")[0] is None else "; float32 attention is compiled by numba"
        return KernelChoice("torch", f"products in float on a CPU go through PyTorch's own routines{attention}")
    product, why = gemm.cpu_product()
    slow_products = product is gemm.float_blocks
    own, error = imported("cpu.cpu_products")
    objects, simd = imported("cpu.objects")[0], imported("cpu.simd")[0]
    if own is None or objects is None or simd is None:
        reason = f"numba cannot be imported ({error}): install it; int8 products: {why}"
        return KernelChoice("plain PyTorch passes", reason, True, slow_products)
    name = "numba" if objects.code() is None else "numba, compiled ahead"
    attention = f"attention: products in {'bfloat16' if simd.PAIRS else 'float32'}"
    reason = f"this is a CPU; int8 products: {own.described(why)}; {attention}"
    return KernelChoice(name, reason, False, slow_products and not own.PAIRS)


def on_card(device: torch.device, path: Path) -> KernelChoice:
    """Return what runs on CUDA: Triton where it can."""
    card = capability(device)
    has = f"compute capability {card // 10}.{card % 10}"
    module, error = imported("cuda.launch")
    if module is None or card < LEAST_PASSES:
        has = f"{has}, " if card else "this is not a card of NVIDIA's: "
        why = f"{has}Triton's kernels need 7.5" if module else f"Triton cannot be imported ({error}): install it"
        if path == "float":
            return KernelChoice("torch", f"{why}; all goes through PyTorch's own routines", slow=module is None)
        return KernelChoice("plain PyTorch", f"{why}; right, but slow", True, True)
    if card < LEAST_PRODUCTS:
        libraries = "torch._int_mm and PyTorch's attention" if path == "integer" else "PyTorch's products and attention"
        return KernelChoice("Triton passes", f"{has}: {libraries}, since Triton's products compile from 8.0 on")
    if path == "float":
        return KernelChoice("torch and Triton", f"{has}: PyTorch's products, Triton's attention and 4-bit products")
    return KernelChoice("Triton", f"{has}: int8 products that scale and add in one kernel; version {module.VERSION}")


@cache
def imported(name: str) -> tuple[ModuleType | None, str]:
    """Import a module of `kernels` that needs an optional library. Returns None and the reason if it cannot be
    imported."""
    try:
        return importlib.import_module(f"lightrm.kernels.{name}"), ""
    except Exception as error:  # numba, triton and bitsandbytes refuse what they do not know by errors of many kinds
        return None, f"{type(error).__name__}: {error}"


def card_of(device: torch.device) -> int | None:
    """Return the compute capability of a card, None for a CPU."""
    return capability(device) if device.type == "cuda" else None


def triton(device: torch.device, least: int) -> bool:
    """Whether Triton's kernels that need at least this compute capability can run on a device."""
    card = card_of(device)
    return card is not None and card >= least and imported("cuda.cuda_passes")[0] is not None


def passes(device: torch.device) -> Passes:
    """Return the passes between products: Triton's, numba's or the plain ones."""
    if triton(device, LEAST_PASSES):
        return cast(Passes, imported("cuda.cuda_passes")[0])
    compiled = numba_on(device, "cpu.cpu_passes")
    return plain if compiled is None else cast(Passes, compiled)


def attention(device: torch.device, dtype: torch.dtype) -> Attention:
    """Return an attention: Triton's, numba's for float32, or PyTorch's."""
    on_card = triton_attention(device)
    if on_card is not None:
        return on_card
    compiled = numba_on(device, "cpu.cpu_attention") if dtype == torch.float32 else None
    return library if compiled is None else cast(Attention, compiled)


def triton_attention(device: torch.device) -> CardAttention | None:
    """Return Triton's attention, or None where it cannot run."""
    return cast(CardAttention, imported("cuda.cuda_attention")[0]) if triton(device, LEAST_PRODUCTS) else None


def triton_products(device: torch.device) -> CardProducts | None:
    """Return Triton's products, or None where those of a library are used."""
    return cast(CardProducts, imported("cuda.cuda_products")[0]) if triton(device, LEAST_PRODUCTS) else None


def rounding(device: torch.device) -> Rounding:
    """Return the column rounding: numba's or the plain one."""
    compiled = numba_on(device, "cpu.cpu_passes")
    return reference if compiled is None else cast(Rounding, compiled)


def compiled_products(values_TI: torch.Tensor, weight: Rowwise | Int4) -> CompiledProducts | None:
    """Return the products of int8 rows that take this one, or None where a library's is used."""
    compiled = cast(CompiledProducts | None, numba_on(values_TI.device, "cpu.cpu_products"))
    return compiled if compiled is not None and compiled.takes(values_TI, weight) else None


def numba_on(device: torch.device, name: str) -> ModuleType | None:
    """Return a module of numba kernels, or None where they cannot run."""
    return imported(name)[0] if device.type == "cpu" else None


def bitsandbytes_kernels() -> tuple[ModuleType | None, str]:
    """Return the products of bitsandbytes' schemes, or None and the reason."""
    return imported("bnb_products")


def bitsandbytes() -> BlockwiseProducts:
    """Return the products of bitsandbytes' schemes. Raises SchemeError if bitsandbytes cannot be imported."""
    found, _ = bitsandbytes_kernels()
    if found is None:
        raise SchemeError(kernels_for(torch.device("cpu"), "bitsandbytes").reason)
    return cast(BlockwiseProducts, found)


if TYPE_CHECKING:  # modules that are imported by name are held against their protocols here
    from lightrm.kernels import bnb_products
    from lightrm.kernels.cpu import cpu_attention, cpu_passes, cpu_products
    from lightrm.kernels.cuda import cuda_attention, cuda_passes, cuda_products

    PASSES: tuple[Passes, ...] = (plain, cpu_passes, cuda_passes)
    ATTENTION: tuple[Attention, ...] = (library, cpu_attention, cuda_attention)
    CARD: tuple[CardAttention, CardProducts] = (cuda_attention, cuda_products)
    COMPILED: CompiledProducts = cpu_products
    BLOCKWISE: BlockwiseProducts = bnb_products
    ROUNDING: tuple[Rounding, ...] = (reference, cpu_passes)
