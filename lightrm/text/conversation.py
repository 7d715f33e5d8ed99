"""The caller's prompts and responses, checked. Texts may be strings or turns; lists may be of any kind (`columns`)."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from lightrm.errors import InputError
from lightrm.text.columns import bare, items, kind, plain, single_column
from lightrm.text.templates import READ_ELSEWHERE, Turn, said

ROLES = ("system", "user", "assistant", "tool", "developer")
ASKS = ("user", "tool")  # roles that an answer may follow
CALLS = ("tool_calls", "function_call")  # an assistant turn with one of these needs no content
Prompt = str | Iterable[Mapping[str, Any]]
Response = str | Mapping[str, Any] | Iterable[Mapping[str, Any]]
Responses = Iterable[Response]
Asked = list[tuple[list[Turn], list[str]]]  # each prompt with its responses
FOR_EACH = "expected a list of prompts, and a list of responses for each"


def asked_once(prompts: Iterable[Prompt], responses: Responses, system: str | None = None) -> Asked:
    """Return each prompt with its one response. Neighbours with the same prompt are put together, so that it is
    tokenized once.

    Raises InputError unless both are lists of one length.
    """
    texts = responses_of(responses)
    asked = prompts if isinstance(prompts, str) else items(prompts, "prompts must be a list")
    if isinstance(asked, str) or len(asked) != len(texts):
        found = "one string" if isinstance(asked, str) else f"{len(asked)} prompts"
        raise InputError(f"prompts and responses must be lists of one length, found {found} and {len(texts)} responses")
    grouped: Asked = []
    for k, (prompt, text) in enumerate(zip(asked, texts, strict=True)):
        turns = turns_of(prompt, system, f"prompt {k}")
        if grouped and grouped[-1][0] == turns:
            grouped[-1][1].append(text)
        else:
            grouped.append((turns, [text]))
    return grouped


def asked_often(prompts: Iterable[Prompt], responses: Iterable[Responses], system: str | None = None) -> Asked:
    """Return each prompt with its several responses. Raises InputError unless there is a list of them for each."""
    given, lists = items(prompts, FOR_EACH), items(responses, FOR_EACH)
    if len(given) != len(lists):
        raise InputError(f"expected a list of responses for each of {len(given)} prompts, found {len(lists)}")
    if len(given) == 1:
        return [(turns_of(given[0], system), responses_of(lists[0]))]
    return [
        (turns_of(prompt, system, f"prompt {k}"), responses_of(some, f"prompt {k}: "))
        for k, (prompt, some) in enumerate(zip(given, lists, strict=True))
    ]


def together(keys: Sequence[Hashable]) -> list[list[int]]:
    """Return the positions of each distinct key, in the order in which they first come: answers to equal prompts, side
    by side, so that each prompt is tokenized once."""
    found: dict[Hashable, list[int]] = {}
    for k, key in enumerate(keys):
        found.setdefault(key, []).append(k)
    return list(found.values())


def turns_of(prompt: Prompt, system: str | None = None, what: str = "prompt") -> list[Turn]:
    """Return a prompt as turns. A string is one user turn. The "content" of a turn may be a list of text parts. Such
    lists, and other keys that are not None, are kept for the checkpoint's own chat template.

    system: a text to put before the prompt as a system turn. what: the prompt's name in messages. Raises InputError
    unless an answer can follow the conversation, and if the prompt has a system turn besides `system`.
    """
    if system is not None:
        turns = turns_of(prompt, None, what)
        if opens_itself(turns):
            raise InputError(f"{what} begins with a system turn of its own: leave out system=, or that turn")
        return [system_turn(system), *turns]
    given: Any = bare(prompt)
    if isinstance(given, str):
        return [{"role": "user", "content": text_of(given, what)}]
    listed = items(given, f"{what} must be a string or a non-empty list of turns")
    if not listed:
        raise InputError(f"{what} must be a string or a non-empty list of turns, found {kind(prompt)}")
    turns = [turn_of(turn, f"{what} turn {k}") for k, turn in enumerate(listed)]
    if turns[-1]["role"] not in ASKS:
        raise InputError(f"{what} must end in a user turn, its last turn is {turns[-1]['role']!r}")
    return turns


def system_turn(system: str) -> Turn:
    return {"role": "system", "content": text_of(system, "system")}


def opens_itself(turns: Sequence[Turn]) -> bool:
    """Whether a conversation begins with a system turn."""
    return turns[0]["role"] in ("system", "developer")


def turn_of(turn: Any, what: str) -> Turn:
    if not isinstance(turn, Mapping) or "role" not in turn:
        raise InputError(f"{what} must be a dictionary with 'role' and 'content', found {kind(turn)}")
    if turn["role"] not in ROLES:
        raise InputError(f"{what}: role {turn['role']!r} is none of {', '.join(ROLES)}")
    held = {str(key): plain(value) for key, value in turn.items() if value is not None or key == "content"}
    silent = turn.get("content") is None and any(name in held for name in CALLS)
    if not silent and "content" not in turn:
        raise InputError(f"{what} must be a dictionary with 'role' and 'content', found {kind(turn)}")
    content = None if silent else content_of(turn["content"], what)
    return held | {"role": str(turn["role"]), "content": content}  # in the caller's order, which a template may write


def content_of(content: Any, what: str) -> str | list[dict[str, Any]]:
    """Return a string, or a list of {"type": "text", "text": ...} parts, without keys that are None.

    Raises InputError, which names the type, if a part is not text.
    """
    if content is None or isinstance(content, str | bytes | Mapping) or not isinstance(content, Iterable):
        return text_of(content, what)
    parts = []
    for part in items(content, f"{what} must be a string or a list of text parts"):
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise InputError(f'{what}: a part must be {{"type": "text", "text": ...}}, found {kind(part)}')
        if part["type"] != "text":
            raise InputError(f"{what} holds a part of type {part['type']!r}: lightrm scores text alone")
        text = text_of(part.get("text"), f"{what}, its text part")
        parts.append({str(key): plain(value) for key, value in part.items() if value is not None} | {"text": text})
    return parts


def responses_of(responses: Responses, where: str = "") -> list[str]:
    """Return responses as strings. A response is a string, an assistant turn, or a list of one such turn. The parts of
    its content are joined.

    where: begins messages. Raises InputError on anything else.
    """
    expected = f"{where}responses must be a list of strings"
    given = single_column(responses, items(responses, expected, "write [response]"), expected)
    return [response_of(response, f"{where}response {k}") for k, response in enumerate(given)]


def response_of(response: Response, what: str) -> str:
    response = bare(response)
    if isinstance(response, str) or not isinstance(response, Iterable):
        return text_of(response, what)
    turns = [response] if isinstance(response, Mapping) else items(response, f"{what} must be a string")
    if len(turns) != 1 or not isinstance(turns[0], Mapping):
        raise InputError(
            f"{what} must be a string or one assistant turn, found {kind(response)}: earlier turns are the prompt's"
        )
    turn = turn_of(turns[0], what)
    if turn["role"] != "assistant":
        raise InputError(f"{what} is a turn of role {turn['role']!r}, expected an assistant's")
    if beside := [name for name in READ_ELSEWHERE if name in turn]:
        raise InputError(f"{what} holds {beside[0]!r} beside its content: write into the content what is to be scored")
    return said(turn)


def texts_of(texts: Iterable[str]) -> list[str]:
    """Return texts that are ready to be tokenized. Raises InputError on anything that is not text, or empty."""
    expected = "texts must be a list of strings"
    given = single_column(texts, items(texts, expected, "write [text]"), expected)
    found = [text_of(text, f"text {k}") for k, text in enumerate(given)]
    if "" in found:
        raise InputError(f"text {found.index('')} is empty: there is nothing to score")
    return found


def text_of(value: object, what: str) -> str:
    """Return a string. Raises InputError on anything else, and on lone surrogates, which no text encoding can
    express."""
    value = bare(value)
    if not isinstance(value, str):
        raise InputError(f"{what} must be a string, found {kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} holds a lone surrogate {value[error.start]!r} at character {error.start}: it is not valid text; "
            "decode the source with errors='replace' or repair it"
        ) from error
    return str(value)
