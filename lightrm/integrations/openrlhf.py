"""OpenRLHF: the file that `--reward.remote_url` names. OpenRLHF itself is not imported.

Read in OpenRLHF 0.11 (`openrlhf/utils/agent.py`): a url that ends in .py is run as a file, and its `reward_func` is
called in threads, with lists of one sample. It calls

    reward_func(queries, prompts, labels)

queries: prompt and answer as one text, decoded with special tokens. It reads a dictionary of "rewards", "scores" (which
it filters prompts by) and "extra_logs". `lightrm.integrations.configured` says which model scores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightrm.errors import InputError
from lightrm.integrations.configured import Asked, Configured, from_environment
from lightrm.text.columns import items
from lightrm.text.conversation import text_of


def reward_func(
    queries: Sequence[str], prompts: Sequence[str], labels: Sequence[object] | None = None, **others: object
) -> dict[str, object]:
    """Return the rewards of n answers: {"rewards": float32 (n,), "scores": the same, "extra_logs": {}}.

    With LIGHTRM_TEXTS=templated, which is the default, a query is scored as it is. With "plain" the answer is what
    follows the prompt in it, without LIGHTRM_ANSWER_END, and the model's own template is put around both.
    labels, others: not read. Raises InputError on anything else, otherwise as `RewardModel.score_text` and `score`.
    """
    configured = from_environment()
    texts = items(queries, "queries must be a list of texts")
    asked_of = items(prompts, "prompts must be a list of texts")
    if len(texts) != len(asked_of):
        raise InputError(f"queries and prompts must be of one length, found {len(texts)} and {len(asked_of)}")
    asked = [read(configured, query, prompt, k) for k, (query, prompt) in enumerate(zip(texts, asked_of, strict=True))]
    rewards = torch.tensor(configured.rewards(asked), dtype=torch.float32)
    return {"rewards": rewards, "scores": rewards.clone(), "extra_logs": {}}


def read(configured: Configured, query: object, prompt: object, k: int) -> Asked:
    """Return what is scored. Raises InputError."""
    text = text_of(query, f"query {k}")
    if configured.texts != "plain":
        return text
    asked = text_of(prompt, f"prompt {k}")
    if not text.startswith(asked):
        raise InputError(
            f"query {k} does not begin with its prompt, so that its answer cannot be told: the policy's tokenizer does "
            f"not give the prompt back as it was; found {text[: len(asked) + 20]!r:.80}"
        )
    return configured.plain(asked, text[len(asked) :])
