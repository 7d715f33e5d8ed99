"""Checksums of what the files of a checkpoint hold: a change of one byte of the weights shows.

A large file is read once. Its checksum is kept in the user's cache under the file's path, size, times and inode, and
the file is read again if one of these changes. A file that was changed a moment ago is not cached, since a second
change within the resolution of the clock would not show. Nothing is written beside the model.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from lightrm.checkpoints.model_files import ModelFiles
from lightrm.checkpoints.stored import MANIFEST
from lightrm.checksums import file_sum
from lightrm.errors import CheckpointError
from lightrm.files import cache_folder, write_text

LARGE = 2**22  # bytes from which a checksum is kept
YOUNG = 2.0  # seconds
DIGITS = 16
NOT_SCORES = ("fidelity", "lightrm")  # fields of a manifest that change no score
CONFIGS, SKIPPED = "*config*.json", ("tokenizer_config.json", "generation_config.json")
SPELLING = ("*token*.json", "*.model", "vocab*", "merges.txt", "preprocessor_config.json")
CHAT, CHAT_FIELD = ("chat_template*", "*.jinja", "additional_chat_templates/*"), "chat_template"


def parts(checkpoint: ModelFiles) -> dict[str, str]:
    """Return a checksum of each part of a model's files: weights, config, tokenizer, chat template."""
    folders = list(dict.fromkeys((checkpoint.folder, checkpoint.base_folder)))
    text = checkpoint.tokenizer_folder()
    weights = [path for source in checkpoint.sources for path in source.opened]
    settings = [path for folder in folders for path in found(folder, (CONFIGS,)) if path.name not in SKIPPED]
    manifest = checkpoint.folder / MANIFEST
    if manifest.is_file():  # lightrm's own folder
        weights = found(checkpoint.folder, ("*.safetensors",))
        settings.append(manifest)
    chat = found(text, CHAT)
    spelling = [path for path in found(text, SPELLING) if path not in chat]
    return {
        "weights": joined(weights, content),
        "config": joined(settings, fields),
        "tokenizer": joined(spelling, fields),
        "chat template": joined([*chat, text / "tokenizer_config.json"], chat_text),
    }


def found(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def joined(paths: Iterable[Path], what: Callable[[Path], str]) -> str:
    """Return one checksum of some files and their names."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(json.dumps([path.name, what(path)]).encode())
    return digest.hexdigest()[:DIGITS]


def fields(path: Path) -> str:
    """Return the checksum of a small file; of a manifest or tokenizer_config.json, that of the fields which can change
    a score, in any order."""
    if path.name in (MANIFEST, "tokenizer_config.json"):
        with suppress(ValueError, OSError):
            held = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(held, dict):
                skipped = (*NOT_SCORES, CHAT_FIELD)
                held = {name: value for name, value in held.items() if name not in skipped}
            return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()
    return content(path)


def chat_text(path: Path) -> str:
    """Return the chat template in a file, or in tokenizer_config.json."""
    if path.name != "tokenizer_config.json":
        return content(path)
    with suppress(ValueError, OSError):
        held = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(held, dict):
            return json.dumps(held.get(CHAT_FIELD))
    return ""


def content(path: Path) -> str:
    """Return the checksum of a file, in hex. Raises CheckpointError if it cannot be read."""
    try:
        state = path.stat()
        known = json.dumps(
            [str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino, state.st_dev]
        )
        large = state.st_size >= LARGE
        kept = cache() / hashlib.sha256(known.encode()).hexdigest() if large else None
        if kept is not None and (had := read_kept(kept)):
            return had
        made = file_sum(path)
        after = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if (after.st_size, after.st_mtime_ns) != (state.st_size, state.st_mtime_ns):
        raise CheckpointError(f"{path} was written to while it was read: load the model again")
    if kept is not None and time.time() - max(state.st_mtime, state.st_ctime) > YOUNG:
        keep(kept, made)
    return made


def cache() -> Path:
    """Return the file in which checksums are kept: under LIGHTRM_CACHE, or in lightrm's folder of the user's cache."""
    return cache_folder() / "checksums"


def read_kept(path: Path) -> str:
    """Return the kept checksums; none if there are none or the file is damaged."""
    with suppress(OSError, ValueError):
        made, check = path.read_text(encoding="ascii").split()
        if hashlib.sha256(made.encode()).hexdigest()[:DIGITS] == check:
            return made
    return ""


def keep(path: Path, made: str) -> None:
    """Keep a checksum. If the cache cannot be written, the file is read again next time."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, f"{made} {hashlib.sha256(made.encode()).hexdigest()[:DIGITS]}")
