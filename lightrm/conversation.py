"""What the caller passed, checked: a prompt as a string or a list of turns, and responses as strings."""

from __future__ import annotations

from collections.abc import Sequence

from lightrm.errors import InputError
from lightrm.templates import Turn

ROLES = ("system", "user", "assistant")
Prompt = str | Sequence[Turn]


def turns_of(prompt: Prompt) -> list[Turn]:
    """A string is one user turn. Raises InputError on anything that is not a conversation ending in a user turn."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": text_of(prompt, "prompt")}]
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes) or not prompt:
        raise InputError(f"prompt must be a string or a non-empty list of turns, found {kind(prompt)}")
    turns = []
    for k, turn in enumerate(prompt):
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise InputError(f"prompt turn {k} must be a dictionary with 'role' and 'content', found {kind(turn)}")
        if turn["role"] not in ROLES:
            raise InputError(f"prompt turn {k}: role {turn['role']!r} is none of {', '.join(ROLES)}")
        turns.append({"role": turn["role"], "content": text_of(turn["content"], f"prompt turn {k}")})
    if turns[-1]["role"] != "user":
        raise InputError(f"the prompt must end in a user turn, its last turn is {turns[-1]['role']!r}")
    return turns


def responses_of(responses: Sequence[str]) -> list[str]:
    """Raises InputError unless it is a list of strings."""
    if isinstance(responses, str | bytes):
        raise InputError("responses must be a list of strings, found one string: write [response]")
    if not isinstance(responses, Sequence):
        raise InputError(f"responses must be a list of strings, found {kind(responses)}")
    return [text_of(response, f"response {k}") for k, response in enumerate(responses)]


def text_of(value: object, what: str) -> str:
    """Raises InputError on a non-string, and on lone surrogates, which no encoding of text has."""
    if not isinstance(value, str):
        raise InputError(f"{what} must be a string, found {kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} holds a lone surrogate {value[error.start]!r} at character {error.start}: it is not valid text; "
            "decode the source with errors='replace' or repair it"
        ) from error
    return value


def kind(value: object) -> str:
    return "None" if value is None else f"{type(value).__name__} {value!r:.60}"
