"""From prompts with their answers, checked, to a score for each answer: what every call of RewardModel goes through.

Text side and engine are joined here. What a caller passed is checked above, in `scorer`; rankings are made of the
scores in `judge.exact_ranking`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from lightrm.display.progress import Advance, item_progress, token_progress
from lightrm.engine.answer_ids import AnswerIds, of_steps
from lightrm.engine.scoring_engine import ScoreHead, ScoringEngine
from lightrm.engine.step_scores import reducer
from lightrm.errors import InputError
from lightrm.judge.bounds import Bound
from lightrm.judge.exact_ranking import Rankings, exact_rankings, plain_ranking
from lightrm.loading.text_side import TextSide
from lightrm.text.conversation import Asked
from lightrm.text.cutting import warn_of_cuts
from lightrm.text.encoding import Encoded
from lightrm.text.explanation import Explanation
from lightrm.text.templates import Turn

Rescore = Callable[[list[list[int]]], np.ndarray]


class AnswerScores:
    """The scores of one model. progress: show bars, over the texts that are read and the tokens that are scored."""

    def __init__(self, text: TextSide, engine: ScoringEngine) -> None:
        self.text, self.engine = text, engine

    def ids(self, asked: Asked, progress: bool, stacklevel: int = 4) -> AnswerIds:
        """Return the ids of each answer, cut to the model's limit; warns once if any was cut.

        stacklevel: of the caller whose texts they are, counted from the warning. Errors as in `RewardModel.score`.
        """
        with item_progress(sum(len(texts) for _, texts in asked), "texts read", progress) as advance:
            if (steps := self.text.steps) is not None:
                reduce = reducer(steps.reduce)
                return of_steps([one for turns, texts in asked for one in self.in_steps(turns, texts, advance)], reduce)
            encoded = [one for turns, texts in asked for one in self.read(turns, texts, advance)]
        return AnswerIds(self.kept(encoded, self.text.side, stacklevel + 1))

    def read(self, turns: list[Turn], texts: list[str], advance: Advance) -> list[Encoded]:
        found = self.text.encode(turns, texts)
        advance(len(texts))
        return found

    def in_steps(self, turns: list[Turn], texts: list[str], advance: Advance) -> Iterator[list[list[int]]]:
        assert self.text.steps is not None
        for text in texts:
            yield self.text.steps.encode(turns, self.text.steps.form.divided(text))
            advance(1)

    def kept(self, encoded: Sequence[Encoded], side: str, stacklevel: int) -> list[list[int]]:
        """Return the ids of some texts; warns once if any was cut. side: where."""
        warn_of_cuts([e.cut for e in encoded], self.text.max_length, side, stacklevel)
        return [e.token_ids for e in encoded]

    def of_sequences(
        self, sequences: Sequence[Sequence[int]], progress: bool, head: ScoreHead | None = None
    ) -> np.ndarray:
        """Return what the engine gives for token ids, float32, in input order. head: another than the engine's own."""
        read = self.text.read(sequences)
        with token_progress(sum(map(len, read)), progress) as advance:
            return self.engine.all_scores(read, advance, head)

    def of(self, ids: AnswerIds, progress: bool) -> np.ndarray:
        """Return a score for each answer, float32, in input order."""
        return ids.made(self.of_sequences(ids.sequences, progress))

    def as_computed(self, ids: AnswerIds, progress: bool) -> Iterator[tuple[int, float]]:
        """Yield the position and the score of each answer as soon as it is computed, in no order."""
        read = self.text.read(ids.sequences)
        with token_progress(sum(map(len, read)), progress) as advance:
            yield from ids.settled(self.engine.scores(read, advance))

    def explained(self, turns: list[Turn], text: str, progress: bool) -> Explanation:
        """Return one score with the text, ids and pieces behind it. A text that was cut says so, without a warning."""
        if (steps := self.text.steps) is None:
            (encoded,) = self.text.encode(turns, [text])
            (score,) = self.of_sequences([encoded.token_ids], progress)
            return self.text.explain(turns, text, encoded, float(score))
        reduce, parts = reducer(steps.reduce), steps.form.divided(text)
        written, ids = steps.written(turns, parts)
        scores = self.of_sequences(ids, progress)
        pieces = [steps.tokens.piece(i) for i in ids[-1]]
        name = f"of steps: {steps.form.name}, {steps.reduce} of theirs"
        score = float(np.float32(reduce(scores)))
        return Explanation(written, ids[-1], pieces, 0, name, score, tuple(zip(parts, scores.tolist(), strict=True)))

    def rankings(
        self, asked: Asked, known: Bound | None, confidence: float, rescore: Rescore, progress: bool
    ) -> Rankings:
        """Return each prompt's answers, best first. known: the bound of exact rankings, None for the order of this
        model's own scores. rescore: token ids -> scores in full precision."""
        if known is not None and self.text.steps is not None:
            raise InputError("exact rankings are for models with one score; this one scores steps")
        ids = self.ids(asked, progress, stacklevel=6)
        texts = [some for _, some in asked]
        starts = np.cumsum([0, *map(len, texts)])
        quick = np.split(self.of(ids, progress), starts[1:-1]) if texts else []
        if known is None:
            return Rankings(plain_ranking(*one) for one in zip(quick, texts, strict=True))
        read = self.text.read(ids.sequences)

        def sequences(answers: Sequence[tuple[int, int]]) -> list[list[int]]:
            return [read[starts[k] + i] for k, i in answers]

        return exact_rankings(
            quick, texts, known, confidence,
            rescore=lambda answers: rescore(sequences(answers)).tolist(),
            tokens=lambda answers: self.engine.distinct_tokens(sequences(answers)),
        )  # fmt: skip
