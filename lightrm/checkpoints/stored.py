"""Writing model folders, whole or not at all, and tensors one after the other.

A folder is written beside its destination, under a name that nothing loads, and renamed when it is complete. The writer
of the safetensors library copies all tensors in versions below 0.8, and in later ones if they are on a card. A file is:
the header's length as 8 bytes, little endian; the header, JSON padded with spaces to 8 bytes; the tensors' bytes, end
to end, larger element sizes first so that each tensor is aligned.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from lightrm.checkpoints.safe import DTYPES
from lightrm.display.progress import Advance, ignored
from lightrm.errors import CheckpointError, CorruptFileError
from lightrm.files import UNFINISHED, to_disk
from lightrm.text.tokenizer_files import CONFIG, DESCRIBED, MODEL, OTHERS

MANIFEST = "lightrm.json"  # of lightrm's own folder
TEXT_FILES = (
    DESCRIBED, MODEL, CONFIG, *OTHERS, "special_tokens_map.json", "added_tokens.json", "merges.txt",
    "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
TEMPLATES = "additional_chat_templates/*.jinja"
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor], advance: Advance = ignored) -> None:
    """Write and flush to disk. Dtypes are those of `safe.DTYPES`. advance: called when a tensor is written."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        tensor = tensors[name]
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            advance(1)
        file.flush()
        os.fsync(file.fileno())


def check_free(folder: Path) -> None:
    """Raise CheckpointError if there is something at the destination already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not empty: remove it or choose another destination")


def check_finished(folder: Path) -> None:
    """Raise CorruptFileError if the folder is the draft of a run that stopped."""
    if folder.name.endswith(UNFINISHED):
        raise CorruptFileError(f"{folder} was left by a run that did not finish: remove it and quantize again")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a draft to write into. It becomes `folder` at the end; after an error it stays a draft."""
    check_free(folder)
    draft = folder.with_name(folder.name + UNFINISHED)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    yield draft
    for inside in (draft, *(path for path in draft.iterdir() if path.is_dir())):
        to_disk(inside)
    if folder.exists():
        folder.rmdir()
    os.replace(draft, folder)
    to_disk(folder.parent)


def text_files(folder: Path) -> list[str]:
    """Return the tokenizer files and chat templates that are there, relative to the folder."""
    named = [name for name in TEXT_FILES if (folder / name).is_file()]
    return named + sorted(path.relative_to(folder).as_posix() for path in folder.glob(TEMPLATES) if path.is_file())


def copy_text_files(source: Path, target: Path) -> None:
    """Copy tokenizer files and chat templates. They are on the disk when this returns."""
    for name in text_files(source):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)
        to_disk(target / name)
