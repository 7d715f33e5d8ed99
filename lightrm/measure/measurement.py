"""Measuring fidelity: one model under several schemes, one after the other, on the same token ids.

Only one of them is in memory at a time. Scores are kept beside the report as soon as a scheme is done, under a key of
the ids and of the model's files, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightrm.checkpoints.contents import parts
from lightrm.checkpoints.hub import resolve
from lightrm.data.preferences import Question, questions_of
from lightrm.engine.devices import choose_device
from lightrm.engine.engine import Engine
from lightrm.engine.packing import packs
from lightrm.errors import InputError, NumericsError
from lightrm.files import write_text
from lightrm.jobs.identity import digest, identity
from lightrm.judge.evaluation import Evaluation, evaluate_scores
from lightrm.judge.fidelity import Asked, FidelityReport, Measured, build, without_infinities
from lightrm.loading import quantized_folder
from lightrm.measure.sensitivity import measure_sensitivity
from lightrm.model.decoder import Decoder
from lightrm.opening import load
from lightrm.schemes.grammar import parse_scheme
from lightrm.scorer import RewardModel
from lightrm.text.conversation import Prompt
from lightrm.typed_json import made, read_object

SCHEMES = ("w8a8", "w4a8")
CALIBRATED = "+cal"
Calibration = Sequence[tuple[Prompt, str]]
Tell = Callable[[str], None]


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
    tell: Tell | None = None,
    progress: bool = False,
) -> FidelityReport:
    """How far each scheme moves the scores of one model.

    model: as for `load`; a folder of `lightrm quantize` is measured in the scheme it holds, against reference_model.
    data: a file in one of the forms of `lightrm.data.record_forms`, what `read_questions` gave, or such records; name:
    its name.
    reference: the scheme the others are held against; where it does not fit into memory, its layers are streamed.
    calibration: text on which a scheme whose name ends in "+cal" compensates its rounding, as for `load`.
    layers: also measure how far each layer alone moves the scores, for schemes with int8 activations.
    keep: a folder for the scores that are done; tell: takes what is worth a line; progress: bars.

    Raises what `load` raises, and InputError for data that cannot be scored.
    """
    questions = questions_of(data, tell)
    place = choose_device(device)
    folder = resolve(model if isinstance(model, str) else Path(model))
    quantized = quantized_folder.is_native(folder)
    source = reference_model if quantized else folder
    if source is None:
        raise InputError(f"{model} is quantized: name the model it was made from as the reference (--reference-model)")
    if quantized:
        schemes = [quantized_folder.read_manifest(folder).scheme]
    for scheme in (reference, *schemes):  # before the minutes of work, not after
        parse_scheme(scheme.removesuffix(CALIBRATED), place)

    asks = [scheme for scheme in schemes if scheme.endswith(CALIBRATED)]
    if bool(asks) != bool(calibration):
        raise InputError(
            f"{asks[0]} needs calibration text" if asks else "no scheme asks for the calibration text: write w4a8+cal"
        )

    def opened(path: str | os.PathLike[str], scheme: str) -> RewardModel:
        plain = scheme.removesuffix(CALIBRATED)
        text = calibration if plain != scheme else None
        return load(
            path, scheme=plain, device=device, template=template, max_length=max_length, memory=memory,
            calibration=text, progress=progress,
        )  # fmt: skip

    rm = opened(source, reference)
    prompts = [q.prompt for q in questions for _ in q.responses]
    ids = rm.encode(prompts, [text for q in questions for text in q.responses])
    of = {scheme: {"calibration": digest(calibration)} for scheme in asks}
    if quantized:
        of = {scheme: {"quantized": digest(parts(quantized_folder.open_native(folder)[1]))} for scheme in schemes}
    named = str(reference_model if quantized else model)
    key = {**identity(rm, named), "ids": digest(ids), "device": str(place), "memory": str(memory)}
    kept = Kept(keep, {**key, "versions": about(place)["versions"]}, of, tell)
    exact = kept.get(reference) or kept.put(measured(rm, reference, ids, tell, progress))
    del rm
    found = []
    half = floor_of(reference, place)
    for path, scheme in [(source, half)] * bool(half) + [(folder, scheme) for scheme in schemes]:
        done = kept.get(scheme)
        found.append(done or kept.put(measured(opened(path, scheme), scheme, ids, tell, progress)))
    floor, rest = (found[0], found[1:]) if half else (None, found)
    alone = tuple(
        measure_sensitivity(opened(folder, scheme), questions, progress=progress)
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


def measured(rm: RewardModel, scheme: str, ids: Sequence[list[int]], tell: Tell | None, progress: bool) -> Measured:
    if tell is not None:
        tell(f"{scheme}: {rm.report}; {rm.engine.residence}")
    warm_up(rm, ids)
    started = time.perf_counter()
    scores = rm.shown(ids, progress)
    seconds = time.perf_counter() - started
    tokens = sum(map(len, ids))
    return Measured(scheme, scores.astype(np.float64), rm.report.bytes, tokens / seconds, dict(rm.report.sqnr_db))


def warm_up(rm: RewardModel, ids: Sequence[list[int]]) -> None:
    """Compile what scoring ids will run, so that its time is of scoring alone: the largest and the smallest of its
    packs through the first layer, twice, for the last layer of a model runs kernels of its own. What comes out of that
    is no score, and may overflow."""
    if not ids:
        return
    every = sorted(packs(ids, rm.engine.tokens), key=lambda run: len(run[1]))
    layer, decoder = rm.decoder.layers[0], rm.decoder
    short = Decoder(decoder.architecture, decoder.embedding_VD, [layer, layer], decoder.final_norm_D, decoder.dtype)
    engine = Engine(short, rm.engine.head, rm.report.scheme, rm.engine.residence)
    for group in {tuple(group) for group, _ in (every[-1], every[0])}:
        with suppress(NumericsError):
            list(engine.scores([ids[i] for i in group]))
    rm.token_budget = min(rm.token_budget, engine.tokens)  # lower, where the memory did not suffice


def spread(questions: Sequence[Question], count: int | None) -> list[Question]:
    """So many of them, evenly over all; all where there are no more or nobody said."""
    taken = min(count or len(questions), len(questions))
    return [questions[k * len(questions) // taken] for k in range(taken)]


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


class Kept:
    """Scores that are done, a file each, in a folder; of another model or other ids they are not taken.

    key: what all of them are of; of: what one scheme's are of besides, its calibration text or its quantized folder.
    A file that is damaged is told of, and its scheme measured again.
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

    questions: a file, what `read_questions` gave of one, or records in the forms of `lightrm.data.record_forms`. model,
    data: what to call the model and the questions.

    Raises InputError for text that cannot be scored, or where no label prefers an answer to another.
    """
    data = data or (Path(questions).name if isinstance(questions, str | os.PathLike) else "the data")
    asked = questions_of(questions)
    started = time.perf_counter()
    prompts = [q.prompt for q in asked for _ in q.responses]
    ids = rm.encode(prompts, [text for q in asked for text in q.responses])
    seconds = time.perf_counter() - started
    warm_up(rm, ids)
    started = time.perf_counter()
    scores = rm.shown(ids, progress)
    seconds += time.perf_counter() - started
    model = model or rm.checkpoint.folder.name
    return evaluate_scores(asked, scores, seconds, model, data, rm.report.scheme.name)
