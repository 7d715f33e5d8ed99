"""Ray Data: a class for `map_batches`. Ray itself is not imported; the class works on any batch of columns.

    ds.map_batches(Scorer, fn_constructor_kwargs={"model": ..., "options": {...}}, compute=ActorPoolStrategy(size=2))

Each actor makes one Scorer, which loads the model once. Lists come as arrays, turns as arrays or lists of dictionaries;
a field that not all turns have is None where it is missing (Ray 2.60).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, TypeVar

from lightrm.errors import InputError, LightRMError
from lightrm.integrations.column_batches import column, names_of, with_numbers, with_texts
from lightrm.integrations.load_arguments import Options, load_with
from lightrm.integrations.reward_choice import RewardChoice
from lightrm.text.columns import items
from lightrm.text.conversation import response_of, turns_of
from lightrm.text.templates import Turn

Batch = TypeVar("Batch")
Row = tuple[list[Turn], list[str]]  # a conversation with its answers


class Scorer:
    """Adds a column of scores to a batch: a dictionary of numpy arrays, a pandas data frame or a pyarrow table.

    A score does not depend on the batch, the number of actors or the machine's other work: with an integer scheme it is
    the score of one process, bit for bit.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        options: Options | None = None,
        *,
        prompt: str | None = "prompt",
        response: str = "response",
        responses: str | None = None,
        output: str | None = None,
        errors: str | None = None,
        label: str | None = None,
    ) -> None:
        """Load the model, on the GPU that Ray gives to this actor, or on the CPU.

        model: a folder, a hub id or "demo". options: of `lightrm.load`, such as {"scheme": "w8a8", "reduce": "min"}.
        prompt: the column of prompts, strings or turns; None if the answers' column holds whole conversations, whose
        last turn is the answer.
        response: the column with one answer a row. responses: the column with a list of answers a row; it is read
        instead.
        output: the new column; None: "score", or "scores" for lists.
        errors: a new column that says what is wrong with a row, or None. Such a row has NaN for a score, or None for
        its list of scores, and all other rows are scored. Without this column, a bad row is an error.
        label: the attribute that is the score, of a model with several.

        Raises InputError if one column is named twice, or the choice does not fit the model; otherwise as
        `lightrm.load`.
        """
        self.prompt, self.errors = prompt, errors
        self.answers, self.several = (response, False) if responses is None else (responses, True)
        self.output = output or ("scores" if self.several else "score")
        if prompt is None and self.several:
            raise InputError("prompt=None is for whole conversations, which have one answer: name the prompts' column")
        named = [name for name in (self.prompt, self.answers, self.output, self.errors) if name is not None]
        if len(set(named)) < len(named):
            raise InputError(f"prompt, answers, output and errors must be different columns, found {', '.join(named)}")
        self.choice = RewardChoice(load_with(model, options), label)

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with the scores, and with the column of errors if one was named. The batch that was passed
        stays as it was.

        Raises InputError if a column is missing, or the new one is there already; and for a bad row, as
        `RewardModel.score`, with the row's number.
        """
        there = names_of(batch)
        for name in (self.prompt, self.answers):
            if name is not None and name not in there:
                raise InputError(f"the batch has no column {name!r}: it has {', '.join(there) or 'none'}")
        for name in (self.output, self.errors):
            if name in there:
                raise InputError(f"the batch has a column {name!r} already: pass another name as output= or errors=")
        answers = column(batch, self.answers)
        prompts = [None] * len(answers) if self.prompt is None else column(batch, self.prompt)
        found, wrong = self.scored(list(zip(prompts, answers, strict=True)))
        if self.several:
            scores: Any = found
        else:
            scores = [float("nan") if one is None else one[0] for one in found]
        made = with_numbers(batch, self.output, scores, lists=self.several)
        return made if self.errors is None else with_texts(made, self.errors, wrong)  # type: ignore[no-any-return]

    def scored(self, rows: Sequence[tuple[Any, Any]]) -> tuple[list[list[float] | None], list[str | None]]:
        """Return each row's scores, or None, and what is wrong with it, or None. All rows are computed together; where
        that fails, each by itself. Raises the error of the first bad row if errors have no column."""
        try:
            return list(self.score([self.read(*row) for row in rows])), [None] * len(rows)
        except LightRMError:
            found: list[list[float] | None] = [None] * len(rows)
            wrong: list[str | None] = [None] * len(rows)
            for k, row in enumerate(rows):
                try:
                    (found[k],) = self.score([self.read(*row)])
                except LightRMError as error:
                    if self.errors is None:
                        raise type(error)(f"row {k} of the batch: {error}") from error
                    wrong[k] = str(error)
            return found, wrong

    def read(self, prompt: Any, answer: Any) -> Row:
        """Return what a row asks for. Raises InputError."""
        if self.prompt is None:
            turns = items(answer, "a conversation must be a list of turns")
            if len(turns) < 2:
                raise InputError(f"a conversation must hold a prompt and an answer, found {len(turns)} turns")
            return turns_of(turns[:-1]), [response_of(turns[-1], "the last turn")]
        if not self.several:
            return turns_of(prompt), [response_of(answer, "the response")]
        texts = items(answer, f"column {self.answers!r} must hold lists of answers")
        return turns_of(prompt), [response_of(text, f"response {i}") for i, text in enumerate(texts)]

    def score(self, rows: Sequence[Row]) -> list[list[float]]:
        """Return the scores of each row's answers."""
        turns = [turns for turns, texts in rows for _ in texts]
        found = self.choice.scores(turns, [text for _, texts in rows for text in texts]).tolist()
        starts = accumulate((len(texts) for _, texts in rows), initial=0)
        return [found[start:end] for start, end in pairwise(starts)]
