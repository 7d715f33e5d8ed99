"""slime: the function that `--custom-rm-path` names. slime itself is not imported.

Read in slime (`slime/rollout/rm_hub/__init__.py`): it awaits

    custom_rm(args, sample)            a float
    custom_rm(args, samples)           a list of floats, with --group-rm

sample.prompt: a string or turns; with --apply-chat-template a string that the policy's template made. sample.response:
the answer, with the token that ends it unless --rollout-skip-special-tokens is given.
`lightrm.integrations.configured` says which model scores.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

from lightrm.errors import InputError
from lightrm.integrations.configured import Asked, Configured, from_environment
from lightrm.text.columns import kind
from lightrm.text.conversation import text_of


class Sample(Protocol):
    """What is read of slime's sample."""

    @property
    def prompt(self) -> Any: ...
    @property
    def response(self) -> str: ...


async def custom_rm(args: object, sample: Sample | Sequence[Sample], **others: object) -> float | list[float]:
    """Return the reward of a sample, or those of a list of samples.

    A prompt in turns is scored by the model's own template, without LIGHTRM_ANSWER_END in the answer. A prompt that is
    a string is scored as one text with the answer if args.apply_chat_template is set, else as what somebody wrote;
    LIGHTRM_TEXTS overrides that. others: not read. Raises InputError on anything else, otherwise as
    `RewardModel.score_text` and `score`.
    """
    configured = from_environment()
    policy = "templated" if getattr(args, "apply_chat_template", False) else "plain"
    templated = (configured.texts or policy) == "templated"
    samples = list(sample) if isinstance(sample, list | tuple) else [sample]
    futures = configured.gathered().ask([read(configured, one, templated) for one in samples])
    found = await asyncio.gather(*map(asyncio.wrap_future, futures))
    return list(found) if isinstance(sample, list | tuple) else found[0]


def read(configured: Configured, sample: Any, templated: bool) -> Asked:
    """Return what is scored. Raises InputError."""
    if not hasattr(sample, "prompt") or not hasattr(sample, "response"):
        raise InputError(f"a sample must have a prompt and a response, found {kind(sample)}")
    if templated and isinstance(sample.prompt, str):
        return text_of(sample.prompt, "sample.prompt") + text_of(sample.response, "sample.response")
    return configured.plain(sample.prompt, sample.response)
