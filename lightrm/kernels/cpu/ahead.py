# mypy: ignore-errors
"""Kernels compiled ahead of their first use: `python -m lightrm.kernels.cpu.ahead [LEVEL ...]`.

numba compiles a kernel when it is first called, which takes seconds. Here its plain loop is compiled for one CPU, or
for a level of CPUs, into an object file that needs neither numba nor its runtime; `objects` loads these files. Each
thread of a team takes its part of the loop. Without a level the files are for the CPU at hand. They lie beside this
module and are not in the repository; a wheel holds those of LEVELS.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from lightrm.kernels.cpu import (
    attention_loop,
    attention_pairs,
    cpu_products,
    few_rows,
    head_loops,
    int16_rows,
    objects,
    row_loops,
    simd,
    widen_loop,
)
from lightrm.kernels.cpu.instructions import INT, WORD
from lightrm.kernels.cpu.scratch import pointer

V3 = "+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+cx16,+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe"
V4 = f"{V3},+avx512f,+avx512bw,+avx512cd,+avx512dq,+avx512vl"
LEVELS = {
    "avx512-bf16": ("x86-64-v4", f"{V4},+avx512vnni,+avx512bf16"),  # AMD since Zen 4, Xeon since Sapphire Rapids
    "avx512-vnni": ("x86-64-v4", f"{V4},+avx512vnni"),
    "avx-vnni": ("x86-64-v3", f"{V3},+avxvnni"),  # Intel's laptops since the 12th generation
    "avx2": ("x86-64-v3", V3),
}
f4, i1, i2, i4, i8, u1, u2, u4 = (
    types.float32, types.int8, types.int16, types.int32, types.int64, types.uint8, types.uint16, types.uint32,
)  # fmt: skip
ROWS, SUMS, VECTOR = f4[:, ::1], (i4[:, ::1], f4[::1], f4[::1], f4[::1]), f4[::1]
TURNS = (f4[:, ::1], f4[:, ::1], VECTOR, VECTOR, f4, f4[:, :, ::1])
RULE = (i4[:, ::1], f4, f4, i8, VECTOR, f4[:, :, ::1])
SIGNATURES = {
    row_loops.norm_quantize_rows: (ROWS, f4, VECTOR, VECTOR, i8, i1[:, ::1], VECTOR),
    row_loops.quantize_rows: (ROWS, i1[:, ::1], VECTOR),
    row_loops.add_rows: (ROWS, *SUMS),
    row_loops.add_norm_quantize_rows: (ROWS, *SUMS, f4, VECTOR, VECTOR, i8, i1[:, ::1], VECTOR),
    row_loops.add_normed_rows: (ROWS, *SUMS, VECTOR, f4),
    row_loops.gated_quantize_rows: (*SUMS, i8, f4, f4, i1[:, ::1], VECTOR),
    widen_loop.widen_rows: (u1[:, ::1], i1[:, ::1], i8, i8, i1[:, ::1]),
}
IN_FLOAT = {
    head_loops.split_rows: (*SUMS, *TURNS, f4[:, :, ::1], f4[:, :, ::1]),
    attention_loop.attention_rows: (f4[:, :, ::1], f4[:, :, ::1], f4[:, :, ::1], *RULE),
}
IN_HALF = {
    head_loops.split_rows: (*SUMS, *TURNS, u2[:, :, ::1], u2[:, :, ::1]),
    attention_pairs.attention_rows: (f4[:, :, ::1], u4[:, :, ::1], u2[:, :, ::1], *RULE),
}
DOTS = {
    few_rows.multiply_int8: (i1[:, ::1], i4[:, ::1], i1[:, ::1], i4[:, ::1]),
    few_rows.multiply_int4: (i1[:, ::1], i4[:, ::1], u1[:, ::1], i1[:, ::1], i8, i8, i4[:, ::1]),
}
PAIRS = {
    int16_rows.multiply_int8: (i2[:, ::1], i1[:, ::1], i4[:, ::1]),
    int16_rows.multiply_int4: (i2[:, ::1], u1[:, ::1], i1[:, ::1], i8, i8, i4[:, ::1]),
}
OPTIONS = {name: option for name, option in row_loops.PLAIN.items() if name != "cache"}
FOR_ERRORS = re.compile(
    r"Py\w+|numba_gil_\w+|numba_unpickle|numba_do_raise|numba_runtime_build_excinfo_struct|NRT_Free|NRT_MemInfo_call_dtor"
)
DECLARED = re.compile(r"^declare ([^@]*)@([\w.]+)\(([^\n]*?)\)[^\n]*$", re.MULTILINE)
UNREACHED = "{\n  call void @abort()\n  unreachable\n}"


def from_team(name: str) -> Any:
    """Return a call of one of the functions of `objects.TEAM`."""

    @intrinsic
    def call(typing):
        def generate(context, builder, signature, arguments):
            function = get_or_insert_function(builder.module, ir.FunctionType(INT, []), name)
            return builder.sext(builder.call(function, []), WORD)

        return types.intp(), generate

    return call


THREAD, THREADS = (from_team(name) for name in objects.TEAM)


@intrinsic
def as_float(typing, word):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(builder.trunc(arguments[0], INT), ir.FloatType())

    return types.float32(types.intp), generate


@njit
def own_part(count):
    """What `prange` is in each thread: the part of range(count) that is its own."""
    thread, threads = THREAD(), THREADS()
    return range(count * thread // threads, count * (thread + 1) // threads)


def entry_of(loop: Any, signature: tuple[Any, ...]) -> Any:
    """Return a function of one address: that of the words which `objects.words_of` makes of a kernel's arguments."""
    plain = loop.by_one.py_func
    inside = plain.__globals__ | {"prange": own_part}
    body = njit(**OPTIONS)(FunctionType(plain.__code__, inside, plain.__name__))
    lines, at = [], 0
    for kind in signature:
        if isinstance(kind, types.Array):
            shape = "".join(f"words[{at + 1 + d}], " for d in range(kind.ndim))
            lines.append(f"carray(pointer(words[{at}]), ({shape}), np.{kind.dtype})")
            at += kind.ndim
        else:
            lines.append(f"as_float(words[{at}])" if kind == types.float32 else f"words[{at}]")
        at += 1
    space = {"carray": carray, "pointer": pointer, "as_float": as_float, "np": np, "body": body}
    exec(f"def entry(words):\n    body({', '.join(lines)})", space)
    return space["entry"]


