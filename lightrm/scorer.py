"""RewardModel: score and rank. Connects text, engine and rankings, and does no arithmetic of its own."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from lightrm.checkpoints.detect import Checkpoint
from lightrm.checkpoints.model_files import ModelFiles
from lightrm.display.progress import token_progress
from lightrm.display.sizes import size_text
from lightrm.engine.engine import Engine
from lightrm.engine.scoring_engine import ScoringEngine
from lightrm.errors import CopyError, InputError, SchemeError
from lightrm.judge.bounds import CONFIDENCE, Bound, bound_for
from lightrm.judge.exact_ranking import Ranking, Rankings, exact_rankings, plain_ranking
from lightrm.kernels import forks
from lightrm.loading import quantized_folder
from lightrm.loading.options import positive
from lightrm.loading.placement import Loaded, LoadReport
from lightrm.loading.text_side import TextSide
from lightrm.text.conversation import Prompt, Response, Responses, items, kind, responses_of, turns_of
from lightrm.text.explanation import Explanation
from lightrm.text.templates import AnyTemplate, Turn

FOR_EACH = "expected a list of prompts, and a list of responses for each"
Asked = list[tuple[list[Turn], list[str]]]  # each prompt with its responses


class TruncationWarning(UserWarning):
    """Some texts were longer than the model's limit and were cut."""


