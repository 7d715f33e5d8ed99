"""A data set on the hub -> files on disk: those of an address, or those of a split, by its card or by its files' names.

    hf://datasets/owner/name/data/train.parquet       one file
    hf://datasets/owner/name@revision/data/*.parquet  files by a pattern, at a commit, tag or branch
    hf://datasets/owner/name@~parquet                 the copy in Parquet that the hub itself makes
    hf://datasets/owner/name                          the files of one split of one configuration

huggingface-hub lists and fetches, into its cache, and answers from it without a network. No code of a data set is run.
The library `datasets` is not needed: it would copy the files into a second cache, under one schema, in which a row that
has another one is lost.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from lightrm.data.hub_splits import chosen_files, matching
from lightrm.display.hub_errors import first_line, unreachable
from lightrm.errors import InputError

HUB = "hf://"
PARQUET_COPY = "refs/convert/parquet"
ADDRESS = re.compile(
    r"hf://datasets/(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>refs/(?:convert|pr)/[\w.-]+|[^/]+))?(?:/(?P<path>.*))?"
)
CARD = "README.md"


@dataclass(frozen=True, slots=True)
class HubFiles:
    """Files on disk. name: of the data set, with what was chosen of it. commit: whose files they are."""

    files: tuple[Path, ...]
    name: str
    commit: str


@dataclass(frozen=True, slots=True)
class Listing:
    """What a repository holds at a commit. revision: as it was asked for."""

    repo: str
    revision: str | None
    commit: str
    files: tuple[str, ...]


def hub_files(address: str, config: str | None = None, split: str | None = None) -> HubFiles:
    """Fetch the files that an address stands for. config, split: which of them, if it names no file.

    Raises InputError if it is no such address, if the data set cannot be had, or if there are several to choose from;
    the message then names them.
    """
    match = ADDRESS.fullmatch(address)
    if match is None:
        raise InputError(f"{address[:200]}: expected hf://datasets/owner/name[@revision][/path of a file]")
    revision = None if match["revision"] is None else unquote(match["revision"])
    listing = listed(match["repo"], PARQUET_COPY if revision == "~parquet" else revision)
    path = (match["path"] or "").strip("/")
    named = matching([path], listing.files) if path else []
    if named:
        if config is not None or split is not None:
            raise InputError(f"{address} names its files: leave out config and split, or the path")
        name = f"{match['repo']}/{path}"
    else:
        inside = [file for file in listing.files if file.startswith(f"{path}/")] if path else listing.files
        if not inside:
            raise InputError(f"{match['repo']} has no file {path!r}: it holds {some(listing.files)}")
        where = match["repo"] + (f"/{path}" if path else "")
        chosen = chosen_files(where, inside, {} if path else card_of(listing), config, split)
        named, name = list(chosen.files), f"{where} {chosen.name}"
    return HubFiles(tuple(fetched(listing, named)), name, listing.commit)


def listed(repo: str, revision: str | None) -> Listing:
    """Return what a repository holds; from the cache if there is no network. Raises InputError."""
    import huggingface_hub  # noqa: PLC0415  slow to import

    at = "" if revision is None else f" at revision {revision}"
    try:
        info = huggingface_hub.HfApi().dataset_info(repo, revision=revision, timeout=20)
        return Listing(repo, revision, str(info.sha), tuple(sorted(one.rfilename for one in info.siblings or ())))
    except Exception as error:
        if not unreachable(error):
            raise
        reason = error
    try:
        kept = Path(
            huggingface_hub.snapshot_download(repo, repo_type="dataset", revision=revision, local_files_only=True)
        )
    except Exception as error:
        if not unreachable(error) and not isinstance(error, ValueError):
            raise
        raise InputError(
            f"the data set {repo}{at} is not in the cache and could not be fetched: {first_line(reason)}; check the "
            "name and the network, and log in if it is not open to all"
        ) from reason
    files = sorted(path.relative_to(kept).as_posix() for path in kept.rglob("*") if path.is_file())
    return Listing(repo, revision, kept.name, tuple(files))


def fetched(listing: Listing, names: Iterable[str]) -> list[Path]:
    """Fetch files by the revision's name, under which the cache then finds them without a network. Raises InputError,
    also if the name came to mean another commit meanwhile."""
    import huggingface_hub  # noqa: PLC0415

    found = []
    for name in names:
        try:
            path = huggingface_hub.hf_hub_download(listing.repo, name, repo_type="dataset", revision=listing.revision)
        except Exception as error:
            if not unreachable(error) and not isinstance(error, ValueError):  # such as a name that leaves the cache
                raise
            raise InputError(
                f"{name} of the data set {listing.repo} could not be fetched: {first_line(error)}"
            ) from error
        found.append(Path(path))
        if listing.commit not in found[-1].parts:
            raise InputError(f"the data set {listing.repo} was changed while it was fetched: try again")
    return found


def card_of(listing: Listing) -> dict[str, Any]:
    """Return what the card of a data set says about it. Raises InputError if that cannot be read."""
    if CARD not in listing.files:
        return {}
    from huggingface_hub import metadata_load  # noqa: PLC0415

    (path,) = fetched(listing, [CARD])
    try:
        return metadata_load(path) or {}
    except Exception as error:  # of a YAML parser
        raise InputError(
            f"the card of {listing.repo} cannot be read: {first_line(error)}; name a file of it"
        ) from error


def some(files: Sequence[str], most: int = 12) -> str:
    return ", ".join(files[:most]) + (f" and {len(files) - most} more" if len(files) > most else "") or "nothing"
