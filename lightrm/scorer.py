"""RewardModel: score and rank. Checks what a caller passed, and does no arithmetic of its own: `answer_scores` does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from lightrm.answer_scores import AnswerScores
from lightrm.checkpoints.checkpoint import Checkpoint
from lightrm.checkpoints.model_files import ModelFiles
from lightrm.cross_encoder import EvaluatedAsCrossEncoder
from lightrm.display.sizes import size_text
from lightrm.engine.engine import Engine
from lightrm.engine.scoring_engine import ScoreHead, ScoringEngine
from lightrm.engine.step_scores import StepScorer, steps_of, steps_of_each
from lightrm.engine.token_ids import checked_ids
from lightrm.errors import CopyError, InputError, SchemeError
from lightrm.judge.bounds import CONFIDENCE, Bound, bound_for
from lightrm.judge.exact_ranking import Ranking, Rankings
from lightrm.loading import quantized_folder
from lightrm.loading.opened_once import OpenedOnce
from lightrm.loading.options import positive
from lightrm.loading.placement import Loaded, LoadReport
from lightrm.loading.text_side import TextSide
from lightrm.model.head import ValueHead
from lightrm.text.columns import items
from lightrm.text.conversation import (
    Asked,
    Prompt,
    Response,
    Responses,
    asked_often,
    asked_once,
    responses_of,
    texts_of,
    turns_of,
)  # fmt: skip
from lightrm.text.explanation import Explanation
from lightrm.text.templates import AnyTemplate


class RewardModel(EvaluatedAsCrossEncoder):
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
        head: ScoreHead | None = None,
    ) -> None:
        """reference: opens the same model in another scheme, for exact rankings. head: with all attributes, where the
        engine's gives one score of them."""
        self.checkpoint, self.engine, self.report, self.text = checkpoint, engine, report, text
        self._head = engine.head if head is None else head
        self._steps = None if text.steps is None else StepScorer(text.steps, native(self)[1])
        self._answers = AnswerScores(text, engine)
        self._reference = OpenedOnce(reference)

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

    def score(
        self, prompt: Prompt, responses: Responses, *, system: str | None = None, progress: bool = False
    ) -> np.ndarray:
        """Score n responses to one prompt.

        prompt: a string, or {"role", "content"} turns that end in a user turn. responses: strings or assistant turns.
        Lists may be arrays, columns or generators. system: a system turn to put before the prompt, which then may not
        have its own; None takes that of `load`, if the prompt has none. progress: show a bar over the tokens. Returns
        float32 (n,), raw scores in input order.

        Raises InputError on anything that is not text, TooLongError in strict mode, TemplateError if the template
        cannot express the conversation. A process reward model needs `reduce`, a model with several attributes `label`
        or `weights`, when it is loaded.
        """
        ids = self._answers.ids([(turns_of(prompt, system), responses_of(responses))], progress)
        return self._answers.of(ids, progress)

    def score_batch(
        self, prompts: Iterable[Prompt], responses: Responses, *, system: str | None = None, progress: bool = False
    ) -> np.ndarray:
        """Score one response to each of n prompts; float32 (n,), in input order. Options and errors as in `score`."""
        return self._answers.of(self._answers.ids(asked_once(prompts, responses, system), progress), progress)

    def score_text(self, texts: Iterable[str], *, progress: bool = False) -> np.ndarray:
        """Score n texts that a chat template already made, prompt and answer in one; float32 (n,), in input order.

        Every special token that a text spells acts, so what users wrote in it is trusted: `score` is the method that
        does not trust it. BOS, and EOS if the tokenizer adds one, are put around a text that does not have them; then
        comes what the model's own code puts at the end of every text. Too long a text is cut as in `score`.

        Raises InputError on anything that is not text, TooLongError in strict mode, TokenizerError without a tokenizer.
        """
        encoded, side = self.text.encode_templated(texts_of(texts))
        return self._answers.of_sequences(self._answers.kept(encoded, side, stacklevel=4), progress)

    def score_steps(
        self, prompt: Prompt, steps: Iterable[str] | Iterable[Iterable[str]], *, progress: bool = False
    ) -> np.ndarray | list[np.ndarray]:
        """Score each step of an answer, by a process reward model.

        steps: a list of strings is one answer, and gives float32 (steps,); a list of such lists is several answers to
        the prompt, and gives a list of arrays. Scores are probabilities. Nothing is cut. Raises InputError for another
        model or anything that is not text, TooLongError, TemplateError or TokenizerError.
        """
        (answers, several), turns = steps_of(steps), turns_of(prompt)
        found = self._process().score([(turns, answer) for answer in answers], progress)
        return found if several else found[0]

    def score_steps_batch(
        self, prompts: Iterable[Prompt], answers: Iterable[Iterable[str]], *, progress: bool = False
    ) -> list[np.ndarray]:
        """Score the steps of one answer to each of n prompts: a list of n arrays. Errors as in `score_steps`."""
        given = items(prompts, "prompts must be a list")
        asked = [turns_of(prompt, None, f"prompt {k}") for k, prompt in enumerate(given)]
        steps = steps_of_each(answers)
        if len(asked) != len(steps):
            raise InputError(f"prompts and answers must be of one length, found {len(asked)} and {len(steps)}")
        return self._process().score(list(zip(asked, steps, strict=True)), progress)

    @property
    def attributes(self) -> tuple[str, ...]:
        """The names of a model's attributes, in order; empty for a model with one output."""
        return self._head.names

    def score_attributes(
        self, prompt: Prompt, responses: Responses, *, system: str | None = None, progress: bool = False
    ) -> np.ndarray:
        """Return every attribute of n responses to one prompt, float32 (n, k), in the order of `attributes`. Raises
        InputError for a model without attributes, otherwise as `score`."""
        if not self.attributes:
            raise InputError("this model has a single output, and no attributes: use score")
        ids = self._answers.ids([(turns_of(prompt, system), responses_of(responses))], progress)
        return self._answers.of_sequences(ids.sequences, progress, self._head.attributes())

    def score_ids(self, sequences: Sequence[Sequence[int]], *, progress: bool = False) -> np.ndarray:
        """Score n sequences of token ids as they are: no template, no BOS, nothing cut; float32 (n,).

        Raises InputError on an empty sequence, an id outside the vocabulary, or more tokens than positions.
        """
        return self._answers.of_sequences(checked_ids(sequences, self.engine.architecture), progress)

    def stream(
        self, prompts: Iterable[Prompt], responses: Responses, *, system: str | None = None, progress: bool = False
    ) -> Iterator[tuple[int, float]]:
        """As `score_batch`, but yields the position and the score of each response as soon as its pack is done, in no
        order."""
        yield from self._answers.as_computed(
            self._answers.ids(asked_once(prompts, responses, system), progress), progress
        )

    def rank(
        self,
        prompt: Prompt,
        responses: Responses,
        *,
        top_k: int | None = None,
        return_documents: bool = True,
        system: str | None = None,
        exact: bool = False,
        confidence: float = CONFIDENCE,
        bound: float | Bound | None = None,
        progress: bool = False,
    ) -> Ranking:
        """Return the responses, best first; equal scores keep their input order. Options as for `rank_batch`."""
        asked = asked_often([prompt], [responses], system)
        return self._ranked(asked, top_k, return_documents, exact, confidence, bound, progress)[0]

    def rank_batch(
        self,
        prompts: Iterable[Prompt],
        responses: Iterable[Responses],
        *,
        top_k: int | None = None,
        return_documents: bool = True,
        system: str | None = None,
        exact: bool = False,
        confidence: float = CONFIDENCE,
        bound: float | Bound | None = None,
        progress: bool = False,
    ) -> Rankings:
        """Return each prompt's responses, best first.

        top_k: how many of them, the best; None returns all. All are scored.
        return_documents: False leaves the texts out, as `CrossEncoder.rank` does; each `response` is then empty.
        system: as in `score`.
        exact: rank in the order of full precision. Answers whose quick scores are close to each other are scored again
        by the reference, the same model in full precision, which is loaded the first time.
        confidence: probability that this gives the right order of all answers, for a further prompt like those that
        were measured. The higher it is, the more answers are scored again.
        bound: a report's bound, or the distance in raw scores, 0 or more, up to which two scores are too close. None
        takes what `lightrm fidelity` measured of the folder.
        progress: show a bar over the tokens.

        The result's `effort` says how much was scored again, and the confidence that the bound allows: lower if few
        prompts with as many answers were measured, 0 for a bound that is a number.

        Raises InputError if the lists do not match, top_k is not positive, confidence is not between 0 and 1, the bound
        is not such a number, a bound is given without exact=True, or none is known; otherwise as `score`.
        """
        asked = asked_often(prompts, responses, system)
        return self._ranked(asked, top_k, return_documents, exact, confidence, bound, progress)

    def explain(
        self, prompt: Prompt, response: Response, *, system: str | None = None, progress: bool = False
    ) -> Explanation:
        """Return one score with the text, ids and pieces behind it; by a process reward model also the score of each
        step. Options and errors as in `score`."""
        turns, (text,) = turns_of(prompt, system), responses_of([response])
        return self._answers.explained(turns, text, progress)

    def encode(
        self, prompts: Iterable[Prompt], responses: Responses, *, system: str | None = None, progress: bool = False
    ) -> list[list[int]]:
        """Return the token ids of each prompt with its response, cut to `max_length`; warns once if any was cut.

        By a process reward model with `reduce` they end where the last step is read. progress: show a bar over the
        texts. Other options and errors as in `score`.
        """
        return self._answers.ids(asked_once(prompts, responses, system), progress).whole

    def save(self, folder: str | os.PathLike[str], *, progress: bool = False) -> None:
        """Write the model as a quantized folder, which `lightrm.load` reads quickly. progress: show a bar over the
        tensors.

        Raises CheckpointError if the folder exists, SchemeError unless the scheme is w8a8, w4a8 or w4a16, which models
        that run through transformers do not have.
        """
        template = self.template.name if self.template is not None else None
        checkpoint, engine = native(self)
        assert isinstance(self._head, ValueHead)
        loaded = Loaded(engine.decoder, self._head, self.report)
        quantized_folder.write(Path(folder), checkpoint, loaded, template, progress)

    def _ranked(
        self,
        asked: Asked,
        top_k: int | None,
        texts: bool,
        exact: bool,
        confidence: float,
        bound: float | Bound | None,
        progress: bool,
    ) -> Rankings:
        """As `rank_batch`. texts: whether the result has the responses."""
        if bound is not None and not exact:
            raise InputError("bound says which answers are scored again, which exact=True asks for: pass both or none")
        most = None if top_k is None else positive("top_k", top_k)
        known = bound_for(bound, confidence, self.report.fidelity, self.report.scheme.name) if exact else None
        found = self._answers.rankings(
            asked, known, confidence, lambda ids: self._exact()._answers.of_sequences(ids, progress), progress
        )
        return found.shown(most, texts)

    def _process(self) -> StepScorer:
        """Raises InputError unless this is a process reward model that can read text."""
        if self._steps is None:
            other = "this is no process reward model: it scores whole answers, by score"
            raise InputError(self.text.missing if self.checkpoint.layout.steps else other)
        return self._steps

    def _exact(self) -> RewardModel:
        """Return the same model in the precision that its fidelity was measured against."""
        note = self.report.fidelity
        return self._reference.model("fp32" if note is None else note.reference)

    def __repr__(self) -> str:
        template = str(self.template) if self.template is not None else "none: score_ids only"
        template = f"of steps: {self.text.steps.form.name}" if self.text.steps is not None else template
        if self.text.system is not None:
            template += f", system {self.text.system!r:.60}"
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


def native(rm: RewardModel) -> tuple[Checkpoint, Engine]:
    """Return the files and the engine of a model that lightrm's own decoder runs. Raises SchemeError for any other."""
    if not isinstance(rm.checkpoint, Checkpoint) or not isinstance(rm.engine, Engine):
        raise SchemeError(
            f"{rm.checkpoint.layout.name} runs in transformers, not in lightrm's own decoder, whose layers this needs"
        )
    return rm.checkpoint, rm.engine