class RewardModel:
    """A reward model in memory. Made by `lightrm.load`; scores are raw, float32, in input order.

    text: its tokenizer and template. engine: what runs its layers, and where they are. report: what loading did.
    checkpoint: the files it was loaded from.

    Threads: any number of them may call any method of one model at the same time. Packs of tokens are computed one
    after the other, so more threads are no faster than one, and each gets the same scores as alone. A lowered
    `token_budget` holds for all. Each iterator of `stream` belongs to one thread.

    Processes: a process that was forked off one with a model may score with it, in one thread (`kernels.forks`), and
    shares the memory of the weights. A model cannot be pickled or copied: a process that is spawned loads its own.
    """

    def __init__(
        self,
        checkpoint: ModelFiles,
        engine: ScoringEngine,
        report: LoadReport,
        text: TextSide,
        reference: OpensReference | None = None,
    ) -> None:
        """reference: opens the same model in another scheme, for exact rankings."""
        self.checkpoint, self.engine, self.report, self.text = checkpoint, engine, report, text
        self._reference = Reference(reference)

    def __reduce_ex__(self, protocol: object) -> str:
        """Raise CopyError: for pickle, copy and deepcopy alike."""
        raise CopyError(
            "a RewardModel cannot be pickled or copied: pass its path and options to the other process and call "
            "lightrm.load there; threads, and processes that are forked, may use this one"
        )

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.engine.device

    @property
    def template(self) -> AnyTemplate | None:
        """How a prompt and a response become one text; None for a model that scores token ids only."""
        return self.text.template

    @property
    def max_length(self) -> int:
        """Tokens of one text at most; longer ones are cut."""
        return self.text.max_length

    @property
    def token_budget(self) -> int:
        """Tokens computed at once: of one pack, or of the packs that are streamed one after the other."""
        return self.engine.tokens

    @token_budget.setter
    def token_budget(self, tokens: int) -> None:
        """Raises InputError if it is not positive."""
        self.engine.tokens = positive("token_budget", tokens)

    def score(self, prompt: Prompt, responses: Responses) -> np.ndarray:
        """Score n responses to one prompt.

        prompt: a string, or {"role", "content"} turns that end in a user turn. responses: strings or assistant turns.
        Lists may be arrays, columns or generators. Returns float32 (n,), raw scores in input order.

        Raises InputError on anything that is not text, TooLongError in strict mode, TemplateError if the template
        cannot express the conversation.
        """
        return self._scores(self._ids([(turns_of(prompt), responses_of(responses))]), progress=False)

    def score_batch(self, prompts: Iterable[Prompt], responses: Responses, *, progress: bool = False) -> np.ndarray:
        """Score one response to each of n prompts; float32 (n,), in input order. Errors as in `score`."""
        return self._scores(self._ids(paired(prompts, responses)), progress)

    def score_ids(self, sequences: Sequence[Sequence[int]], *, progress: bool = False) -> np.ndarray:
        """Score n sequences of token ids as they are: no template, no BOS, nothing cut; float32 (n,).

        Raises InputError on an empty sequence, an id outside the vocabulary, or more tokens than positions.
        """
        return self._scores([self._checked(ids, k) for k, ids in enumerate(sequences)], progress)

    def stream(self, prompts: Iterable[Prompt], responses: Responses) -> Iterator[tuple[int, float]]:
        """As `score_batch`, but yields the position and the score of each response as soon as its pack is done, in no
        order."""
        for group, found in self.engine.scores(self.text.read(self._ids(paired(prompts, responses)))):
            yield from zip(group, found.tolist(), strict=True)

    def rank(
        self,
        prompt: Prompt,
        responses: Responses,
        *,
        exact: bool = False,
        confidence: float = CONFIDENCE,
        bound: float | Bound | None = None,
    ) -> Ranking:
        """Return the responses, best first; equal scores keep their input order. Options as for `rank_batch`."""
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
        """Return each prompt's responses, best first.

        exact: rank in the order of full precision. Answers whose quick scores are close to each other are scored again
        by the reference, the same model in full precision, which is loaded the first time.
        confidence: probability that this gives the right order of all answers, for a further prompt like those that
        were measured. The higher it is, the more answers are scored again.
        bound: a report's bound, or the distance in raw scores, 0 or more, up to which two scores are too close. None
        takes what `lightrm fidelity` measured of the folder.
        progress: show a bar over the tokens.

        The result's `effort` says how much was scored again, and the confidence that the bound allows: lower if few
        prompts with as many answers were measured, 0 for a bound that is a number.

        Raises InputError if the lists do not match, confidence is not between 0 and 1, the bound is not such a number,
        a bound is given without exact=True, or none is known; otherwise as `score`.
        """
        if bound is not None and not exact:
            raise InputError("bound says which answers are scored again, which exact=True asks for: pass both or none")
        asked = [turns_of(prompt) for prompt in items(prompts, FOR_EACH)]
        texts = [responses_of(some) for some in items(responses, FOR_EACH)]
        if len(asked) != len(texts):
            raise InputError(f"expected a list of responses for each of {len(asked)} prompts, found {len(texts)}")
        known = bound_for(bound, confidence, self.report.fidelity, self.report.scheme.name) if exact else None
        ids = self.text.read(self._ids(list(zip(asked, texts, strict=True))))
        starts = np.cumsum([0, *map(len, texts)])
        scores = self._scores(ids, progress)
        quick = [scores[start:end] for start, end in pairwise(starts)]
        if known is None:
            return Rankings(plain_ranking(*one) for one in zip(quick, texts, strict=True))

        def sequences(answers: Sequence[tuple[int, int]]) -> list[list[int]]:
            return [ids[starts[k] + i] for k, i in answers]

        return exact_rankings(
            quick, texts, known, confidence,
            rescore=lambda answers: self._exact()._scores(sequences(answers), progress),
            tokens=lambda answers: self.engine.distinct_tokens(sequences(answers)),
        )  # fmt: skip

    def explain(self, prompt: Prompt, response: Response) -> Explanation:
        """Return one score with the text, ids and pieces behind it. Errors as in `score`."""
        turns, (text,) = turns_of(prompt), responses_of([response])
        (encoded,) = self.text.encode(turns, [text])
        (score,) = self._scores([encoded.token_ids], progress=False)
        return self.text.explain(turns, text, encoded, float(score))

    def encode(self, prompts: Iterable[Prompt], responses: Responses) -> list[list[int]]:
        """Return the token ids of each prompt with its response, cut to `max_length`; warns once if any was cut.

        Errors as in `score`.
        """
        return self._ids(paired(prompts, responses))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the model as a quantized folder, which `lightrm.load` reads quickly.

        Raises CheckpointError if the folder exists, SchemeError unless the scheme is w8a8, w4a8 or w4a16, which models
        that run through transformers do not have.
        """
        template = self.template.name if self.template is not None else None
        checkpoint, engine = self.native
        loaded = Loaded(engine.decoder, engine.head, self.report)
        quantized_folder.write(Path(folder), checkpoint, loaded, template)

    @property
    def native(self) -> tuple[Checkpoint, Engine]:
        """The files and the engine of a model that lightrm's own decoder runs. Raises SchemeError for any other."""
        if not isinstance(self.checkpoint, Checkpoint) or not isinstance(self.engine, Engine):
            raise SchemeError(
                f"{self.checkpoint.layout.name} runs in transformers, not in lightrm's own decoder, whose layers this "
                "needs"
            )
        return self.checkpoint, self.engine

    def _ids(self, asked: Asked) -> list[list[int]]:
        encoded = [one for turns, texts in asked for one in self.text.encode(turns, texts)]
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

    def _checked(self, ids: Sequence[int], k: int) -> list[int]:
        """Return one sequence of ids, the k-th, as a list. Raises InputError."""
        a = self.engine.architecture
        array = np.asarray(ids.cpu() if isinstance(ids, torch.Tensor) else ids)
        if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
            raise InputError(f"sequence {k} must be a non-empty list of whole numbers, found {kind(ids)}")
        if array.min() < 0 or array.max() >= a.vocabulary:
            wrong = array[(array < 0) | (array >= a.vocabulary)][0]
            raise InputError(f"sequence {k} holds id {wrong}, this model has ids 0 to {a.vocabulary - 1}")
        if len(array) > a.max_positions:
            raise InputError(f"sequence {k} has {len(array)} tokens, this model has {a.max_positions} positions")
        return [int(i) for i in array]

    def _scores(self, sequences: Sequence[Sequence[int]], progress: bool) -> np.ndarray:
        """Return the scores of token ids, float32, in input order. progress: show a bar over the tokens."""
        read = self.text.read(sequences)
        with token_progress(sum(map(len, read)), progress) as advance:
            return self.engine.all_scores(read, advance)

    def _exact(self) -> RewardModel:
        """Return the same model in the precision that its fidelity was measured against."""
        note = self.report.fidelity
        return self._reference.model("fp32" if note is None else note.reference)

    def __repr__(self) -> str:
        template = str(self.template) if self.template is not None else "none: score_ids only"
        shared = f", {size_text(self.report.shared)} of it shared" if self.report.shared else ""
        fidelity = f" · {self.report.fidelity.summary}" if self.report.fidelity else ""
        parts = (
            self.checkpoint.layout.name, self.engine.architecture, f"head {self.engine.head}",
            f"read at {self.text.reading}", f"template {template}",
            f"{self.report.scheme}, {self.report.scheme.reason}",
            f"{size_text(self.report.bytes)}{shared} on {self.device}", self.engine.residence,
            f"kernels: {self.report.kernels}{fidelity}",
        )  # fmt: skip
        return f"RewardModel({' · '.join(map(str, parts))})"


