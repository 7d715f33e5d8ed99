"""From a path or hub id to a RewardModel: what the files are, which scheme to run, on which device, whether it fits."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from lightrm.architecture import Alibi, Architecture
from lightrm.display.progress import item_progress
from lightrm.display.sizes import parse_size, size_text
from lightrm.engine.devices import choose_device, free_bytes
from lightrm.engine.engine import Engine
from lightrm.engine.memory import room_for
from lightrm.engine.residence import Residence
from lightrm.engine.scoring_engine import Shape
from lightrm.errors import InputError, SchemeError
from lightrm.loading.attribute_choice import Weights
from lightrm.loading.options import EngineName, LoadOptions, Table
from lightrm.loading.placement import LoadReport, Placement
from lightrm.loading.sources import Quantized, Source, open_source
from lightrm.loading.text_side import TextSide, text_side
from lightrm.model.decoder import Decoder
from lightrm.scorer import OpensReference, RewardModel
from lightrm.text.conversation import Prompt

Pairs = Iterable[tuple[Prompt, str]]
CalibrationIds = Callable[[TextSide], list[list[int]]]  # of the model that is loaded


class KernelWarning(UserWarning):
    """A fast kernel for this machine exists but cannot run; a slow one is used."""


def load(
    path_or_id: str | os.PathLike[str],
    *,
    scheme: str = "auto",
    engine: EngineName = "auto",
    device: str = "auto",
    template: str | None = None,
    system: str | None = None,
    max_length: int | None = None,
    strict: bool = False,
    parse_specials: bool = False,
    alibi: Table = "relative",
    revision: str | None = None,
    base: str | os.PathLike[str] | None = None,
    token_budget: int | None = None,
    memory: str | int | None = None,
    layout: str | None = None,
    label: str | None = None,
    weights: Weights | None = None,
    reduce: str | None = None,
    calibration: Pairs | None = None,
    calibration_tokens: int | None = None,
    beside: RewardModel | None = None,
    reference: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> RewardModel:
    """Load a reward model without running any of its code.

    path_or_id: a folder, a hub id such as "IDEA-CCNL/Ziya-LLaMA-7B-Reward", or "demo" for the bundled model.
    scheme: "auto", or a name of `lightrm.schemes.grammar`: "w8a8", "w4a8", "bf16", ...
    engine: "lightrm" for its own decoder, "transformers" for transformers' class of the checkpoint's name; "auto" takes
    lightrm's own where there is one. Through transformers there are the schemes fp32, bf16, fp16, nf4 and bnb-int8.
    device: "auto", "cpu", "cuda", "cuda:1".
    template: a name of `lightrm.text.templates.TEMPLATES`, or "chat" for the checkpoint's own; None takes the layout's.
    system: a system turn for every prompt that does not begin with its own; None: none. Empty text is a turn, too.
    max_length: tokens of one text at most; None takes the template's. strict: raise where a text would be cut.
    parse_specials: let special tokens in user text act, as Hugging Face tokenizers do; for parity tests only.
    alibi: "absolute" repeats the half-precision position table of Baichuan's published code.
    revision: commit, tag or branch of path_or_id, if that is a hub id.
    base: the base model of a LoRA adapter, if it is not where the adapter's config says.
    token_budget: tokens computed at once; None takes as many as pay and fit.
    memory: how much lightrm may take on the device, such as "8GiB" or a number of bytes, on a CPU including Python and
    PyTorch; None takes most of what is free. A model that does not fit is streamed, layer by layer.
    layout: "nemotron", "math_shepherd" or "rlhflow_prm": reward models whose files are those of a language model. All
    others are told by their files.
    label: which of several attributes is the score. weights: a number for each attribute, in order or by name; the
    score is their sum, each times its number. Without either, only a model that weighs them itself has a score.
    reduce: "min", "product", "last" or "mean": how one score is made of a process reward model's scores of steps.
    calibration: prompts with responses; rounding compensates its error on them. Some 10,000 tokens are enough.
    calibration_tokens: use whole calibration texts, from the first on, up to so many tokens; None uses all.
    beside: a loaded model. Tensors equal to its own are shared instead of loaded twice, and "auto" takes its scheme.
    reference: the model that a quantized folder was made from, for `rank(exact=True)`. Other models need none.
    progress: show a bar over the layers while they are loaded.

    Raises a CheckpointError for the files; SchemeError for scheme, device or memory; TemplateError for the template;
    InputError for any other option.
    """
    options = LoadOptions(
        scheme=scheme, engine=engine, device=device, template=template, max_length=max_length, strict=strict,
        parse_specials=parse_specials, alibi=alibi, revision=revision, base=base, token_budget=token_budget,
        memory=memory, system=system, layout=layout, label=label, weights=weights, reduce=reduce,
    )  # fmt: skip
    ids_of = None if calibration is None else lambda text: text.first_texts(calibration, calibration_tokens)
    return open_model(path_or_id, options, ids_of, beside=beside, reference=reference, progress=progress)


def open_model(
    path_or_id: str | os.PathLike[str],
    options: LoadOptions,
    calibration: CalibrationIds | None = None,
    *,
    beside: RewardModel | None = None,
    reference: str | os.PathLike[str] | None = None,
    progress: bool = False,
    draft: Path | None = None,
) -> RewardModel:
    """As `load`, with its options in one record. calibration: text side of the model -> ids of the calibration texts.
    draft: folder in which a calibration keeps what it has finished, and from which a stopped one goes on."""
    source = open_source(path_or_id, options.revision, options.base, options.layout, options.engine)
    if options.reduce is not None and not source.checkpoint.layout.steps:
        raise InputError("reduce is for process reward models; this one gives one score to a whole answer")
    device, a = choose_device(options.device), source.architecture
    given = None if options.memory is None else parse_size(options.memory)
    room = room_for(device, given, free_bytes(device))
    if beside is not None and options.scheme == "auto":
        options = replace(options, scheme=beside.report.scheme.name)
    scheme = source.scheme(options, device, room)
    placement = Placement(scheme, device, Alibi(options.alibi), twin_of(beside), draft)
    hoped = 0 if calibration is not None else shared_bytes(beside, placement, a)
    residence = source.residence(scheme, device, room, options.token_budget, hoped)
    text = text_side(source.checkpoint, a, options)
    ids = [] if calibration is None else calibration_ids(calibration, text, residence)
    shown = progress and not residence.streamed  # a streamed model loads no layer before the first score
    with item_progress(a.layers, f"layers {'rounded' if ids else source.verb}", shown) as advance:
        loaded = source.load(placement, ids, residence.streamed, advance)
    report, head = loaded.report, loaded.head
    loaded = loaded.choosing(options.label, options.weights)
    if hoped > report.shared:
        found = source.residence(scheme, device, room, options.token_budget, report.shared)
        residence = without(hoped, report, found)
    if report.kernels.slow:
        warnings.warn(f"slow kernels: {report.kernels}", KernelWarning, stacklevel=3)
    engine = loaded.engine(scheme, residence, text.segments)
    rows = engine.architecture.vocabulary  # of the embedding: trainers extend it without updating config.json
    steps = None if text.steps is None else replace(text.steps, vocabulary=rows)
    text = replace(text, vocabulary=rows, steps=steps)
    left = options if given is None else replace(options, memory=given - report.bytes)
    exact = reference_of(path_or_id, reference, source, left)
    return RewardModel(source.checkpoint, engine, report, text, exact, head)


def calibration_ids(calibration: CalibrationIds, text: TextSide, residence: Residence) -> list[list[int]]:
    """Return the ids of the calibration texts. Raises InputError if they cannot be used."""
    if residence.streamed:
        raise InputError(f"calibration needs the whole model in memory: {residence}")
    ids = calibration(text)
    if not ids:
        raise InputError("calibration holds no texts: pass prompts with responses, or None for no calibration")
    return ids


def twin_of(beside: RewardModel | None) -> Decoder | None:
    """Return the layers of a loaded model that another may share: all, unless they are streamed."""
    if beside is None or not isinstance(beside.engine, Engine) or beside.engine.residence.streamed:
        return None
    return beside.engine.decoder


def shared_bytes(beside: RewardModel | None, placement: Placement, a: Shape) -> int:
    """Return how many bytes of a loaded model this one can share at most: all if shape and scheme are the same.

    Which tensors are really equal is seen when they are loaded.
    """
    if (
        beside is None
        or placement.twin is None
        or not isinstance(a, Architecture)
        or beside.report.scheme.name != placement.scheme.name
    ):
        return 0
    other = placement.twin.architecture
    return beside.report.bytes if (a.layers, a.linears) == (other.layers, other.linears) else 0


def without(hoped: int, report: LoadReport, residence: Residence) -> Residence:
    """Return the residence of a model that shares less than was hoped for. Raises SchemeError if it does not fit."""
    if residence.streamed:
        raise SchemeError(
            f"beside= shares only {size_text(report.shared)}, and not {size_text(hoped)}, so this model does not fit: "
            f"{residence.reason}; load it without beside="
        )
    return residence


def reference_of(
    path_or_id: str | os.PathLike[str],
    reference: str | os.PathLike[str] | None,
    source: Source,
    options: LoadOptions,
) -> OpensReference | None:
    """Return a function that opens the reference model in a scheme; None for a quantized folder whose source is not
    known.

    The reference has this model's options except for the scheme. Another model has its own revision and base.
    """
    if reference is None and isinstance(source, Quantized):
        return None
    if reference is not None:
        layout = source.checkpoint.layout.name if source.checkpoint.layout.asked else None
        path_or_id, options = reference, replace(options, revision=None, base=None, layout=layout)
    return lambda scheme: open_model(path_or_id, replace(options, scheme=scheme, token_budget=None))
