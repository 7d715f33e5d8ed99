"""Scores of a fidelity measurement that are finished, kept in files so that a stopped run can go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from lightrm.errors import InputError
from lightrm.files import write_text
from lightrm.jobs.identity import digest
from lightrm.judge.fidelity import Measured, without_infinities
from lightrm.typed_json import made, read_object

Tell = Callable[[str], None]


class Kept:
    """Finished scores, one file for each scheme. A file is used only if it was made from the same things.

    folder: where the files are; None keeps nothing. key: what all scores depend on, such as model and token ids; of:
    what those of one scheme depend on besides, such as its calibration text. A damaged file is reported to `tell`, and
    its scheme is measured again.
    """

    def __init__(
        self, folder: Path | None, key: dict[str, str], of: dict[str, dict[str, str]], tell: Tell | None = None
    ) -> None:
        self.folder, self.key, self.of, self.tell = folder, key, of, tell
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def get(self, scheme: str) -> Measured | None:
        path = self.path(scheme)
        if path is None or not path.is_file():
            return None
        try:
            raw = read_object(path, "a file of scores")
            found = made(Measured, raw["scored"], str(path)) if raw.get("key") == self.key_of(scheme) else None
            if found is not None and raw["sum"] != digest(raw["scored"]):
                raise InputError(f"{path} was altered")
        except (InputError, KeyError) as error:
            if self.tell is not None:
                self.tell(f"{error}: {scheme} is measured again")
            return None
        return found

    def put(self, measured: Measured) -> Measured:
        path = self.path(measured.scheme)
        if path is not None:
            scored = without_infinities(asdict(measured) | {"scores": measured.scores.tolist()})
            write_text(path, json.dumps({"key": self.key_of(measured.scheme), "sum": digest(scored), "scored": scored}))
        return measured

    def key_of(self, scheme: str) -> dict[str, str]:
        return {**self.key, **self.of.get(scheme, {})}

    def path(self, scheme: str) -> Path | None:
        return None if self.folder is None else self.folder / f"scores-{scheme.replace(':', '-')}.json"