def compiled(loop: Any, signature: tuple[Any, ...]) -> tuple[str, bytes]:
    """Return the name of a kernel's entry, and its object file. Functions of Python and of numba are called only where
    an error would be raised, and no kernel raises: they become calls of C's abort."""
    made = numba.cfunc(types.void(types.CPointer(types.intp)))(entry_of(loop, signature))
    text = re.sub(DECLARED, defined, str(made._library._final_module))
    text = text if "declare void @abort()" in text else f"{text}\ndeclare void @abort()\n"
    cpu, features = target()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=cpu, features=features, opt=3, reloc="pic", codemodel="small"
    )
    return made._wrapper_name, machine.emit_object(llvm.parse_assembly(text))


def defined(found: re.Match[str]) -> str:
    """Return a definition for a function that is called only to raise an error, or to free an array of numba's; the
    declaration for any other that a kernel may call. Raises ValueError if it may not."""
    result, name, arguments = found.groups()
    if name.startswith("llvm.") or name in objects.NEEDED:
        return found.group()
    if not re.fullmatch(FOR_ERRORS, name):
        raise ValueError(f"a kernel that is compiled ahead cannot call {name}")
    return f"define internal {result}@{name}({arguments}) {UNREACHED}"


def target() -> tuple[str, str]:
    """Return the name and the features of the CPU to compile for."""
    name = numba.config.CPU_NAME or llvm.get_host_cpu_name()
    host = llvm.get_host_cpu_features().flatten()
    return name, host if numba.config.CPU_FEATURES is None else numba.config.CPU_FEATURES


def kernels() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yield those that the CPU to compile for runs."""
    products = DOTS if cpu_products.DOTS else PAIRS if cpu_products.PAIRS else {}
    yield from (SIGNATURES | (IN_HALF if simd.PAIRS else IN_FLOAT) | products).items()


def build(folder: Path) -> None:
    """Write the object files of one level, and at the end the index that makes them valid."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / objects.INDEX).unlink(missing_ok=True)
    for name in objects.TEAM:
        llvm.add_symbol(name, ctypes.cast(ctypes.CDLL(None).abort, ctypes.c_void_p).value)  # numba asks for an address
    cpu, features = target()
    index = {"cpu": cpu, "features": features, "source": objects.source(), "tiles": objects.TILES, "kernels": {}}
    for loop, signature in kernels():
        name, code = compiled(loop, signature)
        (folder / f"{loop.name}.o").write_bytes(code)
        arguments = [(str(getattr(kind, "dtype", kind)), getattr(kind, "ndim", 0)) for kind in signature]
        index["kernels"][loop.name] = {
            "entry": name, "sha256": hashlib.sha256(code).hexdigest(), "arguments": arguments
        }  # fmt: skip
    (folder / objects.INDEX).write_text(json.dumps(index, indent=1))


def main(levels: list[str]) -> None:
    if not levels:
        build(objects.FOLDER / objects.HOST)
    for level in levels:
        cpu, features = LEVELS[level]
        program = f"from lightrm.kernels.cpu import ahead; ahead.build(ahead.objects.FOLDER / {level!r})"
        environment = os.environ | {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features, "NUMBA_DISABLE_CACHE": "1"}
        subprocess.run([sys.executable, "-c", program], env=environment, check=True)


if __name__ == "__main__":
    main(list(LEVELS) if sys.argv[1:] == ["all"] else sys.argv[1:])