OpensReference = Callable[[str], RewardModel]  # in a scheme


class Reference:
    """The full-precision twin of a model. It is loaded the first time it is asked for, while other threads wait."""

    def __init__(self, opens: OpensReference | None) -> None:
        self.opens = opens
        self.opened: RewardModel | None = None
        self.forked()
        forks.call_after_fork(self)

    def forked(self) -> None:
        self.opening = threading.Lock()

    def model(self, scheme: str) -> RewardModel:
        """Return the twin. Raises InputError if the source of a quantized folder is not known."""
        with self.opening:
            if self.opened is None:
                if self.opens is None:
                    raise InputError("this folder does not hold its source: pass reference=... to load")
                self.opened = self.opens(scheme)
            return self.opened


def paired(prompts: Iterable[Prompt], responses: Responses) -> Asked:
    """Return each prompt with its responses. Neighbours with the same prompt are put together, so that it is tokenized
    once.

    Raises InputError unless both are lists of one length.
    """
    texts = responses_of(responses)
    asked = prompts if isinstance(prompts, str) else items(prompts, "prompts must be a list")
    if isinstance(asked, str) or len(asked) != len(texts):
        found = "one string" if isinstance(asked, str) else f"{len(asked)} prompts"
        raise InputError(f"prompts and responses must be lists of one length, found {found} and {len(texts)} responses")
    grouped: Asked = []
    for prompt, text in zip(asked, texts, strict=True):
        turns = turns_of(prompt)
        if grouped and grouped[-1][0] == turns:
            grouped[-1][1].append(text)
        else:
            grouped.append((turns, [text]))
    return grouped
