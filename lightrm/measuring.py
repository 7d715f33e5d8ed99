"""Measuring fidelity: one model under several schemes, one after the other, on the same token ids.

Only one of them is in memory at a time. Scores are kept beside the report as soon as a scheme is done, under a key of
the ids and of the model's files, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightrm import native
from lightrm.checkpoints.contents import parts
from lightrm.conversation import Prompt
from lightrm.errors import InputError
from lightrm.evaluation import Evaluation, evaluate_scores
from lightrm.fidelity import Asked, FidelityReport, Measured, build
from lightrm.files import write_text
from lightrm.identity import identity
from lightrm.opening import choose_device, load
from lightrm.questions import Question, questions_of
from lightrm.schemes.grammar import parse_scheme
from lightrm.scorer import RewardModel
from lightrm.sensitivity import measure_sensitivity

SCHEMES = ("w8a8", "w4a8")
CALIBRATED = "+cal"
Calibration = Sequence[tuple[Prompt, str]]


def measure_fidelity(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str] | Sequence[Question],
    *,
    name: str | None = None,
    schemes: Sequence[str] = SCHEMES,
    reference: str = "fp32",
    reference_model: str | os.PathLike[str] | None = None,
    device: str = "auto",
    template: str | None = None,
    max_length: int | None = None,
    memory: str | int | None = None,
    calibration: Calibration | None = None,
    layers: bool = False,
    keep: Path | None = None,
    tell: Callable[[str], None] | None = None,
    progress: bool = False,
) -> FidelityReport:
    """How far each scheme moves the scores of one model.

    model: as for `load`; a folder of `lightrm quantize` is measured in the scheme it holds, against reference_model.
    data: a file in one of the forms of `lightrm.forms`, what `read_questions` gave, or such records; name: its name.
    reference: the scheme the others are held against; where it does not fit into memory, its layers are streamed.
    calibration: text on which a scheme whose name ends in "+cal" compensates its rounding, as for `load`.
    layers: also measure how far each layer alone moves the scores, for schemes with int8 activations.
    keep: a folder for the scores that are done; tell: takes what is worth a line; progress: bars.

    Raises what `load` raises, and InputError for data that cannot be scored.
    """
    questions = questions_of(data, tell)
    place = choose_device(device)
    quantized = native.is_native(Path(model))
    source = reference_model if quantized else model
    if source is None:
        raise InputError(f"{model} is quantized: name the model it was made from as the reference (--reference-model)")
    if quantized:
        schemes = [native.read_manifest(Path(model)).scheme]

    asks = [scheme for scheme in schemes if scheme.endswith(CALIBRATED)]
    if bool(asks) != bool(calibration):
        raise InputError(
            f"{asks[0]} needs calibration text" if asks else "no scheme asks for the calibration text: write w4a8+cal"
        )

    def opened(path: str | os.PathLike[str], scheme: str) -> RewardModel:
        plain = scheme.removesuffix(CALIBRATED)
        text = calibration if plain != scheme else None
        return load(
            path, scheme=plain, device=device, template=template, max_length=max_length, memory=memory, calibration=text
        )

    rm = opened(source, reference)
    prompts = [q.prompt for q in questions for _ in q.responses]
    ids = rm.encode(prompts, [text for q in questions for text in q.responses])
    of = {scheme: {"calibration": digest(calibration)} for scheme in asks}
    if quantized:
        of = {scheme: {"quantized": digest(parts(native.open_native(Path(model))[1]))} for scheme in schemes}
    key = {**identity(rm, str(source)), "ids": digest(ids), "device": str(place), "memory": str(memory)}
    kept = Kept(keep, {**key, "versions": about(place)["versions"]}, of)
    exact = kept.get(reference) or kept.put(measured(rm, reference, ids, tell, progress))
    del rm
    found = []
    half = floor_of(reference, place)
    for path, scheme in [(source, half)] * bool(half) + [(model, scheme) for scheme in schemes]:
        done = kept.get(scheme)
        found.append(done or kept.put(measured(opened(path, scheme), scheme, ids, tell, progress)))
    floor, rest = (found[0], found[1:]) if half else (None, found)
    alone = tuple(
        measure_sensitivity(opened(model, scheme), questions)
        for scheme in (schemes if layers and not quantized else ())
        if parse_scheme(scheme.removesuffix(CALIBRATED), place).integer
    )
    name = name or (Path(data).name if isinstance(data, str | os.PathLike) else "the data")
    report = build(str(model), asked(name, questions, ids), exact, rest, floor, about(place))
    return replace(report, sensitivity=alone)


def floor_of(reference: str, device: torch.device) -> str:
    """The half precision whose distance from the reference is the noise floor; "" where the reference is one."""
    if reference != "fp32":
        return ""
    return "fp16" if device.type == "cuda" else "bf16"


def measured(
    rm: RewardModel, scheme: str, ids: Sequence[list[int]], tell: Callable[[str], None] | None, progress: bool
) -> Measured:
    if tell is not None:
        tell(f"{scheme}: {rm.report}; {rm.engine.residence}")
    started = time.perf_counter()
    scores = rm.shown(ids, progress)
    seconds = time.perf_counter() - started
    tokens = sum(map(len, ids))
    return Measured(scheme, scores.astype(np.float64), rm.report.bytes, tokens / seconds, dict(rm.report.sqnr_db))


def asked(name: str, questions: Sequence[Question], ids: Sequence[list[int]]) -> Asked:
    every = [(k, q) for k, q in enumerate(questions) for _ in q.responses]
    worth = [value for q in questions for value in (q.worth or [float("nan")] * len(q.responses))]
    return Asked(
        name=name,
        prompt=np.asarray([k for k, _ in every], np.int64),
        tokens=np.asarray([len(one) for one in ids], np.int64),
        lang=[q.lang for _, q in every],
        worth=np.asarray(worth, np.float64),
    )


def about(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return {
        "date": date.today().isoformat(),
        "device": f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else name,
        "versions": ", ".join(f"{package} {version(package)}" for package in ("lightrm", "torch", "numpy")),
    }


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


class Kept:
    """Scores that are done, a file each, in a folder; of another model or other ids they are not taken.

    key: what all of them are of; of: what one scheme's are of besides, its calibration text or its quantized folder.
    """

    def __init__(self, folder: Path | None, key: dict[str, str], of: dict[str, dict[str, str]]) -> None:
        self.folder, self.key, self.of = folder, key, of
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def get(self, scheme: str) -> Measured | None:
        path = self.path(scheme)
        if path is None or not path.is_file():
            return None
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw.pop("key") != self.key_of(scheme):
            return None
        return Measured(**raw | {"scores": np.asarray(raw["scores"], np.float64)})

    def put(self, measured: Measured) -> Measured:
        path = self.path(measured.scheme)
        if path is not None:
            raw = {
                "key": self.key_of(measured.scheme), "scheme": measured.scheme, "scores": measured.scores.tolist(),
                "bytes": measured.bytes, "tokens_per_second": measured.tokens_per_second,
                "sqnr_db": dict(measured.sqnr_db),
            }  # fmt: skip
            write_text(path, json.dumps(raw))
        return measured

    def key_of(self, scheme: str) -> dict[str, str]:
        return {**self.key, **self.of.get(scheme, {})}

    def path(self, scheme: str) -> Path | None:
        return None if self.folder is None else self.folder / f"scores-{scheme}.json"


def evaluate(
    rm: RewardModel,
    questions: str | os.PathLike[str] | Iterable[Question | Mapping[str, Any]],
    *,
    model: str = "",
    data: str = "",
    progress: bool = False,
) -> Evaluation:
    """How often a model agrees with labels.

    questions: a file, what `read_questions` gave of one, or records in the forms of `lightrm.forms`. model, data: what
    to call the model and the questions.

    Raises InputError for text that cannot be scored, or where no label prefers an answer to another.
    """
    data = data or (Path(questions).name if isinstance(questions, str | os.PathLike) else "the data")
    asked = questions_of(questions)
    started = time.perf_counter()
    prompts = [q.prompt for q in asked for _ in q.responses]
    scores = rm.score_batch(prompts, [text for q in asked for text in q.responses], progress=progress)
    seconds = time.perf_counter() - started
    model = model or rm.checkpoint.folder.name
    return evaluate_scores(asked, scores, seconds, model, data, rm.report.scheme.name)
