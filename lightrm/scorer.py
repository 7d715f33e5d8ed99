"""RewardModel: load, score, rank. Wires the rooms together and does no arithmetic of its own."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Real

import numpy as np
import torch

from lightrm.checkpoints.detect import Checkpoint
from lightrm.engine.engine import Engine
from lightrm.errors import CopyError, InputError, TokenizerError
from lightrm.judge.bounds import CONFIDENCE, Bound
from lightrm.judge.exact_ranking import Effort, Ranking, Rankings, plain_ranking, ranking, settled
from lightrm.kernels import forks
from lightrm.loading.loader import LoadReport
from lightrm.loading.text_side import length_limit
from lightrm.progress import Advance, ignored, token_progress
from lightrm.schemes.grammar import size_text
from lightrm.text.conversation import Prompt, Response, Responses, items, kind, responses_of, turns_of
from lightrm.text.encoding import Encoded, Tokens
from lightrm.text.explanation import Explanation
from lightrm.text.templates import AnyTemplate

FOR_EACH = "expected a list of prompts, and a list of responses for each"


class TruncationWarning(UserWarning):
    """Some texts were longer than the model's limit and were cut."""


class RewardModel:
    """A reward model in memory. Made by `lightrm.load`; scores are raw, float32, in input order.

    Threads: any number of them may call any method of one model at the same time. Packs of tokens are computed one
    after the other, so more threads are no quicker than one, and each gets the scores that it would get alone. A
    lowered `token_budget` holds for all. One iterator of `stream` belongs to one thread.

    Processes: a process that was forked off one with a model may score with it, by one thread (`forks`); pages of the
    weights are shared. A model cannot be pickled or copied: a process that is spawned loads its own.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        engine: Engine,
        report: LoadReport,
        tokens: Tokens | None,
        template: AnyTemplate | None,
        no_text: str,
        max_length: int | None,
        strict: bool,
        reference: Callable[[str], RewardModel] | None = None,
    ) -> None:
        """reference: opens the same model in another scheme, for exact rankings."""
        self.checkpoint, self.engine, self.report = checkpoint, engine, report
        self.decoder, self.head, self.device = engine.decoder, engine.head, engine.device
        self.tokens, self.template, self.no_text, self.strict = tokens, template, no_text, strict
        self.reading = checkpoint.reading
        self.max_length = length_limit(max_length, template, tokens, engine.decoder.architecture)
        self.open_reference = reference
        self.opened_reference: RewardModel | None = None
        self.forked()
        forks.renew(self)

    def forked(self) -> None:
        self.opening = threading.Lock()  # of the reference

    def __reduce_ex__(self, protocol: object) -> str:
        """Raises CopyError: for pickle, copy and deepcopy alike."""
        raise CopyError(
            "a RewardModel cannot be pickled or copied: pass its path and options to the other process and call "
            "lightrm.load there; threads, and processes that are forked, may use this one"
        )

    @property
    def token_budget(self) -> int:
        """Tokens computed at once: of one pack, or of the packs that are streamed one after the other."""
        return self.engine.tokens

    @token_budget.setter
    def token_budget(self, tokens: int) -> None:
        """Raises InputError if it is not positive."""
        self.engine.tokens = positive("token_budget", tokens)

    @property
    def window(self) -> int:
        """Tokens to pass at once, at least, where there are many: for two packs, or for all that are streamed."""
        return self.engine.residence.window or 2 * self.engine.tokens

    def score(self, prompt: Prompt, responses: Responses) -> np.ndarray:
        """Score n responses to one prompt.

        prompt: a string, or {"role", "content"} turns that end in a user turn. responses: strings or assistant turns.
        Lists may be arrays, columns or generators. Returns float32 (n,), raw scores in input order.

        Raises InputError on anything that is not text, TooLongError in strict mode, TemplateError where the template
        cannot express the conversation.
        """
        turns, texts = turns_of(prompt), responses_of(responses)
        return self.run(self.encode([turns] * len(texts), texts))

    def score_batch(self, prompts: Iterable[Prompt], responses: Responses, *, progress: bool = False) -> np.ndarray:
        """Score one response to each of n prompts; float32 (n,), in input order. Errors as in `score`."""
        return self.shown(self.encode(prompts, responses), progress)

    def score_ids(self, sequences: Sequence[Sequence[int]], *, progress: bool = False) -> np.ndarray:
        """Score n sequences of token ids as they are: no template, no BOS, nothing cut; float32 (n,).

        Raises InputError on an empty sequence, an id outside the vocabulary, or more tokens than positions.
        """
        checked = [self.checked_ids(ids, k) for k, ids in enumerate(sequences)]
        return self.shown(checked, progress)

    def rank(
        self,
        prompt: Prompt,
        responses: Responses,
        *,
        exact: bool = False,
        confidence: float = CONFIDENCE,
        bound: float | Bound | None = None,
    ) -> Ranking:
        """The responses, best first; equal scores keep their input order. The rest as in `rank_batch`."""
        return self.rank_batch([prompt], [responses], exact=exact, confidence=confidence, bound=bound)[0]

    def rank_batch(
        self,
        prompts: Iterable[Prompt],
        responses: Iterable[Responses],
        *,
        exact: bool = False,
        confidence: float = CONFIDENCE,
        bound: float | Bound | None = None,
        progress: bool = False,
    ) -> Rankings:
        """Each prompt's responses, best first.

        exact: the order of full precision, for as many of 100 prompts as `confidence` says; answers whose quick scores
        are too close to each other are scored again by the reference, the same model in full precision, which is opened
        the first time. confidence: that this gives the right order of all answers of a further prompt like those that
        were measured; the surer, the more is scored again. bound: a report's, or how close is too close, in raw scores,
        0 or more; None takes what `lightrm fidelity` measured of a folder. The result's `effort` says what it took, and
        the confidence that the bound has: a lower one if few prompts with as many answers were measured, none for a
        bound that is a number.

        Raises InputError if the lists do not match, confidence is not between 0 and 1, the bound is no number of 0 or
        more, one is given without exact=True, or none is known; otherwise as `score`.
        """
        if bound is not None and not exact:
            raise InputError("bound says which answers are scored again, which exact=True asks for: pass both or none")
        asked = [turns_of(prompt) for prompt in items(prompts, FOR_EACH)]
        texts = [responses_of(some) for some in items(responses, FOR_EACH)]
        if len(asked) != len(texts):
            raise InputError(f"expected a list of responses for each of {len(asked)} prompts, found {len(texts)}")
        counts = [len(some) for some in texts]
        known = self.bound_of(bound, confidence) if exact else None
        repeated = [turns for turns, n in zip(asked, counts, strict=True) for _ in range(n)]
        ids = self.read(self.encode(repeated, [text for some in texts for text in some]))
        starts = np.cumsum([0, *counts])
        scores = self.shown(ids, progress)
        quick = [scores[start : start + n] for start, n in zip(starts, counts, strict=False)]
        if known is None:
            return Rankings(plain_ranking(q, some) for q, some in zip(quick, texts, strict=True))
        again: list[list[int]] = []

        def rescore(wanted: list[tuple[int, int]]) -> np.ndarray:
            sequences = [ids[starts[k] + i] for k, i in wanted]
            again.extend(sequences)
            return self.reference().shown(sequences, progress)

        limits = {n: known.limit(n, confidence) for n in sorted(set(counts)) if n > 1}
        gaps = [limits[n].gap if n > 1 else 0.0 for n in counts]
        full, raised = settled(quick, gaps, rescore)
        found = Rankings(ranking(*one) for one in zip(quick, full, raised, texts, strict=True))
        found.effort = Effort(
            answers=len(ids), rescored=len(again), tokens=self.engine.distinct(ids),
            rescored_tokens=self.engine.distinct(again), limits=limits,
            raised=sum(after > before for before, after in zip(gaps, raised, strict=True)),
        )  # fmt: skip
        return found

    def bound_of(self, bound: float | Bound | None, confidence: float) -> Bound:
        note = self.report.fidelity
        if not is_number(confidence) or not 0 < confidence < 1:
            raise InputError(f"confidence must be above 0 and below 1, such as 0.995, found {confidence!r}")
        if bound is None and note is None:
            raise InputError(
                f"how far {self.report.scheme} moves a difference of two scores is not known: measure it with `lightrm "
                "fidelity`, and pass bound=report.row(scheme).bound, or load a quantized folder that was measured"
            )
        if bound is None:
            assert note is not None
            return note.bound
        if isinstance(bound, Bound):
            return bound
        if not is_number(bound) or not bound >= 0:  # NaN is not
            raise InputError(f"bound must be a difference of raw scores, 0 or more, or a report's, found {bound!r}")
        return Bound({}, (), float(bound))

    def reference(self) -> RewardModel:
        """The same model in the precision that its fidelity was measured against, opened once: other threads wait."""
        with self.opening:
            if self.opened_reference is None:
                if self.open_reference is None:
                    raise InputError("this folder does not hold its source: pass reference=... to load")
                note = self.report.fidelity
                self.opened_reference = self.open_reference(note.reference if note is not None else "fp32")
            return self.opened_reference

    def explain(self, prompt: Prompt, response: Response) -> Explanation:
        """The text, ids and pieces behind one score."""
        encoded = self.encode_one(prompt, responses_of([response])[0])
        score = float(self.run([encoded.token_ids])[0])
        assert self.template is not None
        assert self.tokens is not None
        pieces = [self.tokens.piece(i) for i in encoded.token_ids]
        return Explanation(encoded.text, encoded.token_ids, pieces, encoded.cut, str(self.template), score)

    def encode(self, prompts: Iterable[Prompt], responses: Responses) -> list[list[int]]:
        """Token ids of each prompt with its response, cut to `max_length`; warns once if any was cut."""
        texts = responses_of(responses)
        asked = prompts if isinstance(prompts, str) else items(prompts, "prompts must be a list")
        if isinstance(asked, str) or len(asked) != len(texts):
            found = "one string" if isinstance(asked, str) else f"{len(asked)} prompts"
            raise InputError(
                f"prompts and responses must be lists of one length, found {found} and {len(texts)} responses"
            )
        encoded = [self.encode_one(prompt, text) for prompt, text in zip(asked, texts, strict=True)]
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
        encoded = self.tokens.encode(self.template, turns_of(prompt), response, self.max_length, self.strict)
        largest, vocabulary = max(encoded.token_ids, default=0), self.decoder.architecture.vocabulary
        if largest >= vocabulary:
            raise TokenizerError(
                f"{self.checkpoint.tokenizer_folder()}: the tokenizer gives id {largest}, the embedding has rows 0 to "
                f"{vocabulary - 1}: tokenizer and weights are not of one model"
            )
        return encoded

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

    def stream(self, prompts: Iterable[Prompt], responses: Responses) -> Iterator[tuple[int, float]]:
        """As `score_batch`, but position and score of each response as soon as its pack is done, in no order."""
        for group, found in self.engine.scores(self.read(self.encode(prompts, responses))):
            yield from zip(group, found.tolist(), strict=True)

    def shown(self, sequences: Sequence[list[int]], progress: bool) -> np.ndarray:
        """`run`, with a progress bar where one is wanted."""
        sequences = self.read(sequences)
        with token_progress(sum(len(ids) for ids in sequences), progress) as advance:
            return self.run(sequences, advance)

    def read(self, sequences: Sequence[list[int]]) -> list[list[int]]:
        """Each sequence up to the token that the score is read at: what stands behind it changes nothing.

        Raises InputError if a sequence lacks a token that it has to be read at.
        """
        return [self.reading.cut(ids) for ids in sequences]

    def run(self, sequences: Sequence[list[int]], advance: Advance = ignored) -> np.ndarray:
        """Scores of all sequences, input order restored."""
        scores = np.empty(len(sequences), dtype=np.float32)
        for group, found in self.engine.scores(self.read(sequences), advance):
            scores[group] = found
        return scores

    def __repr__(self) -> str:
        template = str(self.template) if self.template is not None else "none: score_ids only"
        shared = f", {size_text(self.report.shared)} of it shared" if self.report.shared else ""
        fidelity = f" · {self.report.fidelity.summary}" if self.report.fidelity else ""
        return (
            f"RewardModel({self.checkpoint.layout.name} · {self.decoder.architecture} · head {self.head} · "
            f"read at {self.reading} · template {template} · {self.report.scheme}, {self.report.scheme.reason} · "
            f"{size_text(self.report.bytes)}{shared} on {self.device} · {self.engine.residence} · "
            f"kernels: {self.report.kernels}{fidelity})"
        )


def is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)


def positive(name: str, value: int) -> int:
    """Raises InputError."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} must be a positive whole number, found {value!r}")
    return int(value)
