"""RewardModel: load, score, rank. Wires the rooms together and does no arithmetic of its own."""

from __future__ import annotations

import html
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import psutil
import torch

from lightrm import native
from lightrm.architecture import Alibi
from lightrm.checkpoints.detect import Checkpoint, open_checkpoint
from lightrm.checkpoints.hub import resolve
from lightrm.checkpoints.inventory import real_architecture
from lightrm.compensating import loader_for
from lightrm.conversation import Prompt, kind, responses_of, turns_of
from lightrm.errors import InputError, NumericsError, SchemeError, TokenizerError
from lightrm.heads import ValueHead
from lightrm.loading import LoadReport
from lightrm.packing import PackedBatch
from lightrm.plan import choose_scheme
from lightrm.prefixes import ALONE, pack, packs
from lightrm.progress import token_progress
from lightrm.schemes.grammar import size_text
from lightrm.templates import AnyTemplate, find_template
from lightrm.tokens import Encoded, Tokens, read_tokens
from lightrm.transformer import Decoder

TOKEN_BUDGET = {"cpu": 2048, "cuda": 16384}  # tokens of one pack: enough to fill the units, little beside the weights


class TruncationWarning(UserWarning):
    """Some texts were longer than the model's limit and were cut."""


class KernelWarning(UserWarning):
    """A fast kernel that belongs on this machine cannot run, and a slow one does its work."""


class Ranked(NamedTuple):
    """One response with its score and its position in the input."""

    score: float
    position: int
    response: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """What was scored: the whole text after templating, the ids and pieces that remained of it, how many tokens were
    cut, and the score."""

    text: str
    token_ids: list[int]
    pieces: list[str]
    cut: int
    template: str
    score: float

    def __str__(self) -> str:
        pairs = "  ".join(f"{piece!r}:{i}" for piece, i in zip(self.pieces, self.token_ids, strict=True))
        cut = f", {self.cut} more cut" if self.cut else ""
        head = f"score {self.score:.4f} · template {self.template} · {len(self.token_ids)} tokens{cut}"
        return f"{head}\n{self.text}\n{pairs}"

    def _repr_html_(self) -> str:
        shades = ("#e8f0fe", "#fef3e0")
        spans = "".join(
            f'<span title="{i}" style="background:{shades[k % 2]};color:#222">{html.escape(piece)}</span>'
            for k, (piece, i) in enumerate(zip(self.pieces, self.token_ids, strict=True))
        )
        cut = f", {self.cut} more cut" if self.cut else ""
        return (
            f"<p><b>{self.score:.4f}</b> · template {self.template} · {len(self.token_ids)} tokens{cut}</p>"
            f'<p style="font-family:monospace;white-space:pre-wrap">{spans}</p>'
        )


