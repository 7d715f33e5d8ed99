"""Writing a file: whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

UNFINISHED = ".unfinished"  # ends the name of what is being written


def write_text(path: Path, text: str) -> None:
    """Beside, then renamed over what may be there: a file of this name is whole."""
    unfinished = path.with_name(path.name + UNFINISHED)
    unfinished.write_text(text, encoding="utf-8")
    to_disk(unfinished)
    os.replace(unfinished, path)
    to_disk(path.parent)


def write_json(path: Path, value: object) -> None:
    """Indented."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False))


def to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk. Windows opens no folders and needs no wait."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
