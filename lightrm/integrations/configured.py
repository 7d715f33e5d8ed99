"""The model that a trainer's process scores with, when the trainer knows only the name of a function.

The environment says which:

    LIGHTRM_MODEL       a folder, a hub id, or "demo"
    LIGHTRM_OPTIONS     options of `lightrm.load`, a JSON object: {"scheme": "w8a8", "reduce": "min"}
    LIGHTRM_LABEL       the attribute that is the reward, of a model with several
    LIGHTRM_TEXTS       "templated": prompt and answer are one text, in which special tokens act; "plain": they are what
                        somebody wrote, and the model's own template is put around them
    LIGHTRM_ANSWER_END  what the policy closes an answer with, such as "<|im_end|>": taken off before a plain answer is
                        scored

A process loads each model once, however many threads ask for it. Rewards that wait are computed together.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from lightrm.errors import InputError
from lightrm.integrations.gathering import Gathered
from lightrm.integrations.load_arguments import checked, load_with, read_options
from lightrm.integrations.reward_choice import RewardChoice
from lightrm.text.conversation import Prompt, response_of, text_of, turns_of
from lightrm.text.templates import Turn

TEXTS = ("templated", "plain")


@dataclass(frozen=True, slots=True)
class Plain:
    """A conversation and an answer, as somebody wrote them."""

    turns: list[Turn]
    answer: str


Asked = str | Plain  # a string is a text that a template made


@dataclass(frozen=True, slots=True)
class Configured:
    """What the environment or a trainer's config says. texts: of TEXTS, or "" where nobody said."""

    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    label: str | None = None
    texts: str = ""
    answer_end: str = ""

    def rewards(self, asked: Sequence[Asked]) -> list[float]:
        """Return the rewards of some answers, when all are there. Raises what scoring the first bad one raised."""
        futures = self.gathered().ask(asked)
        return [future.result() for future in futures]

    def gathered(self) -> Gathered[Asked]:
        """Return what computes this model's rewards in this process."""
        return MODELS.of(self)

    def plain(self, prompt: Prompt, answer: str) -> Plain:
        """Return a prompt and an answer, without what closes it. Raises InputError on anything that is not text."""
        return Plain(turns_of(prompt), response_of(answer, "the answer").removesuffix(self.answer_end))


def from_environment(environment: Mapping[str, str] | None = None) -> Configured:
    """Read the environment, of this process if None. Raises InputError, which names the variable."""
    given = os.environ if environment is None else environment
    model = given.get("LIGHTRM_MODEL", "")
    if not model:
        raise InputError("LIGHTRM_MODEL is not set: let it name a folder, a hub id, or demo, where the trainer starts")
    texts = given.get("LIGHTRM_TEXTS", "")
    if texts and texts not in TEXTS:
        raise InputError(f"LIGHTRM_TEXTS must be {' or '.join(TEXTS)}, found {texts!r}")
    options = checked(model, read_options(given.get("LIGHTRM_OPTIONS") or "{}", "LIGHTRM_OPTIONS"))
    return Configured(model, options, given.get("LIGHTRM_LABEL") or None, texts, given.get("LIGHTRM_ANSWER_END", ""))


def opens(configured: Configured) -> Callable[[], Callable[[list[Asked]], list[float]]]:
    """Return a function that loads the model and gives what scores with it."""

    def open_scores() -> Callable[[list[Asked]], list[float]]:
        choice = RewardChoice(load_with(configured.model, configured.options), configured.label)
        return lambda asked: scores(choice, asked)

    return open_scores


def scores(choice: RewardChoice, asked: Sequence[Asked]) -> list[float]:
    """Return the rewards of texts and of answers, in input order. Raises InputError if a text is to be scored by an
    attribute, or by a process reward model."""
    found = [0.0] * len(asked)
    texts = [(k, text_of(one, "the text")) for k, one in enumerate(asked) if isinstance(one, str)]
    plain = [(k, one) for k, one in enumerate(asked) if isinstance(one, Plain)]
    if texts and choice.column is not None:
        raise InputError("templated texts have no label: load the model with label=, or set LIGHTRM_TEXTS=plain")
    if texts:
        for (k, _), score in zip(texts, choice.rm.score_text([text for _, text in texts]).tolist(), strict=True):
            found[k] = score
    if plain:
        of_plain = choice.scores([one.turns for _, one in plain], [one.answer for _, one in plain])
        for (k, _), score in zip(plain, of_plain.tolist(), strict=True):
            found[k] = score
    return found


class LoadedModels:
    """The models of this process, each of them loaded once."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._models: dict[tuple[str, ...], Gathered[Asked]] = {}

    def of(self, configured: Configured) -> Gathered[Asked]:
        """Return a model's rewards; it is loaded when the first one is asked for."""
        options = json.dumps(dict(configured.options), sort_keys=True, default=str)
        key = (configured.model, options, configured.label or "")
        with self._lock:
            if key not in self._models:
                self._models[key] = Gathered(opens(configured))
            return self._models[key]


MODELS = LoadedModels()
