"""verl: the function that `reward.custom_reward_function` names. verl itself is not imported.

Read in verl 0.9 (`verl/trainer/ppo/reward.py`, `verl/experimental/reward_loop/reward_manager/naive.py`): it calls, in
threads, one sample a call,

    compute_score(data_source=..., solution_str=..., ground_truth=..., extra_info=..., and its reward_kwargs)

solution_str: the answer, without special tokens. The prompt is in extra_info: verl's agent loop puts it there as
"raw_prompt", in turns. It reads a number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightrm.errors import InputError
from lightrm.integrations.configured import Configured, from_environment
from lightrm.integrations.load_arguments import checked
from lightrm.text.columns import kind

PROMPTS = ("raw_prompt", "prompt")  # keys of extra_info


def compute_score(
    data_source: object,
    solution_str: str,
    ground_truth: object,
    extra_info: Mapping[str, Any] | None = None,
    *,
    model: str | None = None,
    options: Mapping[str, Any] | None = None,
    label: str | None = None,
    prompt_key: str | None = None,
    **others: object,
) -> float:
    """Return the score of an answer.

    extra_info: holds the prompt, a string or turns, under prompt_key; None takes "raw_prompt" or "prompt".
    model, options, label: as in `lightrm.load` and `lightrm.integrations.trl.reward_function`; verl passes them from
    `reward.custom_reward_function.reward_kwargs`. Without model, `lightrm.integrations.configured` says which.
    data_source, ground_truth, others: not read.

    Raises InputError if there is no prompt or no model, or on anything that is not text; otherwise as
    `RewardModel.score`.
    """
    if model is None and (options is not None or label is not None):
        raise InputError("options and label are for a model: pass model, or set LIGHTRM_MODEL and its fellows alone")
    configured = from_environment() if model is None else Configured(model, checked(model, options), label)
    (score,) = configured.rewards([configured.plain(prompt_of(extra_info, prompt_key), solution_str)])
    return score


def prompt_of(extra_info: Mapping[str, Any] | None, key: str | None) -> Any:
    """Raises InputError, which says what extra_info holds."""
    if not isinstance(extra_info, Mapping):
        raise InputError(f"extra_info must be a dictionary that holds the prompt, found {kind(extra_info)}")
    for name in PROMPTS if key is None else (key,):
        if extra_info.get(name) is not None:
            return extra_info[name]
    sought = " or ".join(map(repr, PROMPTS if key is None else (key,)))
    has = ", ".join(sorted(map(str, extra_info))) or "nothing"
    raise InputError(
        f"extra_info has no {sought}, only {has}: put the prompt there when the data are made, or name its key by "
        "reward_kwargs.prompt_key"
    )
