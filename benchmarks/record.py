"""Result files: what was measured, on what, with which versions and commit. And the documents that quote them."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
WRITTEN = ("benchmarks/results", "README.md", "docs")  # by benchmarks


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def provenance(packages: tuple[str, ...] = ("torch", "numpy")) -> dict[str, Any]:
    """Device, versions and commit that a result belongs to."""
    commit = git("describe", "--always") or "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *(f":!{path}" for path in WRITTEN))
    return {
        "date": date.today().isoformat(),
        "commit": f"{commit}-dirty" if changed else commit,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in packages},
    }


def this_cpu() -> dict[str, Any]:
    """Return the CPU's name and instructions, and PyTorch's threads. Ratios depend on the instructions: VNNI multiplies
    int8 four times as fast as floats, and AMX multiplies bfloat16 as fast as int8."""
    has = {"VNNI": has_vnni(), "AMX": torch.cpu._is_amx_tile_supported()}
    lacks = [f"no {name}" for name, there in has.items() if not there] or ["VNNI and AMX"]
    device = ", ".join([cpu_name(), torch.backends.cpu.get_cpu_capability(), *lacks])
    return {"device": device, "threads": torch.get_num_threads()}


def has_vnni() -> bool:
    """Whether this CPU has instructions for products of int8. PyTorch has no public names for these questions."""
    return torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16; without them PyTorch takes several times as long for
    them as for float32, and a benchmark leaves them out."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def cpu_name() -> str:
    """Return the name of this CPU; PyTorch and Python do not know it on Linux."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def measured_on(result: Mapping[str, Any]) -> str:
    """A line on where a result comes from: date, commit, and as much of the machine as the result says."""
    machine = [f"{result['machine']} CPU"]
    if result.get("device", "cpu") != "cpu":
        machine.append(result["device"])
    if "threads" in result:
        machine.append(f"{result['threads']} threads")
    machine += [f"torch {version}" for name, version in result["versions"].items() if name == "torch"]
    return f"Measured on {result['date']} at commit {result['commit']}: {', '.join(machine)}."


def write_result(name: str, result: Mapping[str, Any]) -> Path:
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(result, ensure_ascii=False))
    return path


def read_result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def with_table(document: str, name: str, table: str) -> str:
    """The document with the generated block `name` replaced; the markers stay."""
    start, end = f"<!-- generated: {name} -->\n", f"<!-- end: {name} -->"
    head, found, rest = document.partition(start)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the document has no block {name!r}")
    return head + start + table + end + tail


def documents() -> list[Path]:
    """Where the tables of benchmarks are shown: the README and the pages of the documentation."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def quoting(name: str, paths: Iterable[Path]) -> list[Path]:
    """Those of some documents that have the generated block `name`. Raises ValueError where none has."""
    searched = list(paths)
    found = [path for path in searched if f"<!-- generated: {name} -->" in path.read_text(encoding="utf-8")]
    if not found:
        raise ValueError(f"no document has a block {name!r}, of {', '.join(path.name for path in searched)}")
    return found


def quote(
    name: str,
    table: Callable[[dict[str, Any]], str],
    *,
    block: str = "",
    paths: Iterable[Path] | None = None,
) -> None:
    """Put the table of the written result `name` into every document that has its block.

    block: the name of the block, where that is not the result's. paths: the documents; README.md and docs/*.md if None.
    Raises ValueError where no document has the block.
    """
    for path in quoting(block or name, documents() if paths is None else paths):
        text = with_table(path.read_text(encoding="utf-8"), block or name, table(read_result(name)))
        path.write_text(text, encoding="utf-8")
