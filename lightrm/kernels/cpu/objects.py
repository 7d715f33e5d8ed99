"""Runs kernels that were compiled ahead (`ahead`), on the threads of PyTorch's own OpenMP.

A file is used if it is for this CPU, of the same source as the modules beside it, and unchanged since it was made; all
else is compiled by numba.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import platform
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import torch

from lightrm.kernels.cpu import dot_tiles, int16_rows, simd

FOLDER = Path(__file__).parent / "objects"
INDEX, HOST = "index.json", "host"
TEAM = {"lightrm_thread": "omp_get_thread_num", "lightrm_threads": "omp_get_num_threads"}
NEEDED = {*TEAM, "malloc", "free", "abort", "memcpy", "memset", "memmove", "sqrtf"}  # what a kernel may call
SOURCES = (
    "attention_loop", "attention_pairs", "dot_tiles", "few_rows", "head_loops", "instructions", "int16_rows",
    "row_loops", "scratch", "simd", "widen_loop", "ahead", "objects", "../paths", "../../schemes/int8",
)  # fmt: skip
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float32, torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint32,
)}  # fmt: skip
Kind = tuple[torch.dtype | None, int]  # a tensor's dtype and dimensions; of a number float32 or None, and 0
TILES = [
    simd.ROWS, simd.LANES, simd.PAIRS, simd.FUSED, dot_tiles.LANES, dot_tiles.AVAILABLE, int16_rows.AVAILABLE
]  # fmt: skip


def source() -> str:
    """Return a checksum of everything that the kernels are made of."""
    text = b"".join((Path(__file__).parent / f"{name}.py").read_bytes() for name in SOURCES)
    return hashlib.sha256(text).hexdigest()


class Code:
    """The kernels of one folder. They stay loaded as long as the process."""

    def __init__(self, folder: Path, index: dict[str, Any], openmp: ctypes.CDLL) -> None:
        self.name, self.kernels, self.openmp = folder.name, index["kernels"], openmp
        for ours, theirs in TEAM.items():
            llvm.add_symbol(ours, ctypes.cast(getattr(openmp, theirs), ctypes.c_void_p).value)
        self.engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine())
        for name, facts in self.kernels.items():
            code = (folder / f"{name}.o").read_bytes()
            if hashlib.sha256(code).hexdigest() != facts["sha256"]:
                raise ValueError(f"{folder / name}.o has changed since it was made")
            self.engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self.engine.finalize_object()
        of_one = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        self.expected: dict[str, list[Kind]] = {
            name: [(DTYPES.get(kind), dimensions) for kind, dimensions in facts["arguments"]]
            for name, facts in self.kernels.items()
        }
        self.entries = {
            name: of_one(self.engine.get_function_address(facts["entry"])) for name, facts in self.kernels.items()
        }

    def run(self, name: str, arguments: Sequence[Any], threads: int) -> bool:
        """Run a kernel on its arguments, on so many threads. Returns False if it is not here or takes others."""
        expected = self.expected.get(name)
        words = None if expected is None else words_of(arguments, expected)
        if words is None:
            return False
        if threads == 1:
            self.entries[name](words)
        else:
            self.openmp.GOMP_parallel(self.entries[name], words, threads, 0)
        return True


def words_of(arguments: Sequence[Any], expected: Sequence[Kind]) -> Any:
    """Return arguments as an array of 64-bit words: of a tensor its address and its shape, of a number its bits. None
    if they are of other kinds."""
    words: list[int] = []
    for argument, (dtype, dimensions) in zip(arguments, expected, strict=True):
        if dimensions:
            if argument.dtype != dtype or argument.ndim != dimensions or not argument.is_contiguous():
                return None
            words += (argument.data_ptr(), *argument.shape)
        elif dtype == torch.float32:
            words.append(struct.unpack("<I", struct.pack("<f", argument))[0])
        else:
            words.append(int(argument))
    return (ctypes.c_int64 * len(words))(*words)


def machine() -> llvm.TargetMachine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(codemodel="default", reloc="pic", jit=True)


def openmp() -> ctypes.CDLL | None:
    """Return the OpenMP that PyTorch runs on, if it is one that starts a team by a call (GNU's, or Intel's and LLVM's
    on Linux). Its threads wait for work of both."""
    torch.get_num_threads()
    maps = Path("/proc/self/maps")
    if platform.system() != "Linux" or not maps.is_file():
        return None
    loaded = {line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines() if "omp" in line}
    for path in sorted(loaded, key=lambda path: "/torch" not in path):
        if Path(path).name.startswith(("libgomp", "libiomp5", "libomp")):
            library = ctypes.CDLL(path)
            library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            library.GOMP_parallel.restype = None
            return library
    return None


def fits(index: dict[str, Any]) -> bool:
    """Whether code is of the modules beside it, runs on this CPU, and divides its work into the tiles that they do."""
    host = llvm.get_host_cpu_features()
    asked = (feature[1:] for feature in index["features"].split(",") if feature.startswith("+"))
    return index["source"] == source() and index["tiles"] == TILES and all(host.get(feature) for feature in asked)


@cache
def code() -> Code | None:
    """Return the code for this CPU; None if there is none that can be used. The CPU's own comes first."""
    library = openmp()
    folders = sorted(FOLDER.glob(f"*/{INDEX}"), key=lambda path: path.parent.name != HOST)
    for path in folders if library is not None else ():
        try:
            index = json.loads(path.read_text())
            if fits(index):
                assert library is not None
                return Code(path.parent, index, library)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # half written, changed, or of another version
            continue
    return None
