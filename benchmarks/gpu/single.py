"""Kernels one at a time: linear layers, attention, passes; each beside what a library does, and the card's ceilings.

Ceilings are measured, not read off a data sheet: the best int8, bf16 and copy rates that PyTorch reaches here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from benchmarks.gpu.stopwatch import Run, Suite
from benchmarks.linear import SHAPES
from lightrm.kernels import gemm
from lightrm.kernels.cuda import cuda_attention, cuda_passes, cuda_products, launch
from lightrm.kernels.operands import ScoreRule, Sums
from lightrm.kernels.paths import paths_of
from lightrm.kernels.segments import Segment
from lightrm.model.positions import alibi_slopes
from lightrm.schemes.int4 import Int4
from lightrm.schemes.int8 import Rowwise
from lightrm.schemes.tiled import tiled_int4

TOKENS = (256, 1024, 2048, 4096, 16384)
SQUARE = 8192
GROUP = 128
COPIED = 2**30  # bytes
BF16, SDPA = "cuBLAS bf16", "PyTorch SDPA"


def ceilings(suite: Suite) -> dict[str, float]:
    """TFLOP/s of int8 and bf16 products of libraries, GB/s of a copy."""
    side, count = (64, 2**12) if suite.rehearsal else (SQUARE, COPIED)
    int8 = torch.randint(-127, 128, (side, side), dtype=torch.int8, device=suite.device)
    half = torch.randn(side, side, device=suite.device).bfloat16()
    source = torch.empty(count, dtype=torch.uint8, device=suite.device)
    runs: dict[str, Run] = {
        "int8": lambda: gemm.product(int8, int8), "bf16": lambda: half @ half.T, "copy": source.clone,
    }  # fmt: skip
    seconds, _ = suite.in_turn(runs)
    found = {name: 2 * side**3 / seconds[name] / 1e12 for name in ("int8", "bf16")}
    found["copy"] = 2 * count / seconds["copy"] / 1e9
    suite.add("ceilings", "torch._int_mm", f"{side}^3", "TFLOP/s", found["int8"])
    suite.add("ceilings", BF16, f"{side}^3", "TFLOP/s", found["bf16"])
    suite.add("ceilings", "copy", f"{count} bytes", "GB/s", found["copy"])
    return found


def linears(suite: Suite, ceiling: dict[str, float]) -> None:
    """Every product of a layer, at M tokens: TFLOP/s, against cuBLAS in bf16 in the same round."""
    shapes = {"tiny": (96, 128)} if suite.rehearsal else SHAPES
    for shape, (outputs, inputs) in shapes.items():
        kinds = weights(suite, outputs, inputs)
        for tokens in (17,) if suite.rehearsal else TOKENS:
            runs = {name: make(tokens) for name, make in kinds.items()}
            seconds, failed = suite.in_turn(runs)
            work = 2 * tokens * outputs * inputs / 1e12
            for name in runs:
                rate = work / seconds[name] if name in seconds else None
                top = ceiling["int8" if "int8" in name or name in ("w8a8", "w4a8") else "bf16"]
                suite.add(
                    "linears", name, f"{shape} {outputs} x {inputs}", "TFLOP/s", rate, tokens=tokens,
                    share=rate and rate / top, against_bf16=rate and BF16 in seconds and seconds[BF16] / seconds[name],
                    failed=failed.get(name, ""),
                )  # fmt: skip


def weights(suite: Suite, outputs: int, inputs: int) -> dict[str, Any]:
    """By name, what makes a run at so many tokens. Values do not matter for time, but zeros would: they draw less."""

    def ints(*shape: int, low: int = -127, high: int = 128, dtype: torch.dtype = torch.int8) -> torch.Tensor:
        return torch.randint(low, high, shape, dtype=dtype, device=suite.device)

    scale = torch.full((outputs,), 1e-3, device=suite.device)
    eight = Rowwise(ints(outputs, inputs), scale)
    packed = ints(outputs, inputs // 2, low=0, high=256, dtype=torch.uint8)
    four = Int4(packed, ints(outputs, inputs // GROUP, low=1, high=16), scale)
    grid = tiled_int4(four, torch.float16)
    half = torch.randn(outputs, inputs, device=suite.device).bfloat16()
    assert grid is not None

    def rows(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        return ints(tokens, inputs), torch.ones(tokens, device=suite.device)

    def product(weight: Rowwise | Int4, tokens: int) -> Run:
        made = rows(tokens)
        return lambda: cuda_products.product(*made, weight, None, launch.PRODUCT_DTYPE)

    def floats(tokens: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(tokens, inputs, device=suite.device).to(dtype)

    def cublas(tokens: int) -> Run:
        x = floats(tokens, torch.bfloat16)
        return lambda: functional.linear(x, half)

    def by_library(tokens: int) -> Run:
        values = rows(tokens)[0]
        return lambda: gemm.product(values, eight.values_OI)

    def grouped(tokens: int) -> Run:
        x = floats(tokens, torch.float16)
        return lambda: cuda_products.grouped_product(x, grid, None)

    def fp8(tokens: int) -> Run:
        x, weight = floats(tokens, torch.bfloat16), half
        dtype = torch.float8_e4m3fn
        left, right = x.to(dtype), weight.to(dtype).T
        row, column = torch.ones(tokens, 1, device=suite.device), torch.ones(1, outputs, device=suite.device)
        return lambda: torch._scaled_mm(left, right, row, column, out_dtype=torch.bfloat16)

    made = {
        BF16: cublas, "w8a8": lambda n: product(eight, n), "w4a8": lambda n: product(four, n), "w4a16": grouped,
        "torch._int_mm, int8 sums alone": by_library,
    }  # fmt: skip
    return made if suite.rehearsal else made | {"torch._scaled_mm fp8": fp8}


def attention(suite: Suite, ceiling: dict[str, float]) -> None:
    """A pack of sequences of one length, with 40 heads, against PyTorch's own attention on the same batch."""
    cases = ((2, 20, 64),) if suite.rehearsal else ((64, 256, 128), (16, 1024, 128), (8, 2048, 128), (16, 1024, 64))
    for count, length, width in cases:
        heads = 2 if suite.rehearsal else 40
        query, key, value = (torch.randn(count * length, heads, width, device=suite.device).half() for _ in range(3))
        paths = paths_of([Segment(k * length, (k + 1) * length) for k in range(count)], suite.device)
        slopes = alibi_slopes(heads).to(suite.device)
        rule, sloped = ScoreRule(width**-0.5), ScoreRule(width**-0.5, slopes)
        batch = [x.view(count, length, heads, width).transpose(1, 2) for x in (query, key, value)]
        runs: dict[str, Run] = {
            "Triton": lambda a=(query, key, value, paths, rule): cuda_attention.attend(*a),
            "Triton, ALiBi": lambda a=(query, key, value, paths, sloped): cuda_attention.attend(*a),
            "Triton, int8 rows": lambda a=(query, key, value, paths, rule): cuda_attention.attend(*a, quantized=True),
            SDPA: lambda b=batch: functional.scaled_dot_product_attention(*b, is_causal=True),
        }
        seconds, failed = suite.in_turn(runs)
        work = 2 * count * heads * width * length**2 / 1e12  # half of the square is masked
        for name in runs:
            rate = work / seconds[name] if name in seconds else None
            against = rate and SDPA in seconds and seconds[SDPA] / seconds[name]
            suite.add(
                "attention", name, f"{count} x {length}, heads of {width}", "TFLOP/s", rate,
                tokens=count * length, share=rate and rate / ceiling["bf16"], against_sdpa=against,
                failed=failed.get(name, ""),
            )  # fmt: skip


