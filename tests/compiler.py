"""Triton's kernels compiled for a card that is not here, exactly as the door would launch them, and read back.

    python -m tests.compiler 90        prints one JSON line for each launch
    python -m tests.compiler gfx942    the same for a card of AMD's: passes and attention

The door's own functions are called with tensors that have shapes and no data ("meta"), and each launch is compiled for
the compute capability instead of run: what is read is what users run. In a process of its own, since the interpreter
that the other tests use is chosen when the kernels are imported.
"""

from __future__ import annotations

import collections
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from lightrm.kernels.cuda import cuda_attention, cuda_passes, cuda_products, tiles
from lightrm.kernels.operands import HeadNorms, ScoreRule, Sums
from lightrm.kernels.paths import paths_of
from lightrm.kernels.segments import ROOT, Segment
from lightrm.schemes.int4 import Int4
from lightrm.schemes.int8 import Rowwise
from lightrm.schemes.tiled import Tiled

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.int8: "*i8", torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64",
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32",
}  # fmt: skip
TENSOR_CORE = re.compile(r"^(IMMA|HMMA|IGMMA|HGMMA|QGMMA|UTCIMMA|UTCHMMA)$")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)([.\w]*)")
WIDTH, FFN, GROUP, HEAD_WIDTH = 5120, 13696, 128, 128  # Baichuan-13B's


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(capability: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every kernel that a 13B model launches, by name; in every form on the cards that have tiles of their own."""
    every_form = capability in (tiles.LEAST_PASSES, *tiles.TILES["int8"])
    half, scale, bias = torch.float16, meta(WIDTH), meta(WIDTH)
    int8 = Rowwise(meta(WIDTH, WIDTH, dtype=torch.int8), scale)
    for tokens in (1, 50, 4096) if every_form else (4096,):
        rows = (meta(tokens, WIDTH, dtype=torch.int8), meta(tokens))
        yield f"int8 {tokens}", lambda r=rows: cuda_products.product(*r, int8, bias, half)
        for group in (GROUP, 32) if every_form and tokens > tiles.SOME else (GROUP,):
            multiplier = meta(WIDTH, WIDTH // group, dtype=torch.int8)
            int4 = Int4(meta(WIDTH, WIDTH // 2, dtype=torch.uint8), multiplier, scale)
            yield f"int4 {tokens} g{group}", lambda r=rows, w=int4: cuda_products.product(*r, w, None, half)
        zero = meta(WIDTH, WIDTH // GROUP, dtype=torch.uint8)
        for dtype in (half, torch.bfloat16) if every_form and tokens > tiles.SOME else (half,):
            tiled = Tiled(int4.packed, zero, meta(*zero.shape, dtype=half))
            x = meta(tokens, WIDTH, dtype=dtype)
            yield f"grouped {tokens} {dtype}", lambda x=x, w=tiled: cuda_products.grouped_product(x, w, None)
    rows, stream = (meta(4096, WIDTH, dtype=torch.int8), meta(4096)), meta(4096, WIDTH)
    yield "int8 onto the stream", lambda: cuda_products.product(*rows, int8, None, torch.float32, stream)
    yield "int4 onto the stream", lambda: cuda_products.product(*rows, int4, None, torch.float32, stream)
    yield from passes(every_form)


def passes(every_form: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    half, stream, scale_T = torch.float16, meta(4096, WIDTH), meta(4096)
    sums, gate_up = meta(4096, WIDTH, dtype=torch.int32), meta(4096, 2 * FFN, dtype=half)
    yield "norm", lambda: cuda_passes.norm_quantize(stream, 1e-6)
    yield (
        "add and norm",
        lambda: cuda_passes.add_norm_quantize(stream, Sums(sums, scale_T, meta(WIDTH), meta(WIDTH)), 1e-6),
    )
    yield "transformed norm", lambda: cuda_passes.norm_quantize(stream, 1e-6, meta(WIDTH), None, 256)
    yield "gate", lambda: cuda_passes.gated_quantize(Sums(gate_up), 128)
    yield "GELU gate", lambda: cuda_passes.gated_quantize(Sums(gate_up), 128, "gelu_tanh")
    qkv, widths, table = 3 * WIDTH, (WIDTH, WIDTH), meta(4096, HEAD_WIDTH // 2)
    rotated = (table, table)
    yield (
        "heads",
        lambda: cuda_passes.split(Sums(meta(4096, qkv, dtype=half)), widths, HEAD_WIDTH, rotated, half),
    )
    yield (
        "normed heads",
        lambda: cuda_passes.split(
            Sums(meta(4096, qkv, dtype=half)), widths, HEAD_WIDTH, rotated, half,
            HeadNorms(meta(HEAD_WIDTH), meta(HEAD_WIDTH), 1e-6),
        ),
    )  # fmt: skip
    yield (
        "widen",
        lambda: cuda_passes.widen(meta(WIDTH, WIDTH // 2, dtype=torch.uint8), meta(WIDTH, 40, dtype=torch.int8)),
    )
    yield "value head", lambda: cuda_passes.value_head(stream, meta(1, WIDTH), meta(1), meta(9, dtype=torch.int64))
    if every_form:
        yield "quantize", lambda: cuda_passes.quantize(stream)
        yield "float norm", lambda: cuda_passes.rms_norm(meta(4096, WIDTH, dtype=half), meta(WIDTH, dtype=half), 1e-6)
        yield "gate 7B", lambda: cuda_passes.gated_quantize(Sums(meta(4096, 2 * 11008, dtype=half)), 256)
        yield "float gate", lambda: cuda_passes.gated(gate_up)
        yield (
            "gate of sums",
            lambda: cuda_passes.gated_quantize(
                Sums(meta(4096, 2 * FFN, dtype=torch.int32), scale_T, meta(2 * FFN)), 128
            ),
        )
        yield (
            "heads of sums",
            lambda: cuda_passes.split(
                Sums(meta(4096, qkv, dtype=torch.int32), scale_T, meta(qkv), meta(qkv)), widths, HEAD_WIDTH, None, half
            ),
        )
    forest = (Segment(0, 1000, ROOT), Segment(1000, 2000, 0), Segment(2000, 4096, 0))
    rule = ScoreRule(0.1, meta(40))
    for width in (64, 128):  # 80 and 96 are padded to 128, and the same machine code
        query = meta(4096, 40, width, dtype=half)
        for name, segments in (("plain", forest[:1]), ("shared", forest)):
            paths = paths_of(segments, torch.device("meta"))
            yield (
                f"attention {width} {name}",
                lambda q=query, p=paths, n=name: cuda_attention.attend(q, q, q, p, rule, quantized=n == "shared"),
            )
    gemma2, wide = ScoreRule(0.1, None, 50.0, 1024), meta(4096, 8, 256, dtype=half)  # its heads are the widest
    paths = cuda_attention.paths(forest, torch.device("meta"), None, 256)
    yield "attention 256 windowed", lambda: cuda_attention.attend(wide, wide, wide, paths, gemma2, quantized=True)
    picked = paths_of(forest, torch.device("meta"), [999, 4095])
    yield (
        "attention of the last",
        lambda: cuda_attention.attend(meta(2, 40, 128, dtype=half), query, query, picked, ScoreRule(0.1)),
    )


def target_of(card: str) -> GPUTarget:
    """card: a compute capability, or the name of AMD's architecture, whose older line has warps of 64 threads."""
    if card.startswith("gfx"):
        return GPUTarget("hip", card, 64 if card.startswith("gfx9") else 32)
    return GPUTarget("cuda", int(card), 32)


def compiled(function: JITFunction, arguments: tuple[Any, ...], options: dict[str, Any], target: GPUTarget) -> Any:
    """One launch, compiled with what Triton would assume of its arguments."""
    settings = {name: options.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in options}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(function.params):
        value = arguments[place] if place < len(arguments) else options[parameter.name]
        kind = "constexpr"
        if not parameter.is_constexpr and not (isinstance(value, int) and value == 1):
            if isinstance(value, torch.Tensor):
                kind = TYPES[value.dtype]
                attributes[place,] = [["tt.divisibility", 16]]
            elif isinstance(value, int):
                kind = "i32" if value < 2**31 else "i64"
                if value % 16 == 0:
                    attributes[place,] = [["tt.divisibility", 16]]
            else:
                kind = "fp32"
        if kind == "constexpr":
            constants[place,] = value
        signature[parameter.name] = kind
    source = ASTSource(function, signature, constants, attributes)
    return triton.compile(source, target=target, options=settings), settings


def read(kernel: Any) -> dict[str, Any]:
    """What the machine code says: resources, and the instructions of the loop that multiplies."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, text = (
            subprocess.run([TOOLS / tool, *flags, file.name], capture_output=True, text=True, check=True).stdout
            for tool, flags in (("cuobjdump", ["-res-usage"]), ("nvdisasm", ["-c"]))
        )
    registers, stack = (int(found) for found in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    lines = text.splitlines()
    everything = [match.groups() for line in lines if (match := INSTRUCTION.search(line))]
    return {
        "registers": registers,
        "stack": stack,
        "shared": kernel.metadata.shared,
        "loop": dict(main_loop(lines)),
        "wide loads": sum(op in ("LDG", "LDGSTS") and ".128" in rest for op, rest in everything),
        "products": sorted(
            set(re.findall(r"(mma\.sync\.\S+|wgmma\.mma_async\.\S+|tcgen05\.mma\.\S+)", kernel.asm["ptx"]))
        ),
    }  # fmt: skip


def read_amd(kernel: Any) -> dict[str, Any]:
    """As `read`, from the assembly of a card of AMD's, which states its resources at its end."""
    text = kernel.asm["amdgcn"]

    def stated(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found is not None, name
        return int(found[1])

    return {
        "registers": stated("vgpr_count"),
        "stack": stated("private_segment_fixed_size"),
        "shared": kernel.metadata.shared,
        "products": sorted(set(re.findall(r"\b(v_mfma_\w+|v_wmma_\w+)", text))),
    }


def main_loop(lines: list[str]) -> collections.Counter[str]:
    """Instructions between the backward branch and its label, of the loop with the most tensor-core instructions."""
    labels: dict[str, int] = {}
    best: collections.Counter[str] = collections.Counter()
    for place, line in enumerate(lines):
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = place
        branch = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if branch and branch[1] in labels:
            body = [match[1] for inner in lines[labels[branch[1]] : place] if (match := INSTRUCTION.search(inner))]
            found = collections.Counter(body)
            if multiplied(found) > multiplied(best):
                best = found
    return best


def multiplied(found: collections.Counter[str]) -> int:
    return sum(count for name, count in found.items() if TENSOR_CORE.match(name))


def main() -> None:
    target = target_of(sys.argv[1])
    amd = target.backend == "hip"
    capability = tiles.COMPILED_FOR[0] if amd else target.arch
    name = ""

    def compile_instead(function: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if amd and "PRECISION" in options:  # tf32 is refused there; beside operands in half precision it says nothing
            options["PRECISION"] = "ieee"
        kernel, settings = compiled(function, arguments, dict(options), target)
        found = read_amd(kernel) if amd else read(kernel)
        print(json.dumps({"launch": name, "kernel": function.__name__, **settings, **found}), flush=True)

    JITFunction.run = compile_instead  # type: ignore[method-assign]
    cuda_attention.capability = cuda_products.capability = lambda device: capability
    for name, launch in launches(capability):
        product = name.split()[0] in ("int8", "int4", "grouped")
        attention = name.split()[0] == "attention"
        if not product if amd else capability >= tiles.LEAST_PRODUCTS or not (product or attention):
            launch()


if __name__ == "__main__":
    main()
