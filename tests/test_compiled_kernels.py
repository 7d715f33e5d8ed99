"""Every kernel, compiled for the cards people own, without one: what the machine code must be like.

`tests.compiler` compiles each launch of a 13B model and reads it. A kernel that falls off the tensor cores, spills in
its main loop, or asks for more than a card has, fails here and not on somebody's machine.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from lightrm.kernels.cuda.tiles import COMPILED_FOR, LEAST_PASSES
from lightrm.kernels.cuda.triton_products import WIDEN

# Bytes of shared memory that one program may take, and registers of a processor (CUDA's programming guide).
SHARED = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
REGISTERS = 2**16
INTEGER = {90: r"wgmma\.mma_async.*\.s32\.s8\.s8", 100: r"tcgen05\.mma.*kind::i8"}
FLOAT = {90: r"wgmma\.mma_async.*\.f32\.(f16\.f16|bf16\.bf16)", 100: r"tcgen05\.mma.*kind::f16"}
TENSOR_CORE = {True: ("IMMA", "IGMMA", "UTCIMMA"), False: ("HMMA", "HGMMA", "UTCHMMA")}
AMD = {"gfx90a": "v_mfma_f32", "gfx942": "v_mfma_f32", "gfx1100": "v_wmma_f32"}  # MI200, MI300, RX 7900
AMD_SHARED = 64 * 1024  # bytes that one program may take there (AMD's guides to these instruction sets)
SHUFFLES = {"int8": 8, "int4": 100}  # in the main loop; int4 needs some to spread its multipliers over words
FEW_BYTES = 512  # of a thread's local memory, once a tile: outside the main loop


def read(card: int | str) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.compiler", str(card)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("capability", COMPILED_FOR)
def test_machine_code(capability: int) -> None:
    launches = read(capability)
    assert {launch["kernel"] for launch in launches} == {
        "integer_product", "grouped_product", "attention_tile", "norm_row", "gate_row", "head_row", "widen_rows",
        "value_row",
    }  # fmt: skip
    for launch in launches:
        name = f"{launch['launch']} for {capability}: {launch}"
        assert launch["registers"] * launch["num_warps"] * 32 <= REGISTERS, name
        assert launch["shared"] <= SHARED[capability] * 1024, name
        assert launch["stack"] <= FEW_BYTES, name
        assert not {"LDL", "STL"} & set(launch["loop"]), f"spills in the main loop of {name}"
        if launch["kernel"] in ("integer_product", "grouped_product", "attention_tile"):
            check_products(launch, capability, name)


def check_products(launch: dict, capability: int, name: str) -> None:
    """On the tensor cores, by the right instruction; tiles read 16 bytes at a time."""
    whole = launch["kernel"] == "integer_product"
    few_rows = launch["launch"] == "attention of the last"  # 16 rows are too few for a warp group
    expected = (INTEGER if whole else FLOAT).get(capability) if not few_rows else None
    expected = expected or (r"mma\.sync.*\.s32\.s8\.s8\.s32" if whole else r"mma\.sync.*\.f32\.b?f16")
    assert any(re.search(expected, product) for product in launch["products"]), name
    assert any(launch["loop"].get(instruction) for instruction in TENSOR_CORE[whole]), name
    assert launch["wide loads"] > 0, name
    if whole:  # bytes carried around the loop one by one cost more than the product: see `cuda.triton_products`
        assert launch["loop"].get("PRMT", 0) <= SHUFFLES[launch["launch"].split()[0]], name


def test_machine_code_of_turing() -> None:
    """Passes only: its products and attention are left to libraries."""
    launches = read(LEAST_PASSES)
    assert {launch["kernel"] for launch in launches} == {"norm_row", "gate_row", "head_row", "widen_rows", "value_row"}
    for launch in launches:
        assert launch["stack"] <= FEW_BYTES, launch
        assert launch["shared"] <= SHARED[LEAST_PASSES] * 1024, launch


@pytest.mark.parametrize("card", AMD)
def test_machine_code_of_amd(card: str) -> None:
    """Passes and attention compile, and attention is on the matrix cores. Passes spill nothing; attention spills much
    on gfx1100, and little elsewhere. The door does not launch them there: nobody has run them."""
    launches = read(card)
    assert {launch["kernel"] for launch in launches} == {
        "attention_tile", "norm_row", "gate_row", "head_row", "widen_rows", "value_row",
    }  # fmt: skip
    for launch in launches:
        if launch["kernel"] != "attention_tile":
            assert launch["stack"] == 0, launch
        elif card != "gfx1100":
            assert launch["stack"] <= FEW_BYTES, launch
        assert launch["shared"] <= AMD_SHARED, launch
        if launch["kernel"] == "attention_tile":
            assert any(product.startswith(AMD[card]) for product in launch["products"]), launch


def test_widening_by_its_instructions() -> None:
    """The PTX that widens four bytes at once, instruction by instruction, over every byte and multiplier.

    The interpreter cannot run it, so that this is its proof: bytes of a word hold different nibbles, all 16 x 16 of
    them, under all multipliers -15 .. 15 in either half.
    """
    multipliers = [m for m in range(-15, 16) if m]
    words = [int.from_bytes(bytes((b, 255 - b, b ^ 0x5A, (b + 97) % 256)), "little") for b in range(256)]
    for multiplier in multipliers:
        for other in (multiplier, -multiplier, 15, -1):
            constants = [c for m in (multiplier, other) for c in (repeated(abs(m)), repeated(offset(m)))]
            for word in words:
                found = run_ptx(WIDEN, [word, *constants])
                for half, m in enumerate((multiplier, other)):
                    for k in range(4):
                        nibble = word >> 8 * k >> 4 * half & 15
                        assert signed(found[half] >> 8 * k & 255) == abs(m) * nibble - offset(m)


def offset(multiplier: int) -> int:
    return abs(multiplier) * (8 - (multiplier < 0))


def repeated(byte: int) -> int:
    return byte * 0x01010101


def signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def run_ptx(text: str, inputs: list[int]) -> list[int]:
    """The few 32-bit instructions that the assembly uses, as the PTX manual defines them. $0 and $1 are outputs."""
    values = {f"${place + 2}": value for place, value in enumerate(inputs)}
    for line in text.splitlines():
        found = re.fullmatch(r"\s*(and\.b32|or\.b32|shr\.u32|sub\.u32|mul\.lo\.u32|lop3\.b32)\s+(.+);", line)
        if found is None:
            assert re.fullmatch(r"\s*(\.reg \.b32 [\w, ]+;|[{}])", line), f"unknown instruction: {line}"
            continue
        target, *operands = (part.strip() for part in found[2].split(","))
        a, b, *rest = (values[o] if o in values else int(o, 0) for o in operands)
        if found[1] == "lop3.b32":
            c, table = rest
            bits = sum((table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32))
        else:
            bits = {
                "and.b32": a & b, "or.b32": a | b, "shr.u32": a >> b, "sub.u32": a - b, "mul.lo.u32": a * b,
            }[found[1]]  # fmt: skip
        values[target] = bits % 2**32
    return [values["$0"], values["$1"]]
