"""Measuring fidelity: one model under several schemes, one after the other, on the same token ids.

Only one of them is in memory at a time. Scores are stored beside the report as soon as a scheme is done, together with
a key of the ids and of the model's files, so that a run that was stopped goes on.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from lightrm.answer_scores import AnswerScores
from lightrm.checkpoints.contents import parts
from lightrm.checkpoints.hub import resolve
from lightrm.data.data_source import DataSource
from lightrm.data.preferences import Question, questions_of
from lightrm.engine.answer_ids import AnswerIds
from lightrm.engine.class_memory import NAMES as CLASS_SCHEMES
from lightrm.engine.devices import choose_device
from lightrm.errors import InputError, SchemeError
from lightrm.jobs.identity import digest, identity
from lightrm.judge.evaluation import Evaluation, evaluate_scores
from lightrm.judge.fidelity import Asked, FidelityReport, Measured, Sensitivity, build
from lightrm.loading import quantized_folder
from lightrm.loading.attribute_choice import Weights
from lightrm.loading.options import EngineName, LoadOptions
from lightrm.loading.sources import open_source
from lightrm.measure.kept_scores import Kept, Tell
from lightrm.measure.other_programs import check_others, is_other, open_other, programs
from lightrm.measure.sensitivity import measure_sensitivity
from lightrm.opening import Pairs, open_model
from lightrm.schemes.grammar import PACKED, parse_scheme
from lightrm.scorer import RewardModel
from lightrm.text.conversation import asked_once

SCHEMES = ("w8a8", "w4a8")
Some = TypeVar("Some")
CALIBRATED = "+cal"


def measure_fidelity(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str] | DataSource | Sequence[Question],
    *,
    name: str | None = None,
    schemes: Sequence[str] = SCHEMES,
    reference: str = "fp32",
    reference_model: str | os.PathLike[str] | None = None,
    engine: EngineName = "auto",
    device: str = "auto",
    template: str | None = None,
    system: str | None = None,
    max_length: int | None = None,
    memory: str | int | None = None,
    layout: str | None = None,
    label: str | None = None,
    weights: Weights | None = None,
    reduce: str | None = None,
    calibration: Pairs | None = None,
    calibration_tokens: int | None = None,
    layers: bool = False,
    keep: Path | None = None,
    tell: Tell | None = None,
    progress: bool = False,
) -> FidelityReport:
    """Measure how far each scheme moves the scores of one model.

    model: as for `load`. A folder that `lightrm quantize` wrote is measured in its own scheme, against reference_model;
    so can one be that another tool quantized.
    schemes: as for `load`; with "+cal", calibrated. "hf:fp32", "hf:bf16", "hf:nf4", "hf:int8": the scores that
    transformers' own class gives for the full-precision weights; "hf:gptq": those for a GPTQ folder.
    data: a file in one of the forms of `lightrm.data.record_forms`, the address of one on the hub (hf://datasets/...),
    what `read_questions` returned, or such records, also as a table; name: what the report calls it.
    reference: the scheme that the others are compared with. Its layers are streamed if they do not fit into memory.
    engine, device, template, system, max_length, memory, layout, label, weights, reduce: as for `load`.
    calibration, calibration_tokens: as for `load`; for schemes whose name ends in "+cal".
    layers: also measure how far each layer alone moves the scores, for schemes with int8 activations.
    keep: a folder in which finished scores are kept, so that a run that was stopped goes on.
    tell: called with lines about what is done; progress: show bars.

    Raises what `load` raises, and InputError for data that cannot be scored.
    """
    questions = questions_of(data, tell)
    options = LoadOptions(
        engine=engine, device=device, template=template, max_length=max_length, memory=memory, layout=layout,
        label=label, weights=weights, reduce=reduce, system=system,
    )  # fmt: skip
    subject = Subject.of(model, reference_model, schemes)
    place = choose_device(device)
    check_schemes([reference, *subject.own], calibration is not None, place)
    check_others(subject.others, subject.source, subject.folder, options, place)
    run = Run(subject, options, tell, progress)
    rm = run.opened(subject.source, reference)
    check_runs(rm, subject.own)
    ids = ids_of_all(rm, questions, progress)
    run.calibration = [] if calibration is None else rm.text.first_texts(calibration, calibration_tokens)
    key = {
        **identity(rm, str(subject.source_name)),
        "ids": digest(ids.sequences),
        "reduce": str(reduce),
        "device": str(place),
        "memory": str(memory),
    }
    kept = Kept(keep, {**key, "versions": about(place)["versions"]}, run.of_schemes(), tell)
    exact = kept.get(reference) or kept.put(measured(rm, reference, ids, tell, progress))
    del rm  # one model in memory at a time
    half = floor_of(reference, place)
    floor = None if not half else run.measured(kept, subject.source, half, ids)
    found = [run.measured(kept, subject.path_of(scheme), scheme, ids) for scheme in subject.schemes]
    name = name or name_of(data)
    circumstances = about(place, programs(subject.schemes))
    report = build(str(model), asked(name, questions, ids.whole), exact, found, floor, circumstances)
    return replace(report, sensitivity=run.sensitivity(questions, place) if layers else ())


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured.

    folder: the model. source: its full-precision weights, which the caller named source_name. schemes: to measure.
    quantized: whether the folder is lightrm's own and holds one scheme.
    """

    folder: Path
    source: str | os.PathLike[str]
    source_name: str | os.PathLike[str]
    schemes: tuple[str, ...]
    quantized: bool

    @classmethod
    def of(
        cls,
        model: str | os.PathLike[str],
        reference_model: str | os.PathLike[str] | None,
        schemes: Sequence[str],
    ) -> Subject:
        """Raises InputError for a quantized folder whose source is not named."""
        folder = resolve(model)
        if not quantized_folder.is_native(folder):
            source = (folder, model) if reference_model is None else (reference_model, reference_model)
            return cls(folder, *source, tuple(schemes), False)
        if reference_model is None:
            raise InputError(
                f"{model} is quantized: name the model it was made from as the reference (--reference-model)"
            )
        own = quantized_folder.read_manifest(folder).scheme
        return cls(folder, reference_model, reference_model, (own, *filter(is_other, schemes)), True)

    @property
    def own(self) -> tuple[str, ...]:
        """The schemes that lightrm computes, or the class that it opened the model with."""
        return tuple(scheme for scheme in self.schemes if not is_other(scheme))

    @property
    def others(self) -> tuple[str, ...]:
        return tuple(filter(is_other, self.schemes))

    def path_of(self, scheme: str) -> str | os.PathLike[str]:
        """Return what a row is measured on. Other programs take the full-precision weights, or a GPTQ folder."""
        return self.source if is_other(scheme) and scheme != PACKED else self.folder


def check_schemes(schemes: Sequence[str], calibrates: bool, device: torch.device) -> None:
    """Raise SchemeError on an unknown scheme, and InputError if there is a "+cal" without calibration text or the other
    way round. This is checked before the minutes of work."""
    for scheme in schemes:
        parse_scheme(scheme.removesuffix(CALIBRATED), device)
    asks = [scheme for scheme in schemes if scheme.endswith(CALIBRATED)]
    if asks and not calibrates:
        raise InputError(f"{asks[0]} needs calibration text")
    if calibrates and not asks:
        raise InputError("no scheme asks for the calibration text: write w4a8+cal")


def check_runs(rm: RewardModel, schemes: Sequence[str]) -> None:
    """Raise SchemeError on a scheme that the engine of a model does not have, before the minutes of work."""
    other = [scheme for scheme in schemes if scheme not in CLASS_SCHEMES]
    if other and rm.engine.name == "transformers":
        raise SchemeError(
            f"{rm.checkpoint.layout.name} runs in transformers, where there are {', '.join(CLASS_SCHEMES)}; found "
            f"{', '.join(other)}: pass schemes (--schemes)"
        )


@dataclass(slots=True)
class Run:
    """One measurement: opens the model in one scheme after the other. calibration: ids of the calibration texts."""

    subject: Subject
    options: LoadOptions
    tell: Tell | None
    progress: bool
    calibration: list[list[int]] = field(default_factory=list)

    def opened(self, path: str | os.PathLike[str], scheme: str) -> RewardModel:
        if is_other(scheme):
            return open_other(path, scheme, self.options, self.progress)
        plain = scheme.removesuffix(CALIBRATED)
        ids_of = (lambda text: self.calibration) if plain != scheme else None
        return open_model(path, replace(self.options, scheme=plain), ids_of, progress=self.progress)

    def measured(self, kept: Kept, path: str | os.PathLike[str], scheme: str, ids: AnswerIds) -> Measured:
        """Return the kept scores of a scheme, or new ones."""
        done = kept.get(scheme)
        return done or kept.put(measured(self.opened(path, scheme), scheme, ids, self.tell, self.progress))

    def of_schemes(self) -> dict[str, dict[str, str]]:
        """Return what the scores of a scheme depend on beside the reference: its calibration text, its quantized
        folder, or another program."""
        subject, texts = self.subject, digest(self.calibration)
        held = ""
        if subject.source != subject.folder:
            held = digest(parts(open_source(subject.folder, layout=self.options.layout).checkpoint))
        return {
            scheme: {
                **({"calibration": texts} if scheme.endswith(CALIBRATED) else {}),
                **({"programs": programs([scheme])} if is_other(scheme) else {}),
                **({"quantized": held} if subject.path_of(scheme) != subject.source else {}),
            }
            for scheme in subject.schemes
        }

    def sensitivity(self, questions: Sequence[Question], device: torch.device) -> tuple[Sensitivity, ...]:
        """Measure how far each layer alone moves the scores, for each scheme with int8 activations."""
        if self.subject.quantized:
            return ()
        return tuple(
            measure_sensitivity(self.opened(self.subject.folder, scheme), questions, progress=self.progress)
            for scheme in self.subject.own
            if parse_scheme(scheme.removesuffix(CALIBRATED), device).integer
        )


def ids_of_all(rm: RewardModel, questions: Sequence[Question], progress: bool = False) -> AnswerIds:
    """Return the ids of every answer of every question, in order."""
    prompts = [p for q in questions for p in q.each_prompt]
    answers = [r for q in questions for r in q.responses]
    return AnswerScores(rm.text, rm.engine).ids(asked_once(prompts, answers), progress)


def floor_of(reference: str, device: torch.device) -> str:
    """Return the half precision that shows the noise floor; "" if the reference is a half precision itself."""
    if reference != "fp32":
        return ""
    return "fp16" if device.type == "cuda" else "bf16"


def measured(rm: RewardModel, scheme: str, ids: AnswerIds, tell: Tell | None, progress: bool) -> Measured:
    if tell is not None:
        tell(f"{scheme}: {rm.report}; {rm.engine.residence}")
    rm.engine.warm_up(ids.sequences)
    started = time.perf_counter()
    scores = ids.made(rm.score_ids(ids.sequences, progress=progress))
    seconds = time.perf_counter() - started
    tokens = sum(map(len, ids.whole))
    return Measured(scheme, scores.astype(np.float64), rm.report.bytes, tokens / seconds, dict(rm.report.sqnr_db))


def spread(questions: Sequence[Some], count: int | None) -> list[Some]:
    """Return `count` of some questions, spread evenly; all of them if there are no more, or if count is None."""
    taken = min(count or len(questions), len(questions))
    return [questions[k * len(questions) // taken] for k in range(taken)]


def asked(name: str, questions: Sequence[Question], ids: Sequence[list[int]]) -> Asked:
    every = [(k, q) for k, q in enumerate(questions) for _ in q.responses]
    worth = [value for q in questions for value in q.worths]
    return Asked(
        name=name,
        prompt=np.asarray([k for k, _ in every], np.int64),
        tokens=np.asarray([len(one) for one in ids], np.int64),
        lang=[q.lang for _, q in every],
        worth=np.asarray(worth, np.float64),
    )


def about(device: torch.device, others: str = "") -> dict[str, str]:
    """Return when and where something was measured. others: versions of other programs."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return {
        "date": date.today().isoformat(),
        "device": f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else name,
        "versions": ", ".join(f"{package} {version(package)}" for package in ("lightrm", "torch", "numpy")),
        **({"other programs": others} if others else {}),
    }


def name_of(data: object) -> str:
    """Return what a report calls some data: the name of its file, if it is one."""
    if isinstance(data, DataSource):
        return data.name
    return Path(data).name if isinstance(data, str | os.PathLike) else "the data"


def evaluate(
    rm: RewardModel,
    questions: str | os.PathLike[str] | DataSource | Iterable[Question | Mapping[str, Any]],
    *,
    model: str = "",
    data: str = "",
    progress: bool = False,
) -> Evaluation:
    """Measure how often a model agrees with labels.

    questions: a file, the address of one on the hub (hf://datasets/...), what `read_questions` returned, or records in
    the forms of `lightrm.data.record_forms`, also as a table. model, data: what the result calls them.

    A process reward model needs `reduce`, a model with several attributes `label` or `weights`, when it is loaded.
    Raises InputError for text that cannot be scored, or if the labels prefer no answer to another.
    """
    asked = questions_of(questions)
    return evaluated(rm, asked, model, data or name_of(questions), progress)[0]


def evaluated(
    rm: RewardModel, asked: Sequence[Question], model: str, data: str, progress: bool
) -> tuple[Evaluation, list[list[float]]]:
    """As `evaluate`, also with the scores of each question."""
    started = time.perf_counter()
    ids = ids_of_all(rm, asked, progress)
    seconds = time.perf_counter() - started
    rm.engine.warm_up(ids.sequences)
    started = time.perf_counter()
    scores = ids.made(rm.score_ids(ids.sequences, progress=progress))
    seconds += time.perf_counter() - started
    model = model or rm.checkpoint.folder.name
    ends = np.cumsum([len(one.responses) for one in asked])
    each = [part.tolist() for part in np.split(scores, ends[:-1])]
    return evaluate_scores(asked, scores, seconds, model, data, rm.report.scheme.name), each
