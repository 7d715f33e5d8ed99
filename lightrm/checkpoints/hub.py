"""A path or a hub id -> a folder on disk. Only the files that scoring needs are fetched.

huggingface-hub does the work: its cache, its resumable downloads, its HF_HUB_OFFLINE switch.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from lightrm.checkpoints.gguf_file import ENDING
from lightrm.display.hub_errors import first_line, unreachable
from lightrm.errors import CheckpointError, DownloadError
from lightrm.text.tokenizer_files import MODEL, OTHERS

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SMALL = ("*.json", "*.jinja", MODEL, *OTHERS, "merges.txt", "value_head.*", "adapter_model.*", "README.md")
DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent.parent / "demo_model"


def resolve(path_or_id: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Return the folder of a checkpoint: an existing one, the bundled model for "demo", or the snapshot of a hub id. A
    GGUF file is a checkpoint by itself.

    Raises CheckpointError if it is neither a folder nor a hub id, DownloadError if it cannot be fetched.
    """
    if path_or_id == DEMO:
        return DEMO_FOLDER
    path = local(path_or_id if isinstance(path_or_id, str) else Path(path_or_id))
    if path is not None and (path.is_dir() or path.suffix == ENDING):
        return path
    if path is not None:
        raise CheckpointError(f"{path} is a file: pass the folder that holds config.json and the weights")
    name = str(path_or_id)
    if not HUB_ID.fullmatch(name):
        raise CheckpointError(f"{name[:200]!r} is neither a folder on this machine nor a hub id of the form owner/name")
    return fetch(name, revision)


def local(path_or_id: str | Path) -> Path | None:
    """Return the folder or file of this name on this machine; None if there is none, or if no file can have such a
    name."""
    try:
        path = Path(path_or_id).expanduser()
        return path if str(path_or_id) and path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, a home that there is not, a zero byte
        return None


def resolve_config(path_or_id: str, revision: str | None = None) -> Path:
    """As `resolve`, but fetches only config.json of a hub id."""
    if path_or_id == DEMO or local(path_or_id) is not None or not HUB_ID.fullmatch(path_or_id):
        return resolve(path_or_id, revision)
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(path_or_id, "config.json", revision=revision)).parent
    except Exception as error:  # the HTTP client's own errors too, which change between versions of the library
        raise DownloadError(
            f"config.json of {path_or_id} is not in the cache and could not be fetched: {first_line(error)}"
        ) from error


def fetch(repo_id: str, revision: str | None) -> Path:
    """Return the snapshot of a hub repository; from the cache if there is no network, or HF_HUB_OFFLINE is set."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # One request without retries: offline, the cache answers at once.
        info = huggingface_hub.HfApi().model_info(repo_id, revision=revision, timeout=20)
        files = [sibling.rfilename for sibling in info.siblings or ()]
        return Path(huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=wanted(files)))
    except Exception as error:
        if not unreachable(error):
            raise
        reason = error
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        pass
    at = f" at revision {revision}" if revision else ""
    raise DownloadError(
        f"{repo_id}{at} is not a folder here, is not in the cache, and could not be fetched: "
        f"{first_line(reason)}; check the name and the network, or pass a folder"
    ) from reason


def wanted(files: list[str]) -> list[str]:
    """Return which files of a repository to fetch: safetensors if there are any, otherwise pickles, never both, or the
    only GGUF file."""
    top = [name for name in files if "/" not in name]
    shards = [n for n in top if n.endswith(".safetensors") and not n.startswith(("adapter", "value_head"))]
    if not shards:
        shards = [n for n in top if n.endswith((".bin", ".pt")) and n not in ("training_args.bin", "optimizer.pt")]
    quantized = [name for name in top if name.endswith(ENDING)]
    return [*SMALL, *(shards or quantized if len(quantized) == 1 else shards)]
