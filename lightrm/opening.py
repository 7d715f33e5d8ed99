"""From a path or hub id to a RewardModel: what the files are, which scheme, where it runs, whether it fits."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from lightrm.architecture import Alibi, Architecture
from lightrm.checkpoints.detect import open_checkpoint
from lightrm.checkpoints.hub import resolve
from lightrm.checkpoints.inventory import check_tensors, real_architecture
from lightrm.engine.devices import choose_device, free_bytes
from lightrm.engine.engine import Engine
from lightrm.engine.memory import choose_scheme, room_for
from lightrm.engine.residence import Residence, choose_residence
from lightrm.errors import InputError, SchemeError
from lightrm.loading import folder_loader, quantized_folder
from lightrm.loading.calibrated_loader import loader_for
from lightrm.loading.loader import LoadReport
from lightrm.loading.text_side import calibration_packs, check_length, length_limit, text_side
from lightrm.model.decoder import Decoder
from lightrm.progress import item_progress
from lightrm.schemes.grammar import Scheme, parse_size, size_text
from lightrm.scorer import RewardModel
from lightrm.text.conversation import Prompt

Table = Literal["relative", "absolute"]
PLANNED_TOKENS = 2048  # computed at once where nothing else is said: enough to fill the units


class KernelWarning(UserWarning):
    """A fast kernel that belongs on this machine cannot run, and a slow one does its work."""


def load(
    path_or_id: str | os.PathLike[str],
    *,
    scheme: str = "auto",
    device: str = "auto",
    template: str | None = None,
    max_length: int | None = None,
    strict: bool = False,
    parse_specials: bool = False,
    alibi: Table = "relative",
    revision: str | None = None,
    base: str | os.PathLike[str] | None = None,
    token_budget: int | None = None,
    memory: str | int | None = None,
    calibration: Sequence[tuple[Prompt, str]] | None = None,
    beside: RewardModel | None = None,
    reference: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> RewardModel:
    """Load a reward model without running any of its code.

    path_or_id: a folder, a hub id such as "IDEA-CCNL/Ziya-LLaMA-7B-Reward", or "demo" for the bundled model.
    scheme: "auto", or a name of `lightrm.schemes.grammar`: "w8a8", "w4a8", "bf16", ...
    device: "auto", "cpu", "cuda", "cuda:1".
    template: a name of `lightrm.text.templates.TEMPLATES`, "chat" for the checkpoint's own; None takes the layout's.
    max_length: tokens of one text at most; None takes the template's. strict: raise where a text would be cut.
    parse_specials: let special tokens in user text act, as Hugging Face tokenizers do; for parity tests only.
    alibi: "absolute" repeats the half-precision position table of Baichuan's published code.
    revision: commit, tag or branch of path_or_id, where that is a hub id. base: the base model of a LoRA adapter, if it
    has moved.
    token_budget: tokens computed at once; None takes what the memory allows.
    memory: what lightrm may take on the device, such as "8GiB" or a number of bytes, on a CPU Python and PyTorch
    included; None takes most of what is free. A model that does not fit is streamed, layer by layer.
    calibration: prompts with responses on which rounding compensates its own error; some 10,000 tokens serve.
    beside: a loaded model of the same base, whose equal tensors are taken instead of second copies, and its scheme.
    reference: what a quantized folder was made from, for `rank(exact=True)`; other models are their own.
    progress: show a bar over the layers while they are loaded.

    Raises a CheckpointError for the files, SchemeError for scheme, device or memory, TemplateError for the template.
    """
    check_options(alibi, token_budget)
    folder = resolve(path_or_id if isinstance(path_or_id, str) else Path(path_or_id), revision)
    place = choose_device(device)
    given = parse_size(memory) if isinstance(memory, str) else memory
    room = room_for(place, given, free_bytes(place))
    if beside is not None and scheme == "auto":
        scheme = beside.report.scheme.name
    twin = None if beside is None or beside.engine.residence.streamed else beside.decoder

    def shown(residence: Residence) -> bool:
        return progress and not residence.streamed  # of which nothing is loaded before it is used

    if quantized_folder.is_native(folder):
        if calibration:
            raise InputError(f"{folder} is quantized already: pass calibration when loading its source")
        manifest, checkpoint = quantized_folder.open_native(folder)
        a = checkpoint.architecture
        check_length(max_length, a)
        chosen = quantized_folder.chosen_scheme(manifest, scheme, place)
        held = alike(beside, twin, a, chosen)
        residence = choose_residence(a, chosen, place, room, token_budget, held)
        tokens, form, no_text = text_side(checkpoint, template, parse_specials)
        with item_progress(a.layers, "layers mapped", shown(residence)) as advance:
            decoder, head, report = folder_loader.restore(
                manifest, checkpoint, chosen, place, Alibi(alibi), twin, residence.streamed, advance
            )
    else:
        checkpoint = open_checkpoint(folder, os.fspath(base) if base is not None else None)
        check_tensors(checkpoint)
        a = real_architecture(checkpoint)
        check_length(max_length, a)
        chosen = choose_scheme(
            scheme, place, a, room, token_budget or PLANNED_TOKENS, checkpoint.holds, checkpoint.stored
        )
        held = 0 if calibration else alike(beside, twin, a, chosen)
        residence = choose_residence(a, chosen, place, room, token_budget, held)
        if residence.streamed and calibration:
            raise InputError(f"calibration needs the whole model in memory: {residence}")
        tokens, form, no_text = text_side(checkpoint, template, parse_specials)
        packs = calibration_packs(
            tokens, form, no_text, calibration, length_limit(max_length, form, tokens, a), checkpoint.reading
        )
        loader = loader_for(checkpoint, chosen, place, Alibi(alibi), packs, twin)
        with item_progress(a.layers, "layers rounded" if packs else "layers loaded", shown(residence)) as advance:
            decoder, head, report = loader.load(residence.streamed, advance)
    if held > report.shared:
        residence = without(held, report, choose_residence(a, chosen, place, room, token_budget, report.shared))
    if report.kernels.slow:
        warnings.warn(f"slow kernels: {report.kernels}", KernelWarning, stacklevel=2)
    engine = Engine(decoder, head, chosen, residence)
    own = None if quantized_folder.is_native(folder) else path_or_id
    source = reference if reference is not None else own
    its = (revision, base) if reference is None else (None, None)  # another model has no revision or base of this one
    opened = None

    if source is not None:

        def opened(exact: str) -> RewardModel:
            left = None if given is None else given - report.bytes
            return load(
                source, scheme=exact, device=device, template=template, max_length=max_length, strict=strict,
                parse_specials=parse_specials, alibi=alibi, revision=its[0], base=its[1], memory=left,
            )  # fmt: skip

    return RewardModel(checkpoint, engine, report, tokens, form, no_text, max_length, strict, opened)


def check_options(alibi: str, token_budget: int | None) -> None:
    """Raises InputError, before any work."""
    if alibi not in get_args(Table):
        raise InputError(f"alibi must be {' or '.join(map(repr, get_args(Table)))}, found {alibi!r}")
    if token_budget is not None and token_budget < 1:
        raise InputError(f"token_budget must be positive, found {token_budget}")


def alike(beside: RewardModel | None, twin: Decoder | None, a: Architecture, scheme: Scheme) -> int:
    """Bytes of a loaded model that this one may turn out to have too: same shape, same scheme. Which it has is seen by
    comparing the tensors, as they are loaded."""
    if beside is None or twin is None or beside.report.scheme.name != scheme.name:
        return 0
    other = twin.architecture
    same = (a.layers, a.width, a.ffn_width, a.query_heads) == (
        other.layers, other.width, other.ffn_width, other.query_heads,
    )  # fmt: skip
    return beside.report.bytes if same else 0


def without(held: int, report: LoadReport, residence: Residence) -> Residence:
    """What remains possible where less is shared than was hoped for. Raises SchemeError."""
    if residence.streamed:
        raise SchemeError(
            f"beside= shares {size_text(report.shared)} of the {size_text(held)} that this model has room for only if "
            f"they are shared: {residence.reason}; load it without beside="
        )
    return residence
