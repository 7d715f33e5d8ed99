"""The house stays as drawn: imports run downwards, names say something, the front door is narrow and cheap."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightrm

PACKAGE = Path(lightrm.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Top to bottom: a room may import the rooms after it, and its neighbours in the same entry.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("__init__",),
    ("cli",),
    ("demonstration",),
    ("exporting",),
    ("measuring",),
    ("sensitivity",),
    ("jobs",),
    ("journal",),
    ("outputs",),
    ("survey",),
    ("identity",),
    ("opening",),
    ("scorer",),
    ("pages", "combination"),
    ("fidelity", "evaluation", "calibration"),
    ("agreement", "ranking", "explanation"),
    ("questions", "cards"),
    ("reading",),
    ("sheets",),
    ("records", "forms"),
    ("conversation",),
    ("tokens",),
    ("chat", "checkpoint_tokenizer"),
    ("sandbox", "vocabulary", "tokenizer_files", "tokenizer_limits"),
    ("templates", "guard"),
    ("engine",),
    ("compensating", "native", "restoring"),
    ("loading",),
    ("checkpoints",),
    ("streaming",),
    ("transformer",),
    ("linear", "heads"),
    ("packers", "compensation"),
    ("residence", "twins"),
    ("weights", "folding", "positions", "plan"),
    ("architecture",),
    ("ops",),
    ("products",),
    ("dispatch",),
    ("kernels",),
    ("schemes",),
    ("prefixes",),
    ("packing",),
    ("bounds",),
    ("progress", "tables", "fields", "files", "arena", "forks", "checksums"),
    ("errors",),
)
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
HEAVY = ("transformers", "ray", "trl", "bitsandbytes", "peft", "datasets", "pandas", "polars")
NAMELESS = {"utils", "util", "common", "helpers", "misc", "core", "base"}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    """Modules that a file imports, at any depth, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_run_downwards() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} is in no floor: draw it into FLOORS and the README"
        for path in FILES
        if room(path) not in FLOOR
    ]
    wrong += [
        f"{path.relative_to(PACKAGE)} imports {name}, which lies above it"
        for path in FILES
        if room(path) in FLOOR
        for name in upward(path)
    ]
    assert not wrong, "\n".join(wrong)


def upward(path: Path) -> Iterator[str]:
    for name in sorted(imports(path)):
        parts = name.split(".")
        if parts[0] != "lightrm" or len(parts) < 2 or room(path) == "__init__":
            continue
        target = parts[1] if parts[1] in FLOOR else "__init__"
        if room(path) == "cli" and target == "__init__":
            continue  # the command line enters by the front door, as users do
        if FLOOR[room(path)] > FLOOR[target]:
            yield name


def test_files_are_rooms() -> None:
    wrong: list[str] = []
    for path in FILES:
        text, name = path.read_text(), path.relative_to(PACKAGE)
        lines = text.count("\n")
        wrong += [f"{name}: a name that says nothing"] if path.stem in NAMELESS else []
        wrong += [f"{name} has {lines} lines, over 350: is it two rooms?"] if lines > 350 else []
        wrong += [] if ast.get_docstring(ast.parse(text)) else [f"{name} does not say what lives in it"]
    assert not wrong, "\n".join(wrong)


def test_heavy_libraries_stay_outside() -> None:
    wrong: list[str] = []
    for path in FILES:
        found = {name.split(".")[0] for name in imports(path)}
        allowed = {"bitsandbytes"} if room(path) == "kernels" else set()
        outside = {"triton"} if room(path) != "kernels" else set()
        heavy = found & ((set(HEAVY) | outside) - allowed)
        wrong += [f"{path.relative_to(PACKAGE)} imports {', '.join(sorted(heavy))}"] if heavy else []
    assert not wrong, "\n".join(wrong)


def test_three_rooms_open_the_door_to_kernels() -> None:
    for path in FILES:
        if room(path) not in ("ops", "products", "dispatch", "kernels"):
            assert not any(name.startswith("lightrm.kernels") for name in imports(path)), path


def test_judges_know_numbers_alone() -> None:
    """Whoever has scores can be judged: these rooms import no framework, not even by another room."""
    program = (
        "import sys\nfrom lightrm import agreement, calibration, combination, evaluation, fidelity, pages, ranking\n"
    )
    program += "print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_the_model_text_knows_no_quantization() -> None:
    assert not any("scheme" in name for name in imports(PACKAGE / "transformer.py"))


def test_remote_code_is_never_asked_for() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                asked = [ast.unparse(k.value) for k in node.keywords if k.arg == "trust_remote_code"]
                assert asked in ([], ["False"]), path
                if isinstance(node.func, ast.Attribute) and ast.unparse(node.func) == "torch.load":
                    assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), path


def test_public_names() -> None:
    assert sorted(lightrm.__all__) == [
        "CheckpointError", "InputError", "KernelWarning", "LightRMError", "MemoryLimitError", "MemoryWarning",
        "NumericsError", "RewardModel", "SchemeError",
        "TemplateError", "TokenizerError", "TruncationWarning", "evaluate", "load", "measure_fidelity",
        "read_questions",
    ]  # fmt: skip
    for name in lightrm.__all__:
        assert getattr(lightrm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = lightrm.lode


def test_every_error_has_one_root() -> None:
    from lightrm import errors

    found = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(found) > 10
    assert all(issubclass(value, lightrm.LightRMError) for value in found)
    drawn = errors.__doc__ or ""
    assert all(value.__name__ in drawn for value in found), "the tree in the docstring is complete"


def test_import_is_cheap() -> None:
    """`import lightrm` starts no CUDA, opens no socket, and loads no framework at all."""
    program = """
import json, socket, sys
def refuse(*a, **k): raise OSError("network")
socket.socket.connect = refuse
import lightrm
print(json.dumps(sorted({n.split(".")[0] for n in sys.modules})))
import lightrm.scorer, torch
assert not torch.cuda.is_initialized()
print(json.dumps(sorted({n.split(".")[0] for n in sys.modules})))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    front, scorer = map(json.loads, result.stdout.strip().splitlines())
    assert "torch" not in front
    assert not set(HEAVY) & set(scorer)


def test_readme_draws_every_room() -> None:
    readme = (PACKAGE.parent / "README.md").read_text()
    inside = (p.stem for folder in ("checkpoints", "schemes", "kernels") for p in (PACKAGE / folder).rglob("[a-z]*.py"))
    for name in {room(path) for path in FILES} | set(inside):
        assert name in readme, f"README's file tree lacks {name}"
