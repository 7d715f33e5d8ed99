"""From a path or hub id to a RewardModel: what the files are, which scheme, where it runs, whether it fits."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import tee
from pathlib import Path
from typing import Literal, get_args

import psutil
import torch

from lightrm import native, restoring
from lightrm.architecture import Alibi, Architecture
from lightrm.chat import ChatTemplate
from lightrm.checkpoints.detect import Checkpoint, open_checkpoint
from lightrm.checkpoints.hub import resolve
from lightrm.checkpoints.inventory import check_tensors, real_architecture
from lightrm.checkpoints.reading import Reading
from lightrm.compensating import loader_for
from lightrm.conversation import Prompt, responses_of, turns_of
from lightrm.engine import Engine
from lightrm.errors import InputError, SchemeError, TemplateError, TokenizerError
from lightrm.loading import LoadReport
from lightrm.packing import PackedBatch
from lightrm.plan import choose_scheme, room_for
from lightrm.prefixes import ALONE, packs
from lightrm.progress import item_progress
from lightrm.residence import MOST_TOKENS, Residence, choose_residence
from lightrm.schemes.grammar import Scheme, parse_size, size_text
from lightrm.scorer import RewardModel, check_length, length_limit
from lightrm.templates import AnyTemplate, find_template
from lightrm.tokenizer_files import has_tokenizer
from lightrm.tokens import Tokens, read_tokens
from lightrm.transformer import Decoder

Table = Literal["relative", "absolute"]
PLANNED_TOKENS = 2048  # computed at once where nothing else is said: enough to fill the units


class KernelWarning(UserWarning):
    """A fast kernel that belongs on this machine cannot run, and a slow one does its work."""


class TokenizerWarning(UserWarning):
    """A model has a tokenizer that cannot be read: it scores token ids, and no text."""


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
    template: a name of `lightrm.templates.TEMPLATES`, "chat" for the checkpoint's own; None takes the layout's.
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

    if native.is_native(folder):
        if calibration:
            raise InputError(f"{folder} is quantized already: pass calibration when loading its source")
        manifest, checkpoint = native.open_native(folder)
        a = checkpoint.architecture
        check_length(max_length, a)
        chosen = native.chosen_scheme(manifest, scheme, place)
        held = alike(beside, twin, a, chosen)
        residence = choose_residence(a, chosen, place, room, token_budget, held)
        tokens, form, no_text = text_side(checkpoint, template, parse_specials)
        with item_progress(a.layers, "layers mapped", shown(residence)) as advance:
            decoder, head, report = restoring.restore(
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
    own = None if native.is_native(folder) else path_or_id
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


def calibration_packs(
    tokens: Tokens | None,
    template: AnyTemplate | None,
    no_text: str,
    calibration: Sequence[tuple[Prompt, str]] | None,
    longest: int,
    reading: Reading,
) -> list[PackedBatch]:
    """Calibration text in the model's own template, cut and packed as scoring would cut and pack it."""
    if not calibration:
        return []
    ids = list(calibration_ids(tokens, template, no_text, calibration, longest, reading))
    return [batch for _, batch in packs(ids, PLANNED_TOKENS, ALONE)]


def calibration_ids(
    tokens: Tokens | None,
    template: AnyTemplate | None,
    no_text: str,
    calibration: Iterable[tuple[Prompt, str]],
    longest: int,
    reading: Reading,
) -> Iterator[list[int]]:
    """The ids of one text after the other. Raises TokenizerError for a model without text."""
    if tokens is None or template is None:
        raise TokenizerError(f"calibration needs text: {no_text}")
    for p, r in calibration:
        yield reading.cut(tokens.encode(template, turns_of(p), responses_of([r])[0], longest, False).token_ids)


def calibration_texts(
    path_or_id: str,
    texts: Iterable[tuple[Prompt, str]],
    most: int,
    template: str | None = None,
    max_length: int | None = None,
    revision: str | None = None,
) -> tuple[list[tuple[Prompt, str]], int]:
    """As many whole texts, from the first on, as have `most` of the model's tokens or fewer, and how many they have.

    Raises what `load` raises for the text side, and InputError where the first text alone has more.
    """
    checkpoint = open_checkpoint(resolve(path_or_id, revision))
    given, asked = tee(texts)
    taken: list[tuple[Prompt, str]] = []
    count = 0
    tokens, form, no_text = text_side(checkpoint, template, False)
    longest = length_limit(max_length, form, tokens, checkpoint.architecture)
    every = calibration_ids(tokens, form, no_text, asked, longest, checkpoint.reading)
    for text, ids in zip(given, every, strict=True):
        if count + len(ids) > most:
            break
        taken.append(text)
        count += len(ids)
    if not taken:
        raise InputError(f"there is no calibration text of {most} tokens or fewer")
    return taken, count


def text_side(
    checkpoint: Checkpoint, template: str | None, parse_specials: bool
) -> tuple[Tokens | None, AnyTemplate | None, str]:
    """Tokenizer and template, or None with the sentence that says what is missing."""
    try:
        tokens = read_tokens(
            checkpoint.tokenizer_folder(),
            parse_specials=parse_specials,
            reward_id=checkpoint.reward_id,
            ending=checkpoint.layout.ending,
        )
    except TokenizerError as error:
        if template is not None:
            raise
        if has_tokenizer(checkpoint.tokenizer_folder()):
            warnings.warn(f"only token ids can be scored: {error}", TokenizerWarning, stacklevel=3)
        return None, None, str(error)
    name = template or checkpoint.template
    if name is None or (name == "chat" and template is None and not tokens.files.chat_sources):
        return (
            tokens,
            None,
            f"layout {checkpoint.layout.name} does not say how its prompts look: pass template=... to load",
        )
    try:
        form: AnyTemplate = find_template(name) if name != "chat" else tokens.own_template()
        if isinstance(form, ChatTemplate):
            form = replace(form, whole=checkpoint.layout.whole)
        tokens.prepare(form)
        return tokens, form, ""
    except TemplateError as error:
        if template is not None:
            raise
        return tokens, None, str(error)  # nobody asked for it: `score_ids` works without


def free_bytes(device: torch.device) -> int:
    """Memory that a model could take on a device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SchemeError(f"no device {name!r}: {error}") from error
    if device.type not in MOST_TOKENS:
        raise SchemeError(f"device {name!r} is not supported: lightrm runs on 'cpu' and 'cuda'")
    seen = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= seen:
        raise SchemeError(f"device {name!r} was asked for, but PyTorch sees {seen} CUDA devices")
    return device
