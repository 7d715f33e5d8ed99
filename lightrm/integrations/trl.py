"""TRL's GRPOTrainer and RLOOTrainer: a reward function of a model. TRL itself is not imported.

Read in TRL 1.16 (`GRPOTrainer._calculate_rewards`, the same in RLOO): the trainer calls

    reward_func(prompts=..., completions=..., completion_ids=..., trainer_state=..., log_extra=..., log_metric=...,
                and each column of the data set as a list)

with lists of one length, and reads a list of floats, in which None says that a completion is not scored. Prompts and
completions are strings, or lists of turns if the data set is conversational. `__name__` names the metric.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightrm.errors import InputError
from lightrm.integrations.reward_choice import RewardChoice
from lightrm.opening import load
from lightrm.scorer import RewardModel
from lightrm.text.columns import items, kind
from lightrm.text.conversation import CALLS, content_of, text_of, turn_of, turns_of
from lightrm.text.templates import Turn, said

Text = str | Iterable[Mapping[str, Any]]  # a prompt or a completion, as TRL hands it over
FORM = "TRL hands over a list of strings, or of lists of turns"


class RewardFunction:
    """What `reward_function` returns. Called by the trainer's main thread, or by any other."""

    def __init__(self, choice: RewardChoice, name: str, system: str | None, templated: bool) -> None:
        """name: of the metric."""
        self.choice, self.system, self.templated = choice, system, templated
        self.__name__ = name

    def __call__(self, prompts: Iterable[Text], completions: Iterable[Text], **columns: object) -> list[float | None]:
        """Return the reward of each completion, in order; None where there is nothing to score.

        columns: what else TRL hands over, and the data set's columns; not read. Raises InputError on prompts and
        completions that are not as TRL hands them over, TemplateError if the model's template cannot express them.
        """
        asked, given = items(prompts, FORM), items(completions, FORM)
        if len(asked) != len(given):
            raise InputError(f"found {len(asked)} prompts and {len(given)} completions: {FORM}, both of one length")
        if self.templated:
            texts = [joined(prompt, answer, k) for k, (prompt, answer) in enumerate(zip(asked, given, strict=True))]
            return [float(score) for score in self.choice.rm.score_text(texts)] if texts else []
        split = [parted(prompt, answer, k) for k, (prompt, answer) in enumerate(zip(asked, given, strict=True))]
        found: list[float | None] = [None] * len(split)
        scored = [k for k, one in enumerate(split) if one is not None and not self.choice.wordless(one[1])]
        pairs = [one for k in scored if (one := split[k]) is not None]
        scores = self.choice.scores([turns for turns, _ in pairs], [answer for _, answer in pairs], self.system)
        for k, score in zip(scored, scores.tolist(), strict=True):
            found[k] = score
        return found

    def __repr__(self) -> str:
        return f"RewardFunction({self.__name__}, {self.choice.rm})"


def reward_function(
    model: RewardModel | str | os.PathLike[str],
    *,
    label: str | None = None,
    reduce: str | None = None,
    system: str | None = None,
    templated: bool = False,
    name: str | None = None,
) -> RewardFunction:
    """Return a reward function for TRL's `reward_funcs`, in GRPOTrainer and RLOOTrainer.

    model: a loaded model, or what `lightrm.load` takes. Load it yourself to set a scheme, a device or the memory; the
    policy and the reward model share a card's memory.
    label: the attribute that is the reward, of a model with several; one loaded model may serve several functions.
    reduce: "min", "product", "last" or "mean" of a process reward model's scores of steps.
    system: as in `RewardModel.score`.
    templated: prompts are strings that a chat template made; prompt and completion are scored as one text, in which
    special tokens act (`RewardModel.score_text`).
    name: of the metric `rewards/<name>/mean`; None takes the model's, with the label.

    Of a completion in turns the last one is the answer, and earlier turns belong to the prompt. Its content is scored,
    without the reasoning that TRL parsed out of it. The reward is None where the last turn calls a tool or is a tool's,
    or where a process reward model finds no step. A prompt that ends in the beginning of an answer is joined to it.

    Raises InputError if label or reduce do not fit the model or it needs one of them, or a process reward model or a
    label is asked for with templated=True; otherwise as `lightrm.load`.
    """
    rm = model if isinstance(model, RewardModel) else load(model)
    choice = RewardChoice(rm, label, reduce)
    if templated and (choice.steps is not None or label is not None):
        raise InputError("templated=True is for models with one score: leave it out, and pass prompts as turns")
    shown = name or named(rm) + (f".{label}" if label is not None else "")
    return RewardFunction(choice, shown, system, templated)


def named(rm: RewardModel) -> str:
    """Return the last part of a model's folder or hub id."""
    folder = rm.checkpoint.folder.resolve()
    if folder.parent.name == "snapshots":  # the hub's cache: models--OWNER--NAME/snapshots/COMMIT
        folder = folder.parent.parent
    return folder.name.rpartition("--")[2]


def joined(prompt: object, completion: object, k: int) -> str:
    """Return prompt and completion as one text. Raises InputError unless both are strings."""
    return text_of(prompt, f"prompt {k}, with templated=True,") + text_of(completion, f"completion {k}")


def parted(prompt: Text, completion: Text | None, k: int) -> tuple[list[Turn], str] | None:
    """Return the conversation that is answered, and the answer; None if the completion holds no answer."""
    if completion is None:
        return None
    asked: Sequence[Any] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else items(prompt, FORM)
    begun = ""
    if asked and isinstance(asked[-1], Mapping) and asked[-1].get("role") == "assistant":
        begun, asked = text_said(asked[-1], f"the last turn of prompt {k}"), asked[:-1]
    if isinstance(completion, str):
        return turns_of(asked), begun + completion
    if not isinstance(completion, Iterable):
        raise InputError(f"completion {k} must be a string or a list of turns, found {kind(completion)}")
    turns = items(completion, f"completion {k} must be a string or a list of turns")
    if not turns:
        return None
    if begun and len(turns) > 1:
        raise InputError(f"prompt {k} ends in the beginning of an answer, and its completion has {len(turns)} turns")
    last = turns[-1]
    if not isinstance(last, Mapping) or last.get("role") not in ("assistant", "tool"):
        raise InputError(f"the last turn of completion {k} must be an assistant's or a tool's, found {kind(last)}")
    if last["role"] == "tool" or any(last.get(name) for name in CALLS) or last.get("content") is None:
        return None
    answer = begun + text_said(last, f"the last turn of completion {k}")
    return between(asked, turns[:-1]), answer


def between(asked: Sequence[Any], earlier: Sequence[Any]) -> list[Turn]:
    """Return a prompt and the turns of its completion before the answer: calls of tools, and what they gave."""
    return turns_of([*asked, *(turn_of(turn, "a completion's turn") for turn in earlier)])


def text_said(turn: Mapping[str, Any], what: str) -> str:
    """Return a turn's content as text."""
    return said({"role": "assistant", "content": content_of(turn["content"], what)})
