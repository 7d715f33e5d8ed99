"""Which number of a model is the reward: its score, one of its attributes, or one number of its steps' scores.

A loaded model says so itself if it was loaded with label, weights or reduce. Here the choice is made for one caller, so
that one loaded model can give several rewards.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lightrm.engine.step_scores import REDUCERS
from lightrm.errors import InputError
from lightrm.scorer import RewardModel
from lightrm.text.conversation import together, turns_of
from lightrm.text.templates import Turn


class RewardChoice:
    """Gives one number for each answer.

    rm: the model. label: the attribute that is the reward. reduce: how one number is made of the scores of steps.
    """

    def __init__(self, rm: RewardModel, label: str | None = None, reduce: str | None = None) -> None:
        """Raises InputError where the choice does not fit the model, or the model needs one; TokenizerError for a model
        that scores no text."""
        self.rm, self.steps, head = rm, rm.text.steps, rm.engine.head
        self.column: int | None = None
        self.reduce = ""
        if self.steps is None:
            rm.text.check()
            if reduce is not None:
                raise InputError("reduce is for process reward models; this one gives one score to a whole answer")
        else:
            self.reduce = step_reducer(reduce or self.steps.reduce)
        if label is not None:
            if label not in rm.attributes:
                has = ", ".join(map(repr, rm.attributes)) or "a single output"
                raise InputError(f"the model has no attribute {label!r}; it has {has}")
            self.column = rm.attributes.index(label)
        elif head.undecided:
            raise InputError(
                f"this model gives several attributes and no score: pass label= one of "
                f"{', '.join(map(repr, rm.attributes))}, or load it with weights="
            )

    def wordless(self, answer: str) -> bool:
        """Whether an answer has no step, so that a process reward model has nothing to score."""
        return self.steps is not None and not self.steps.form.blank and not answer.strip()

    def scores(
        self, prompts: Sequence[Sequence[Turn]], answers: Sequence[str], system: str | None = None
    ) -> np.ndarray:
        """Return one number for each prompt with its answer, float32 (n,), in input order.

        Answers to equal prompts are put together, wherever they stand, so that their prompt is tokenized and computed
        once. Errors as in `RewardModel.score`.
        """
        found = np.empty(len(answers), np.float32)
        conversations = [turns_of(prompt, system) for prompt in prompts]
        groups = together([repr(turns) for turns in conversations])
        order = [k for positions in groups for k in positions]
        asked, texts = [conversations[k] for k in order], [answers[k] for k in order]
        if self.column is not None:
            parts = [
                self.rm.score_attributes(conversations[group[0]], [answers[k] for k in group])[:, self.column]
                for group in groups
            ]
            found[order] = np.concatenate(parts) if parts else []
        elif self.steps is not None:
            steps = self.rm.score_steps_batch(asked, [self.steps.form.divided(text) for text in texts])
            found[order] = [REDUCERS[self.reduce](of_steps) for of_steps in steps]
        else:
            found[order] = self.rm.score_batch(asked, texts)
        return found


def step_reducer(name: str | None) -> str:
    """Raises InputError, which names the choices."""
    if name not in REDUCERS:
        choices = ", ".join(map(repr, REDUCERS))
        raise InputError(f"a process reward model gives one reward with reduce= one of {choices}, found {name!r}")
    return name