def passes(suite: Suite, ceiling: dict[str, float]) -> None:
    """Row kernels of a 13B model: GB/s of what they must read and write, against a copy."""
    tokens, width, ffn, block, head = (9, 48, 144, 16, 16) if suite.rehearsal else (8192, 5120, 13696, 128, 128)
    stream = torch.randn(tokens, width, device=suite.device)
    gate_up = torch.randn(tokens, 2 * ffn, device=suite.device).half()
    sums = torch.randint(-(2**20), 2**20, (tokens, width), dtype=torch.int32, device=suite.device)
    scale_T, scale, bias = (torch.full((n,), 1e-6, device=suite.device) for n in (tokens, width, width))
    qkv = torch.randn(tokens, 3 * width, device=suite.device).half()
    angle = torch.rand(tokens, head // 2, device=suite.device)
    rotation = (angle.cos(), angle.sin())
    runs: dict[str, tuple[Run, int]] = {
        "norm to int8": (lambda: cuda_passes.norm_quantize(stream, 1e-6), tokens * width * 5),
        "add, norm to int8": (
            lambda: cuda_passes.add_norm_quantize(stream, Sums(sums, scale_T, scale, bias), 1e-6), tokens * width * 13,
        ),
        "quantize": (lambda: cuda_passes.quantize(stream), tokens * width * 5),
        "silu, Hadamard to int8": (
            lambda: cuda_passes.gated_quantize(Sums(gate_up), block), tokens * ffn * 5,
        ),
        "silu to int8": (lambda: cuda_passes.gated_quantize(Sums(gate_up), 1), tokens * ffn * 5),
        "RoPE in place": (
            lambda: cuda_passes.split(Sums(qkv), (width, width), head, rotation, torch.half),
            tokens * width * 8,
        ),
    }  # fmt: skip
    seconds, failed = suite.in_turn({name: run for name, (run, _) in runs.items()})
    for name, (_, moved) in runs.items():
        rate = moved / seconds[name] / 1e9 if name in seconds else None
        suite.add(
            "passes", name, f"{tokens} rows", "GB/s", rate, tokens=tokens,
            share=rate and rate / ceiling["copy"], failed=failed.get(name, ""),
        )  # fmt: skip
