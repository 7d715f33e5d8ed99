"""A hub id -> a folder that says what the model is, without its weights: small files, and outlines of the others.

Names and shapes come from the headers of the safetensors files, which are read with range requests: some kilobytes of
each file. Of pickles the index tells the names. A head or an adapter in a pickle of its own is fetched: it has no index
and is small.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub

from lightrm.checkpoints.adapter import is_adapter
from lightrm.checkpoints.adapter_config import CONFIG
from lightrm.checkpoints.config import read_config
from lightrm.checkpoints.hub import DEMO, HUB_ID, SMALL, local, resolve, wanted
from lightrm.checkpoints.outline_files import CURE, write_outline
from lightrm.checkpoints.source import INDEXES, PICKLES, weight_map
from lightrm.checkpoints.stored import MANIFEST
from lightrm.display.hub_errors import first_line, unreachable
from lightrm.errors import CheckpointError, DownloadError

TIMEOUT = 20  # seconds of a request


@dataclass(frozen=True, slots=True)
class Outline:
    """folder: of a model; base: of the model under an adapter, None if the adapter's config says it; fetched: what was
    fetched of a hub id, empty for a folder that was here already."""

    folder: Path
    base: Path | None = None
    fetched: str = ""


@contextmanager
def outlined(path_or_id: str, revision: str | None = None) -> Iterator[Outline]:
    """Yield a model's folder; that of a hub id holds outlines instead of weights, and is there until the end.

    Raises CheckpointError or DownloadError as `hub.resolve`, and CheckpointError if the names of the tensors stand in
    the weights alone.
    """
    with tempfile.TemporaryDirectory(prefix="lightrm-") as scratch:
        folder, fetched = outline(path_or_id, revision, Path(scratch))
        base = None
        if is_adapter(folder):
            config = read_config(folder, CONFIG)
            name, its_revision = config.raw.get("base_model_name_or_path"), config.raw.get("revision")
            if isinstance(name, str) and on_hub(name) and local(folder.parent / name) is None:
                base, _ = outline(name, its_revision if isinstance(its_revision, str) else None, Path(scratch))
        yield Outline(folder, base, fetched)


def on_hub(name: str) -> bool:
    return name != DEMO and local(name) is None and HUB_ID.fullmatch(name) is not None


def outline(path_or_id: str, revision: str | None, scratch: Path) -> tuple[Path, str]:
    """Return a model's folder, in `scratch` for a hub id, and what was fetched. Without the hub it is in the cache, or
    nowhere."""
    if not on_hub(path_or_id):
        return resolve(path_or_id, revision), ""
    try:
        info = huggingface_hub.HfApi().model_info(
            path_or_id, revision=revision, timeout=TIMEOUT, files_metadata=True
        )  # fmt: skip
    except Exception as error:
        if not unreachable(error):
            raise
        return resolve(path_or_id, revision), ""
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
    if MANIFEST in sizes:  # lightrm's own folder, whose sums cover its weights
        return resolve(path_or_id, revision), ""
    folder = scratch / path_or_id.replace("/", "--")
    small, weights = parted(list(sizes))
    try:
        for name in small:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(huggingface_hub.hf_hub_download(path_or_id, name, revision=revision), folder / name)
        outline_weights(path_or_id, info.sha, folder, {name: sizes[name] for name in weights})
    except CheckpointError:
        raise
    except Exception as error:  # of huggingface-hub and the HTTP client, which change between versions
        raise DownloadError(f"{path_or_id}: its headers could not be fetched: {first_line(error)}") from error
    return folder, f"{path_or_id} at {(info.sha or 'main')[:7]}: config, tokenizer and headers, no weights"


def parted(files: list[str]) -> tuple[list[str], list[str]]:
    """Return the files of a repository that are fetched, and those of which the header or the index is enough."""
    patterns = wanted(files)
    sane = [name for name in files if ".." not in Path(name).parts]
    some = [name for name in sane if any(fnmatch(name, pattern) for pattern in patterns)]
    whole = [name for name in some if any(fnmatch(name, pattern) for pattern in SMALL)]
    heads = [name for name in some if name not in whole or name == "adapter_model.safetensors"]
    return [name for name in whole if name not in heads], heads


def outline_weights(repo_id: str, revision: str | None, folder: Path, sizes: dict[str, int]) -> None:
    """Write an outline of each weight file that the model is read from."""
    index = next((folder / name for name in INDEXES if (folder / name).is_file()), None)
    places = {} if index is None else weight_map(index)
    named = {*places.values()}
    for name, size in sizes.items():
        if named and name not in named and not name.startswith("adapter"):
            continue  # another copy of the weights beside them
        if not name.endswith(PICKLES):
            tensors = header(repo_id, revision, name)
        elif name in named:
            tensors = {tensor: {} for tensor, file in places.items() if file == name}
        else:
            raise CheckpointError(
                f"{repo_id} holds {name} and no index: what it holds stands in the weights alone; {CURE}, and `lightrm "
                "plan` needs config.json only"
            )
        write_outline(folder / name, size, tensors)


def header(repo_id: str, revision: str | None, name: str) -> dict[str, dict[str, Any]]:
    """Return the entry of each tensor in a safetensors file, from its header."""
    found = huggingface_hub.HfApi().parse_safetensors_file_metadata(repo_id, name, revision=revision)
    entries = {tensor: asdict(entry) for tensor, entry in found.tensors.items()}
    return {
        tensor: {
            "dtype": entry["dtype"], "shape": list(entry["shape"]), "data_offsets": list(entry["data_offsets"]),
        }
        for tensor, entry in entries.items()
    }  # fmt: skip
