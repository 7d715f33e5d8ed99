"""Does the wheel of this clone install and run under every Python that lightrm is for?

    python -m benchmarks.releases [--env FOLDER]

Builds wheel and source archive with `python -m build`, checks both with twine, installs the wheel with its dependencies
under each Python into an environment of its own, and runs `lightrm demo` there, outside of the clone. Once more the
wheel is started with uvx, in one line. The Pythons are those on PATH and pyenv's; one that is not there is named as
missing. build, twine and uv are installed in an environment made here. Writes results/releases.json and the sentence in
the documents.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, provenance, quote, write_result

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TOOLS = ("build", "twine", "uv")
SCORE = re.compile(r"[+-]\d+\.\d\d\b")
ABOUT = (
    "import json, platform; from importlib.metadata import version; "
    "print(json.dumps({'python': platform.python_version(), "
    "**{name: version(name) for name in ('lightrm', 'torch', 'transformers', 'numpy')}}))"
)


def tools_in(folder: Path) -> Path:
    """The folder of build's, twine's and uv's commands, installed if they are not there."""
    programs = folder / "bin"
    if not (programs / "uv").is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([programs / "python", "-m", "pip", "install", "-q", *TOOLS], check=True)
    return programs


def interpreter(number: str) -> str | None:
    """A Python of this number: on PATH, or pyenv's."""
    kept = sorted((Path.home() / ".pyenv" / "versions").glob(f"{number}.*/bin/python"))
    return str(kept[-1]) if kept else shutil.which(f"python{number}")


def run(command: Sequence[str | Path], folder: Path, more: Mapping[str, str] | None = None) -> str:
    """Run a command outside of the clone, and return what it printed."""
    plain = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env={**plain, "NO_COLOR": "1", "COLUMNS": "100", **(more or {})},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}")
    return done.stdout


def installed(number: str, wheel: Path, uv: Path, root: Path) -> dict[str, Any]:
    """Install the wheel under one Python and run the demonstration."""
    found = interpreter(number)
    if found is None:
        return {"missing": "not on this machine"}
    env = root / number
    started = time.perf_counter()
    run([uv, "venv", "-q", "--python", found, env], root)
    run([uv, "pip", "install", "-q", "--python", env / "bin" / "python", wheel], root)
    seconds = time.perf_counter() - started
    shown = run([env / "bin" / "lightrm", "demo"], root)
    versions = json.loads(run([env / "bin" / "python", "-c", ABOUT], root))
    return {"installed_s": round(seconds, 1), "versions": versions, "scores": SCORE.findall(shown)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--env", type=Path, default=Path("release-tools"), help="the environment of build, twine and uv"
    )
    programs = tools_in(parser.parse_args().env.absolute())
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        run([programs / "python", "-m", "build", "--outdir", root / "dist", ROOT], root)
        (wheel,), (archive,) = root.glob("dist/*.whl"), root.glob("dist/*.tar.gz")
        run([programs / "twine", "check", "--strict", wheel, archive], root)
        rows = {number: installed(number, wheel, programs / "uv", root) for number in PYTHONS}
        first = next(number for number, row in rows.items() if "scores" in row)
        line: list[str | Path] = [
            programs / "uv",
            "tool",
            "run",
            "--python",
            interpreter(first) or first,
            "--from",
            wheel,
        ]
        once = run([*line, "lightrm", "demo"], root)
        sizes = {path.name: path.stat().st_size for path in (wheel, archive)}
    tools = json.loads(run([programs / "python", "-c", ABOUT_TOOLS], ROOT))
    write_result(
        "releases",
        {**provenance(), "tools": tools, "files": sizes, "rows": rows,
         "uvx": {"python": first, "scores": SCORE.findall(once)}},
    )  # fmt: skip
    quote("releases", sentence)


ABOUT_TOOLS = (
    "import json; from importlib.metadata import version; "
    f"print(json.dumps({{name: version(name) for name in {TOOLS!r}}}))"
)


def sentence(result: dict[str, Any]) -> str:
    rows, tools = result["rows"], result["tools"]
    ran = {number: row for number, row in rows.items() if row.get("scores")}
    missing = [number for number, row in rows.items() if "missing" in row]
    same = len({tuple(row["scores"]) for row in ran.values()} | {tuple(result["uvx"]["scores"])}) == 1
    with_torch = ", ".join(f"{row['versions']['python']} with torch {row['versions']['torch']}" for row in ran.values())
    return (
        f"The wheel ({max(result['files'].values()) / 2**20:.0f} MiB at most, as the source archive) passes twine "
        f"{tools['twine']}'s strict check, installs and runs `lightrm demo` under Python {with_torch}, and with uvx "
        f"(uv {tools['uv']}); the scores are {'the same' if same else 'not the same'} everywhere. "
        + (f"Not at hand here: {', '.join(missing)}. " if missing else "")
        + f"Measured on {result['date']} at commit {result['commit']}: {result['machine']} CPU.\n"
    )


if __name__ == "__main__":
    main()