class RewardModel:
    """A reward model in memory. Made by `lightrm.load`; scores are raw, float32, in input order."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        decoder: Decoder,
        head: ValueHead,
        report: LoadReport,
        tokens: Tokens | None,
        template: AnyTemplate | None,
        no_text: str,
        max_length: int | None,
        token_budget: int,
        strict: bool,
    ) -> None:
        self.checkpoint, self.decoder, self.head, self.report = checkpoint, decoder, head, report
        self.tokens, self.template, self.no_text = tokens, template, no_text
        self.token_budget, self.strict = token_budget, strict
        self.device = decoder.embedding_VD.device
        self.max_length = self.limit(max_length)

    def limit(self, asked: int | None) -> int:
        """Longest sequence in tokens: what was asked for, else the template's, else the tokenizer's; never more
        than the model has positions."""
        own = self.template.max_length if self.template is not None else None
        if own is None and self.tokens is not None:
            own = self.tokens.max_length
        longest = self.decoder.architecture.max_positions
        if asked is not None and not 8 <= asked <= longest:
            raise InputError(f"max_length must be between 8 and this model's {longest} positions, found {asked}")
        return min(asked or own or longest, longest)

    def score(self, prompt: Prompt, responses: Sequence[str]) -> np.ndarray:
        """Score n responses to one prompt.

        prompt: a string, or a list of {"role", "content"} turns that ends in a user turn.
        Returns float32 (n,), raw scores in input order. Raises InputError on anything that is not text,
        TooLongError in strict mode, TemplateError where the template cannot express the conversation.
        """
        return self.run(self.encode([prompt] * len(responses_of(responses)), responses), progress=False)

    def score_batch(self, prompts: Sequence[Prompt], responses: Sequence[str], *, progress: bool = False) -> np.ndarray:
        """Score one response to each of n prompts; float32 (n,), in input order. Errors as in `score`."""
        return self.run(self.encode(prompts, responses), progress)

    def score_ids(self, sequences: Sequence[Sequence[int]], *, progress: bool = False) -> np.ndarray:
        """Score n sequences of token ids as they are: no template, no BOS, nothing cut; float32 (n,).

        Raises InputError on an empty sequence, an id outside the vocabulary, or more tokens than positions.
        """
        checked = [self.checked_ids(ids, k) for k, ids in enumerate(sequences)]
        return self.run(checked, progress)

    def rank(self, prompt: Prompt, responses: Sequence[str]) -> list[Ranked]:
        """The responses, best first; equal scores keep their input order."""
        scores = self.score(prompt, responses)
        order = np.argsort(-scores, kind="stable")
        return [Ranked(float(scores[i]), int(i), responses[i]) for i in order]

    def explain(self, prompt: Prompt, response: str) -> Explanation:
        """The text, ids and pieces behind one score."""
        encoded = self.encode_one(prompt, responses_of([response])[0])
        score = float(self.run([encoded.token_ids], progress=False)[0])
        assert self.template is not None
        return Explanation(encoded.text, encoded.token_ids, encoded.pieces, encoded.cut, self.template.name, score)

    def encode(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt with its response, cut to `max_length`; warns once if any was cut."""
        texts = responses_of(responses)
        if isinstance(prompts, str) or len(prompts) != len(texts):
            found = "one string" if isinstance(prompts, str) else f"{len(prompts)} prompts"
            raise InputError(
                f"prompts and responses must be lists of one length, found {found} and {len(texts)} responses"
            )
        encoded = [self.encode_one(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        cut = [e.cut for e in encoded if e.cut]
        if cut:
            side = self.template.cut if self.template is not None else ""
            warnings.warn(
                f"{len(cut)} of {len(encoded)} texts were longer than {self.max_length} tokens and lost "
                f"{sum(cut)} tokens ({side}); strict=True raises instead",
                TruncationWarning,
                stacklevel=3,
            )
        return [e.token_ids for e in encoded]

    def encode_one(self, prompt: Prompt, response: str) -> Encoded:
        if self.tokens is None or self.template is None:
            raise TokenizerError(self.no_text)
        return self.tokens.encode(self.template, turns_of(prompt), response, self.max_length, self.strict)

    def checked_ids(self, ids: Sequence[int], k: int) -> list[int]:
        array = np.asarray(ids.cpu() if isinstance(ids, torch.Tensor) else ids)
        if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
            raise InputError(f"sequence {k} must be a non-empty list of whole numbers, found {kind(ids)}")
        vocabulary, longest = self.decoder.architecture.vocabulary, self.decoder.architecture.max_positions
        if array.min() < 0 or array.max() >= vocabulary:
            wrong = array[(array < 0) | (array >= vocabulary)][0]
            raise InputError(f"sequence {k} holds id {wrong}, this model has ids 0 to {vocabulary - 1}")
        if len(array) > longest:
            raise InputError(f"sequence {k} has {len(array)} tokens, this model has {longest} positions")
        return [int(i) for i in array]

    def run(self, sequences: Sequence[list[int]], progress: bool) -> np.ndarray:
        """Packs of similar lengths through decoder and head; input order restored."""
        scores = np.empty(len(sequences), dtype=np.float32)
        with token_progress(sum(len(ids) for ids in sequences), progress) as advance:
            for group, batch in packs(sequences, self.token_budget):
                scores[group] = self.head(self.decoder.last_hidden(batch.to(self.device))).cpu().numpy()
                advance(sum(len(sequences[i]) for i in group))
        if not np.isfinite(scores).all():
            first = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise NumericsError(
                f"the score of sequence {first} is {scores[first]}: {self.first_overflow(sequences[first])} under "
                f"{self.report.scheme}; load with scheme='bf16' or 'fp32'; if those overflow too, the weights are bad"
            )
        return scores

    def first_overflow(self, sequence: list[int]) -> str:
        """Where NaN or Inf first shows while a sequence is computed again, in words."""
        found: list[str] = []

        def watch(name: str, x_TD: torch.Tensor) -> None:
            if not found and not bool(torch.isfinite(x_TD).all()):
                found.append(name)

        self.decoder.last_hidden(pack([sequence]).to(self.device), watch)
        return f"activations overflow in {found[0]}" if found else "the head overflows"

    def __repr__(self) -> str:
        template = self.template.name if self.template is not None else "none: score_ids only"
        return (
            f"RewardModel({self.checkpoint.layout.name} · {self.decoder.architecture} · head {self.head} · "
            f"template {template} · {self.report.scheme}, {self.report.scheme.reason} · "
            f"{size_text(self.report.bytes)} on {self.device} · kernels: {self.report.kernels})"
        )


def load(
    path_or_id: str | os.PathLike[str],
    *,
    scheme: str = "auto",
    device: str = "auto",
    template: str | None = None,
    max_length: int | None = None,
    strict: bool = False,
    parse_specials: bool = False,
    alibi: Literal["relative", "absolute"] = "relative",
    revision: str | None = None,
    base: str | os.PathLike[str] | None = None,
    token_budget: int | None = None,
    calibration: Sequence[tuple[Prompt, str]] | None = None,
) -> RewardModel:
    """Load a reward model without running any of its code.

    path_or_id: a folder, a hub id such as "IDEA-CCNL/Ziya-LLaMA-7B-Reward", or "demo" for the bundled model.
    scheme: "auto", or a name of `lightrm.schemes.grammar`: "w8a8", "w4a8", "bf16", ...
    device: "auto", "cpu", "cuda", "cuda:1".
    template: a name of `lightrm.templates.TEMPLATES`, "chat" for the checkpoint's own; None takes the layout's.
    max_length: tokens of one text at most; None takes the template's. strict: raise where a text would be cut.
    parse_specials: let special tokens in user text act, as Hugging Face tokenizers do; for parity tests only.
    alibi: "absolute" repeats the half-precision position table of Baichuan's published code.
    revision: commit, tag or branch of a hub id. base: the base model of a LoRA adapter, if it has moved.
    token_budget: tokens computed at once.
    calibration: prompts with responses on which 4-bit rounding compensates its own error; some 10,000 tokens serve.

    Raises a CheckpointError for the files, SchemeError for scheme or device, TemplateError for the template.
    """
    folder = resolve(path_or_id if isinstance(path_or_id, str) else Path(path_or_id), revision)
    place = choose_device(device)
    if token_budget is not None and token_budget < 1:
        raise InputError(f"token_budget must be positive, found {token_budget}")
    budget = token_budget or TOKEN_BUDGET[place.type]
    if native.is_native(folder):
        if calibration:
            raise InputError(f"{folder} is quantized already: pass calibration when loading its source")
        manifest, checkpoint = native.open_native(folder)
        chosen = native.chosen_scheme(manifest, scheme, place)
        tokens, form, no_text = text_side(checkpoint, template, parse_specials)
        decoder, head, report = native.restore(manifest, checkpoint, chosen, place, Alibi(alibi))
    else:
        checkpoint = open_checkpoint(folder, os.fspath(base) if base is not None else None)
        chosen = choose_scheme(
            scheme, place, real_architecture(checkpoint), free_bytes(place), budget, checkpoint.holds
        )
        tokens, form, no_text = text_side(checkpoint, template, parse_specials)
        packs = calibration_packs(tokens, form, no_text, calibration, max_length, budget)
        decoder, head, report = loader_for(checkpoint, chosen, place, Alibi(alibi), packs).load()
    if report.kernels.slow:
        warnings.warn(f"slow kernels: {report.kernels}", KernelWarning, stacklevel=2)
    return RewardModel(checkpoint, decoder, head, report, tokens, form, no_text, max_length, budget, strict)


def calibration_packs(
    tokens: Tokens | None,
    template: AnyTemplate | None,
    no_text: str,
    calibration: Sequence[tuple[Prompt, str]] | None,
    max_length: int | None,
    budget: int,
) -> list[PackedBatch]:
    """Calibration text in the model's own template, packed as scoring would pack it."""
    if not calibration:
        return []
    if tokens is None or template is None:
        raise TokenizerError(f"calibration needs text: {no_text}")
    longest = max_length or template.max_length or tokens.max_length or budget
    ids = [tokens.encode(template, turns_of(p), responses_of([r])[0], longest, False).token_ids for p, r in calibration]
    return [batch for _, batch in packs(ids, budget, ALONE)]


def text_side(
    checkpoint: Checkpoint, template: str | None, parse_specials: bool
) -> tuple[Tokens | None, AnyTemplate | None, str]:
    """Tokenizer and template, or None with the sentence that says what is missing."""
    try:
        tokens = read_tokens(
            checkpoint.tokenizer_folder(),
            parse_specials=parse_specials,
            reward_id=checkpoint.reward_id,
            fallback=checkpoint.config.raw,
        )
    except TokenizerError as error:
        if template is not None:
            raise
        return None, None, str(error)
    name = template or checkpoint.template
    if name is None or (name == "chat" and template is None and tokens.chat_source is None):
        return (
            tokens,
            None,
            f"layout {checkpoint.layout.name} does not say how its prompts look: pass template=... to load",
        )
    return tokens, tokens.own_template() if name == "chat" else find_template(name), ""


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
    if device.type not in TOKEN_BUDGET:
        raise SchemeError(f"device {name!r} is not supported: lightrm runs on 'cpu' and 'cuda'")
    seen = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= seen:
        raise SchemeError(f"device {name!r} was asked for, but PyTorch sees {seen} CUDA devices")
    return device
