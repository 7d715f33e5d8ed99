"""Which files of a data set belong to a configuration and a split: pure functions on names.

The card says it, under "configs". Without that, names say it, by the rules of `datasets`: "train", "validation" or
"test" (or another word for them) in the name of a file or of its folder; "data/NAME-00000-of-00001.parquet"; in the
copy that the hub makes, "CONFIG/SPLIT/0000.parquet". If no name says it, all files are one split, "train".
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightrm.errors import InputError

WORDS = {
    "train": ("train", "training"), "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}  # fmt: skip
SPLIT_OF = {word: split for split, words in WORDS.items() for word in words}
KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".tab", ".parquet")
ZIPPED = (".gz", ".zst", ".zstd")
ABOUT = ("dataset_infos.json", "dataset_info.json", "state.json")  # JSON that holds no records
SHARD = re.compile(r"(?:^|/)data/([^/]+)-\d{5}-of-\d{5}\.[^/]+$")
COPY = re.compile(r"(?:^|/)([^/]+)/\d{4}\.parquet$")
PART = "partial-"


@dataclass(frozen=True, slots=True)
class Chosen:
    """name: "SPLIT", or "CONFIG/SPLIT"."""

    name: str
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Config:
    """One configuration of a card. splits: the patterns of each; none if only its folder is named."""

    splits: dict[str, list[str]]
    folder: str
    default: bool


def chosen_files(
    where: str, files: Sequence[str], card: Mapping[str, Any], config: str | None, split: str | None
) -> Chosen:
    """Return the files of one split. where: the data set's name in messages.

    Raises InputError, which names what there is, if there is none or if several could be meant.
    """
    told = configs_of(card)
    readable = [name for name in files if kind_of(name)]
    if told:
        name = one_of(where, "config", told, config, next((n for n, c in told.items() if c.default), "default"))
        of = told[name]
        inside = [file for file in files if file.startswith(of.folder)]
        splits = {part: matching(patterns, inside) for part, patterns in of.splits.items()}
        splits = splits or by_names(readable_in(of.folder, readable))
    else:
        folders = folders_of(readable)
        several = config is not None or len(folders) > 1
        name = one_of(where, "config", folders, config, "default") if several else ""
        splits = by_names(folders[name] if several else readable)
    part = one_of(where, "split", splits, split, "")
    found = splits[part]
    kinds = sorted({kind_of(file) or file for file in found})
    if len(kinds) != 1:
        held = f"files of several kinds ({', '.join(kinds)})" if found else "no file here"
        raise InputError(f"split {part!r} of {where} has {held}: name one, as hf://datasets/{where}/FILE")
    return Chosen(f"{name}/{part}" if name and len(told or folders_of(readable)) > 1 else part, tuple(found))


def one_of(where: str, what: str, there: Iterable[str], asked: str | None, usual: str) -> str:
    names = list(there)
    if not names:
        raise InputError(
            f"{where} holds no file that lightrm reads ({', '.join(KINDS)}, also zipped); the hub's own copy may: "
            f"hf://datasets/{where}@~parquet"
        )
    if asked is None and len(names) == 1:
        return names[0]
    found = usual if asked is None else SPLIT_OF.get(asked, asked) if what == "split" else asked
    if found in names:
        return found
    if asked is None:
        raise InputError(f"{where} has the {what}s {', '.join(names)}: choose one with {what}= (--{what})")
    more = "; for some of the records, use --limit" if "[" in asked else ""
    raise InputError(f"{where} has no {what} {asked!r}: there are {', '.join(names)}{more}")


def configs_of(card: Mapping[str, Any]) -> dict[str, Config]:
    """Return the configurations that a card names."""
    listed = card.get("configs")
    found = {}
    for one in listed if isinstance(listed, list) else ():
        if isinstance(one, Mapping) and isinstance(one.get("config_name", "default"), str):
            folder = str(one.get("data_dir") or "").strip("/.")
            folder += "/" if folder else ""
            splits = {
                SPLIT_OF.get(part, part): [folder + pattern.removeprefix("./") for pattern in patterns]
                for part, patterns in splits_of(one.get("data_files")).items()
            }
            found[one.get("config_name", "default")] = Config(splits, folder, one.get("default") is True)
    return found


def splits_of(data_files: Any) -> dict[str, list[str]]:
    """Return the patterns of each split, of the four forms in which a card may name them."""
    if isinstance(data_files, str):
        return {"train": [data_files]}
    if isinstance(data_files, Mapping):
        return {str(split): patterns_of(paths) for split, paths in data_files.items()}
    if not isinstance(data_files, list):
        return {}
    if all(isinstance(path, str) for path in data_files):
        return {"train": list(data_files)} if data_files else {}
    named = [one for one in data_files if isinstance(one, Mapping)]
    return {str(one.get("split", "train")): patterns_of(one.get("path")) for one in named}


def patterns_of(paths: Any) -> list[str]:
    return [paths] if isinstance(paths, str) else [path for path in paths or () if isinstance(path, str)]


def matching(patterns: Iterable[str], files: Sequence[str]) -> list[str]:
    """Return the files that patterns match, each once. "*" stands for a part of a name, "**" for any folders."""
    found = (file for pattern in patterns for file in files if file == pattern or expression(pattern).fullmatch(file))
    return list(dict.fromkeys(found))


def expression(pattern: str) -> re.Pattern[str]:
    made = []
    parts = pattern.split("/")
    for k, part in enumerate(parts):
        if part == "**" and k == len(parts) - 1:
            made.append(".*/")
        elif part == "**":
            made.append("(?:[^/]+/)*")
        else:
            text = fnmatch.translate(part).replace("(?s:", "(?:", 1).replace(".*", "[^/]*")
            made.append(re.sub(r"\\[zZ]$", "", text) + "/")
    return re.compile("".join(made).removesuffix("/"))


def kind_of(file: str) -> str:
    """Return the ending that says what a file holds; "" if lightrm does not read it."""
    name = file.rsplit("/", 1)[-1].lower()
    if name in ABOUT or any(part.startswith((".", "_")) for part in file.split("/")):
        return ""
    stem = next((name.removesuffix(ending) for ending in ZIPPED if name.endswith(ending)), name)
    return next((kind for kind in KINDS if stem.endswith(kind)), "")


def readable_in(folder: str, files: Sequence[str]) -> list[str]:
    return [file for file in files if file.startswith(folder)]


def folders_of(files: Sequence[str]) -> dict[str, list[str]]:
    """Return the files of each folder at the top that may be a configuration."""
    found: dict[str, list[str]] = {}
    for file in files:
        top, inside, _ = file.removeprefix("data/").partition("/")
        if inside and top.lower() not in SPLIT_OF and top != "data":
            found.setdefault(top, []).append(file)
    return found if sum(map(len, found.values())) == len(files) else {}


def by_names(files: Sequence[str]) -> dict[str, list[str]]:
    """Return the files of each split, as their names say it."""
    found: dict[str, list[str]] = {}
    for file in files:
        if split := split_in(file):
            found.setdefault(split, []).append(file)
    return found or ({"train": list(files)} if files else {})


def split_in(file: str) -> str:
    """Return the split that a path names; "" if it names none."""
    if shard := SHARD.search(file):
        return SPLIT_OF.get(shard[1], shard[1])
    if copy := COPY.search(file):
        return copy[1].removeprefix(PART)
    for part in reversed(file.lower().split("/")):
        words = [word for word in re.split(r"[\W\d_]+", part) if word in SPLIT_OF]
        if words:
            return SPLIT_OF[words[0]]
    return ""
