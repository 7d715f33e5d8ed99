"""What sentence-transformers' evaluators of cross-encoders call on a model, in their own words.

`CrossEncoderRerankingEvaluator(samples)(rm)` works, and so do the evaluators of correlation and of classification. They
call `predict`, read `num_labels`, and report to `model_card_data`. Nothing is imported from sentence-transformers, and
nothing is known here of how a score is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from lightrm.answer_scores import AnswerScores
from lightrm.errors import InputError
from lightrm.loading.options import positive
from lightrm.text.columns import items, kind
from lightrm.text.conversation import Prompt, Response, asked_once

Pair = tuple[Prompt, Response]
EXPECTED = "expected a list of (prompt, response) pairs"


class ReportedMetrics:
    """What evaluators reported of a model, as they find it under `model_card_data`. metrics: by evaluator, in order."""

    def __init__(self) -> None:
        self.metrics: dict[str, dict[str, float]] = {}

    def set_evaluation_metrics(
        self, evaluator: Any, metrics: Mapping[str, float], epoch: int = 0, step: int = 0
    ) -> None:
        """Keep the metrics of an evaluator. epoch, step: of a training, of which there is none."""
        named = " ".join(part for part in (type(evaluator).__name__, getattr(evaluator, "name", "")) if part)
        self.metrics[named] = dict(metrics)


class EvaluatedAsCrossEncoder:
    """The calls, for RewardModel to have."""

    _answers: AnswerScores

    @property
    def num_labels(self) -> int:
        """1: `predict` gives one score a pair."""
        return 1

    @cached_property
    def model_card_data(self) -> ReportedMetrics:
        """What evaluators of sentence-transformers reported."""
        return ReportedMetrics()

    def predict(
        self,
        pairs: Iterable[Pair],
        *,
        progress: bool = False,
        show_progress_bar: bool | None = None,
        batch_size: int | None = None,
        prompt_name: str | None = None,
        convert_to_numpy: bool = True,
    ) -> np.ndarray:
        """Score n pairs of a prompt and a response, as sentence-transformers' `CrossEncoder.predict`; float32 (n,), raw
        scores in input order.

        progress, or show_progress_bar: show a bar over the tokens. batch_size changes nothing, since packs are filled
        to `token_budget` whatever is passed. prompt_name must be None, and convert_to_numpy True. These four are what
        the evaluators pass. Errors as in `score`.
        """
        if prompt_name is not None:
            raise InputError(
                f"prompt_name={prompt_name!r}: lightrm has no prompts by name; load(system=...), or a system turn in "
                "the prompt, says what stands before it"
            )
        if not convert_to_numpy:
            raise InputError("convert_to_numpy=False: scores are a numpy array; torch.from_numpy makes a tensor of it")
        if batch_size is not None:
            positive("batch_size", batch_size)
        shown = progress or bool(show_progress_bar)
        return self._answers.of(self._answers.ids(asked_once(*divided(pairs)), shown), shown)


def divided(pairs: Iterable[Pair]) -> tuple[list[Prompt], list[Response]]:
    """Return the prompts and the responses. Raises InputError for anything else than a list of pairs."""
    prompts, responses = [], []
    for k, pair in enumerate(items(pairs, EXPECTED)):
        parts = [] if isinstance(pair, str) else items(pair, f"pair {k} must be (prompt, response)")
        if len(parts) != 2:
            raise InputError(f"pair {k} must be (prompt, response), found {kind(pair)}; one pair is a list of one")
        prompts.append(parts[0])
        responses.append(parts[1])
    return prompts, responses
