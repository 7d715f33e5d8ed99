"""Kernels compiled ahead give the bits of those that numba compiles when they are called, and are left alone if they do
not fit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightrm.kernels import forks
from lightrm.kernels.cpu import ahead, cpu_attention, cpu_passes, cpu_products, objects
from lightrm.kernels.operands import HeadNorms, Sums
from lightrm.schemes import int4
from lightrm.schemes.int8 import Rowwise
from tests.test_integer_kernels import int8s, normal, product_of
from tests.test_kernels import KINDS, flat, rows, rule_of

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(objects.openmp() is None, reason="there is no OpenMP here that starts a team by a call"),
]


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> objects.Code:
    """That which this installation has, or else made here."""
    ready = objects.code()
    if ready is not None:
        return ready
    folder = tmp_path_factory.mktemp("objects")
    program = f"import pathlib; from lightrm.kernels.cpu import ahead; ahead.build(pathlib.Path({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", program], check=True)
    library = objects.openmp()
    assert library is not None
    return objects.Code(folder, json.loads((folder / objects.INDEX).read_text()), library)


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every kernel that is compiled ahead, on an awkward shape: name and call."""
    acc, row_scale, scale = product_of(37, 3 * 80)
    x, bias = normal(37, 240), normal(240, seed=8)
    sums, angle = Sums(acc, row_scale, scale, bias), normal(37, 40, seed=6)
    rotation, norms = (angle.cos(), angle.sin()), HeadNorms(normal(80).abs(), normal(80, seed=1).abs(), 1e-6)
    yield "row_loops.norm_quantize_rows", lambda: cpu_passes.norm_quantize(x, 1e-6)
    yield "row_loops.norm_quantize_rows", lambda: cpu_passes.norm_quantize(x, 1e-6, bias, scale, 16)
    yield "row_loops.quantize_rows", lambda: cpu_passes.quantize(x)
    yield "row_loops.add_rows", lambda: changed(cpu_passes.add_sums, x, sums)
    yield "row_loops.add_norm_quantize_rows", lambda: changed(cpu_passes.add_norm_quantize, x, sums, 1e-6, None, bias)
    yield "row_loops.add_normed_rows", lambda: changed(cpu_passes.add_normed, x, sums, bias, 1e-6)
    yield "row_loops.gated_quantize_rows", lambda: cpu_passes.gated_quantize(sums, 8, "gelu_tanh")
    yield "head_loops.split_rows", lambda: cpu_passes.split_heads(sums, (80, 80), 80, rotation, norms)
    narrow = int4.quantize(normal(50, 576), 32)
    yield "widen_loop.widen_rows", lambda: cpu_passes.widen(narrow.packed, narrow.multiplier_OG)
    dtype = torch.bfloat16 if cpu_passes.PAIRS else torch.float32
    attention = f"attention_{'pairs' if cpu_passes.PAIRS else 'loop'}.attention_rows"
    paths = cpu_attention.paths(flat((127, 1, 65)), torch.device("cpu"), None)
    q, k, v = rows(193, 4, 24), rows(193, 2, 24, seed=1).to(dtype), rows(193, 2, 24, seed=2).to(dtype)
    for kind in KINDS:
        yield attention, lambda kind=kind: cpu_attention.attention(q, k, v, paths, rule_of(24, 4, kind))
    values = int8s(9, 576)
    if cpu_products.DOTS:
        weight = Rowwise(int8s(50, 576, seed=1), torch.ones(50))
        yield "few_rows.multiply_int8", lambda: cpu_products.by_dots(values, weight)
        yield "few_rows.multiply_int4", lambda: cpu_products.by_dots(values, narrow)
    elif cpu_products.PAIRS:
        whole, packed = Rowwise(int8s(48, 576, seed=1), torch.ones(48)), int4.quantize(normal(48, 576), 32)
        yield "int16_rows.multiply_int8", lambda: cpu_products.by_pairs(values, whole)
        yield "int16_rows.multiply_int4", lambda: cpu_products.by_pairs(values, packed)


def changed(kernel: Callable[..., Any], x: torch.Tensor, *arguments: Any) -> tuple[Any, torch.Tensor]:
    copy = x.clone()
    return kernel(copy, *arguments), copy


