"""The house stays as drawn: imports run downwards, names say something, the front door is narrow and cheap."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightrm

PACKAGE = Path(lightrm.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Top to bottom: a wing may import the wings after it. A folder is a wing, and so is a file beside the folders.
WINGS = (
    "__init__", "cli", "integrations", "serving", "measure", "jobs", "opening", "scorer", "cross_encoder",
    "answer_scores", "loading", "engine", "checkpoints", "judge", "data", "text", "model", "kernels", "schemes",
    "architecture", "display", "typed_json", "checksums", "files", "errors",
)  # fmt: skip
FLOOR = {wing: level for level, wing in enumerate(WINGS)}
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
        f"{path.relative_to(PACKAGE)} is in no wing: draw it into WINGS and the README"
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


DOORS = ("passes", "products", "operands", "dispatch", "segments", "arena", "forks")


def test_kernels_are_reached_through_their_doors() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in FILES
        if room(path) != "kernels"
        for name in sorted(imports(path))
        if name.startswith("lightrm.kernels.") and name.split(".")[2] not in DOORS
    ]
    assert not wrong, "\n".join(wrong)


def test_names_are_told_apart() -> None:
    """No two files of one name; ten at most lie beside the folders; a folder says what lives there in two lines."""
    names = [path.stem for path in FILES if path.stem != "__init__"]
    assert {name for name in names if names.count(name) > 1} == set()
    assert len(list(PACKAGE.glob("*.py"))) <= 10
    for path in PACKAGE.glob("*/**/__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_judges_know_numbers_alone() -> None:
    """Whoever has scores can be judged: these rooms import no framework, not even by another room."""
    judges = ", ".join(sorted(path.stem for path in (PACKAGE / "judge").glob("[!_]*.py")))
    program = f"import sys\nfrom lightrm.judge import {judges}\n"
    program += "print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_the_model_text_knows_no_quantization() -> None:
    assert not any("scheme" in name for name in imports(PACKAGE / "model" / "decoder.py"))


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
        "Bound", "CheckpointError", "ConfigError", "CopyError", "CorruptFileError", "DownloadError", "Effort",
        "Estimate", "Evaluation", "Explanation", "FidelityReport", "InputError", "KernelWarning",
        "LightRMError", "Limit", "LoadReport", "MemoryLimitError", "MemoryWarning", "MissingHeadError",
        "NumericsError", "Question", "Ranked", "Ranking", "Rankings", "RewardModel", "SchemeError",
        "TemplateError", "TensorMismatchError", "TokenizerError", "TokenizerWarning", "TooLongError",
        "TruncationWarning", "UnsafePickleError", "UnsupportedModelError", "evaluate", "load",
        "measure_fidelity", "read_questions",
    ]  # fmt: skip
    for name in lightrm.__all__:
        assert getattr(lightrm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = lightrm.lode


@pytest.mark.parametrize("owner", [lightrm.RewardModel, lightrm])
def test_what_is_returned_is_public(owner: object) -> None:
    """A class of lightrm's own that a public function returns has its name in `lightrm`."""
    functions = [value for name, value in inspect.getmembers(owner, inspect.isfunction) if not name.startswith("_")]
    assert functions
    for function in functions:
        for name in re.findall(r"\b[A-Z]\w+", str(inspect.signature(function).return_annotation)):
            assert name in {"Iterator", "None", *lightrm.__all__}, f"{function.__name__} returns {name}"


def test_every_error_has_one_root() -> None:
    from lightrm import errors

    found = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(found) > 10
    assert all(issubclass(value, lightrm.LightRMError) for value in found)
    assert all(getattr(lightrm, value.__name__) is value for value in found), "and each is public"
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


def test_readme_draws_every_wing() -> None:
    readme = (PACKAGE.parent / "README.md").read_text()
    for name in {room(path) for path in FILES} - {"__init__"}:
        assert name in readme, f"README's file tree lacks {name}"
