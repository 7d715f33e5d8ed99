"""Result files: what was measured, on what, with which versions and commit. And the documents that quote them."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable, Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
WRITTEN = ("benchmarks/results", "README.md")  # by benchmarks


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
    """AMX is named either way: it multiplies bfloat16 as fast as int8, and ratios are others without it."""
    amx = "with AMX" if torch.cpu._is_amx_tile_supported() else "without AMX"  # PyTorch has no public name for it
    return {"device": f"{torch.backends.cpu.get_cpu_capability()} {amx}", "threads": torch.get_num_threads()}


def measured_on(result: Mapping[str, Any]) -> str:
    """A line on where a result with `this_cpu` in it comes from."""
    return (
        f"Measured on {result['date']} at commit {result['commit']}: {result['machine']} CPU, {result['device']}, "
        f"{result['threads']} threads, torch {result['versions']['torch']}."
    )


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


def quote(name: str, table: Callable[[dict[str, Any]], str], path: Path = ROOT / "README.md") -> None:
    """Put the table of a written result into a document."""
    text = with_table(path.read_text(encoding="utf-8"), name, table(read_result(name)))
    path.write_text(text, encoding="utf-8")