def bits_of(found: Any) -> list[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        return [found.contiguous().view(torch.uint8)]
    return [] if found is None else [x for part in found for x in bits_of(part)]


@pytest.mark.parametrize("alone", [False, True])
def test_the_same_bits(code: objects.Code, alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the team's threads, and in a process with one."""
    monkeypatch.setattr(forks, "alone", lambda: alone)
    ran: set[str] = set()
    for name, call in calls():
        with monkeypatch.context() as patch:
            patch.setattr(objects, "code", lambda: None)
            truth = bits_of(call())

            class Watched:
                def run(self, kernel: str, arguments: Any, threads: int, name: str = name) -> bool:
                    done = code.run(kernel, arguments, threads)
                    assert done == (kernel == name or kernel in code.kernels), kernel
                    assert threads == (1 if alone else torch.get_num_threads())
                    ran.add(kernel)
                    return done

            patch.setattr(objects, "code", Watched)
            found = bits_of(call())
        assert all(torch.equal(a, b) for a, b in zip(truth, found, strict=True)), name
    assert ran == set(code.kernels), "every kernel that is compiled ahead is called here"


def test_other_arguments_are_left_to_numba(code: objects.Code) -> None:
    x, values, scale = normal(4, 8), torch.empty(4, 8, dtype=torch.int8), torch.empty(4)
    assert code.run("row_loops.quantize_rows", (x, values, scale), 1)
    assert not code.run("row_loops.quantize_rows", (x.double(), values, scale), 1)
    assert not code.run("row_loops.quantize_rows", (normal(8, 4).T, values, scale), 1)
    assert not code.run("row_loops.unknown", (x,), 1)


def test_a_folder_that_does_not_fit_is_not_used(
    code: objects.Code, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changed files, code of other sources, for a CPU with more features, or for other tiles; a half-written index."""
    ready = objects.FOLDER / objects.HOST
    if not (ready / objects.INDEX).is_file():
        pytest.skip("nothing is compiled ahead here")
    monkeypatch.setattr(objects, "FOLDER", tmp_path)
    monkeypatch.setattr(objects, "code", objects.code.__wrapped__)
    folder = Path(shutil.copytree(ready, tmp_path / objects.HOST))
    assert objects.code() is not None
    index = json.loads((folder / objects.INDEX).read_text())
    for name, other in (("source", "0"), ("features", "+of-another-cpu"), ("tiles", [0]), ("kernels", {"x": {}})):
        (folder / objects.INDEX).write_text(json.dumps(index | {name: other}))
        assert objects.code() is None, name
    (folder / objects.INDEX).write_text(json.dumps(index)[:-9])
    assert objects.code() is None
    (folder / objects.INDEX).write_text(json.dumps(index))
    spoilt = folder / "row_loops.quantize_rows.o"
    spoilt.write_bytes(spoilt.read_bytes()[:-1] + b"\0\1")
    assert objects.code() is None


def test_the_levels_of_a_wheel(tmp_path: Path) -> None:
    """Code for a common level of CPUs gives what numba gives with the same instructions."""
    cpu, features = ahead.LEVELS["avx2"]
    host = ahead.llvm.get_host_cpu_features()
    if not all(host.get(feature[1:]) for feature in features.split(",")):
        pytest.skip("this CPU has less than AVX2")
    program = f"""
import pathlib
from lightrm.kernels.cpu import ahead, objects, cpu_passes, cpu_products
folder = pathlib.Path({str(tmp_path)!r})
ahead.build(folder / "avx2")
objects.FOLDER = folder
code = objects.code()
assert code is not None and code.name == "avx2" and not cpu_passes.PAIRS and cpu_products.PAIRS
import torch
from tests import test_ahead as tests
for name, call in tests.calls():
    ready = objects.code
    objects.code = lambda: None
    truth = tests.bits_of(call())
    objects.code = ready
    assert all(torch.equal(a, b) for a, b in zip(truth, tests.bits_of(call()), strict=True)), name
print("equal")
"""
    environment = os.environ | {
        "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path / "cache")
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["equal"], done.stderr
