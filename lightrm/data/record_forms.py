"""A record in any of the forms people publish -> a prompt, its answers, and what they are worth, if somebody said.

    prompt and answers     {"prompt", "responses"}, with "scores" (higher is better) or "ranks" (0 is best) or neither
    one answer             {"prompt", "response"} or {"prompt", "completion"}
    a conversation         {"messages"}, whose last turn is the answer
    chosen and rejected    {"prompt", "chosen", "rejected"}: strings, lists of strings (RewardBench 2), or turns (TRL),
                           with the prompt apart or in each conversation
    hh-rlhf                {"chosen", "rejected"}: dialogues as "\\n\\nHuman: ...\\n\\nAssistant: ..."
    HelpSteer2 and 3       {"prompt" or "context", "response_1", "response_2"}, a preference from -3 (the first) to 3
    PPE                    {"prompt", "response_1", ..., "response_n"}, "winner", "label" or "scores"
    Chatbot Arena          {"prompt", "response_a", "response_b"} or {"conversation_a", "conversation_b"}, "winner";
                           each model saw its own earlier answers, so a last answer may have a prompt of its own

A prompt is a string or turns; turns may be called "context" or "messages" too.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from lightrm.errors import InputError
from lightrm.text.columns import items, kind
from lightrm.text.conversation import Prompt, response_of, responses_of, text_of, turn_of, turns_of
from lightrm.text.templates import Turn

SPEAKER = re.compile(r"(?:^|\n\n)(System|Human|Assistant):")
ROLE = {"System": "system", "Human": "user", "Assistant": "assistant"}
OPEN_TURN = "\n\nAssistant:"
OPENS = ("system", "developer", "user")  # roles of a conversation's first turn
PAIR = ("user", "assistant")
ANSWERS = ("assistant", "tool")  # roles of what a user does not write
NUMBERED, LETTERED = ("response_1", "response1"), ("response_a", "response_b")
CONVERSATIONS = ("conversation_a", "conversation_b")
FIELDS = frozenset(
    (
        "prompt",
        "context",
        "messages",
        "responses",
        "response",
        "completion",
        "chosen",
        "rejected",
        *NUMBERED,
        *LETTERED,
        *CONVERSATIONS,
    )
)
NUMBERS = ("scores", "ranks")
PREFERENCES = ("overall_preference", "preference_strength")  # of HelpSteer3 and 2: below 0 where the first is better
VERDICTS = ("winner", "label")
MARKS = ("winner_model_a", "winner_model_b")
LABELS = frozenset((*NUMBERS, *PREFERENCES, *VERDICTS, *MARKS))
FIRST = ("model_a", "model_1", "a", "response_a", "response_1", "response1", "a>b", "a>>b")
SECOND = ("model_b", "model_2", "b", "response_b", "response_2", "response2", "b>a", "b>>a")
TIE = ("tie", "tie (bothbad)", "tie (both bad)", "both_bad", "both bad", "bothbad", "a=b")
ONE, OTHER, EQUAL = (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)
Worth = tuple[float, ...] | None


@dataclass(frozen=True, slots=True)
class Answers:
    """A record, read.

    worth: of each response; higher is better, and ties count as no preference; None if the record does not say.
    prompts: of each response, where two conversations went different ways before their last answers; else empty.
    """

    prompt: Prompt
    responses: tuple[str, ...]
    worth: Worth
    prompts: tuple[Prompt, ...] = ()

    @property
    def asked(self) -> list[tuple[Prompt, tuple[str, ...]]]:
        """Each prompt with its responses, in order."""
        if not self.prompts:
            return [(self.prompt, self.responses)]
        return [(prompt, (text,)) for prompt, text in zip(self.prompts, self.responses, strict=True)]


def answers_of(record: Any, labels: bool = True) -> Answers:
    """Return a record's prompt and answers. labels: also read what the answers are worth.

    Raises InputError if the record has none of the forms, or if one of its fields has the wrong type.
    """
    if not isinstance(record, Mapping):
        raise InputError(f"expected an object, found {kind(record)}")
    held = {name: value for name, value in record.items() if value is not None and (labels or name not in LABELS)}
    read = next((read for fields, read in FORMS if all(name in held for name in fields)), unknown)
    return read(held)


def unknown(record: Mapping[str, Any]) -> NoReturn:
    found = ", ".join(map(str, record)) or "nothing"
    raise InputError(
        'expected "chosen" and "rejected", or "prompt" with "responses" or "response", or "messages", or another form '
        f"of lightrm.data.record_forms; found {found:.200}"
    )


def prompted(record: Mapping[str, Any]) -> str | None:
    """Return the name of the field that holds the prompt. "context" and "messages" count only if they hold turns."""
    if "prompt" in record and not (isinstance(record["prompt"], str) and not record["prompt"]):
        return "prompt"
    return next((name for name in ("context", "messages") if is_turns(record.get(name))), None)


def prompt_of(record: Mapping[str, Any]) -> Prompt:
    """Return the prompt as `score` takes it. A dialogue in hh-rlhf's form becomes turns."""
    name = prompted(record)
    if name is None and "prompt" not in record:
        unknown(record)
    prompt: Any = record[name or "prompt"]
    if not isinstance(prompt, str):
        return turns_of(prompt)
    form = record.get("format")
    dialogue = prompt.startswith("\n\nHuman:") and prompt.rstrip().endswith(OPEN_TURN)
    if form == "hh" or (form is None and dialogue):
        return turns_of(dialogue_turns(prompt))
    return text_of(prompt, "prompt")


def listed(record: Mapping[str, Any]) -> Answers:
    responses = tuple(responses_of(record["responses"]))
    return Answers(prompt_of(record), responses, graded(record, len(responses)))


def single(record: Mapping[str, Any]) -> Answers:
    name = "response" if "response" in record else "completion"
    before, answer = split(record[name], name)
    return Answers(joined(prompt_of(record), before), (answer,), None)


def conversation(record: Mapping[str, Any]) -> Answers:
    before, answer = split(record["messages"], "messages")
    return Answers(turns_of(before), (answer,), None)


def joined(prompt: Prompt, before: Sequence[Turn]) -> Prompt:
    """Return a prompt followed by the turns of an answer before its last one: tool calls and their results."""
    return turns_of([*turns_of(prompt), *before]) if before else prompt


def split(side: Any, what: str) -> tuple[list[Any], str]:
    """Return the turns of an answer before its last one, and the text of the last one. A string has no turns before."""
    if not is_turns(side):
        return [], response_of(side, what)
    turns = items(side, what)
    return turns[:-1], response_of(turns[-1], f"{what}, its last turn")


def is_turns(value: Any) -> bool:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        return False
    given = items(value, "expected turns")
    return bool(given) and all(isinstance(turn, Mapping) and "role" in turn for turn in given)


def compared(record: Mapping[str, Any]) -> Answers:
    chosen, rejected = record["chosen"], record["rejected"]
    name = prompted(record)
    if is_turns(chosen) and is_turns(rejected):
        return sided(chosen, rejected, None if name is None else prompt_of(record), ONE)
    if name is None and isinstance(chosen, str) and isinstance(rejected, str):
        return split_dialogue(chosen, rejected)
    good, bad = (responses_of([side] if isinstance(side, str) else side) for side in (chosen, rejected))
    return Answers(prompt_of(record), (*good, *bad), (1.0,) * len(good) + (0.0,) * len(bad))


def sided(one: Any, other: Any, prompt: Prompt | None, worth: Worth) -> Answers:
    """Return the answers of two conversations, or ends of conversations after a prompt, that differ only in the last
    turn."""
    before, after = map(turns_before, (one, other))
    if before != after:
        raise InputError("the two conversations differ before their last turn: each answer has a prompt of its own")
    answers = tuple(split(side, "the answer")[1] for side in (one, other))
    if prompt is not None and not (before and before[0]["role"] in OPENS):
        return Answers(joined(prompt, before), answers, worth)
    opening = [] if prompt is None or isinstance(prompt, str) else turns_of(prompt)
    if before[: len(opening)] != opening:
        raise InputError("the prompt's turns are not those that the conversations begin with")
    return Answers(turns_of(before), answers, worth)


def turns_before(side: Any) -> list[Turn]:
    return [turn_of(turn, f"turn {k}") for k, turn in enumerate(items(side, "expected turns")[:-1])]


def conversations(record: Mapping[str, Any]) -> Answers:
    one, other = (record[name] for name in CONVERSATIONS)
    return held_with_both(one, other, verdict(record))


def held_with_both(one: Any, other: Any, worth: Worth) -> Answers:
    """Return the last answers of two conversations in which one user wrote the same to two models. Each model saw its
    own earlier answers, so each last answer may have a prompt of its own."""
    before, after = map(turns_before, (one, other))
    said_to = [[turn["content"] for turn in turns if turn["role"] not in ANSWERS] for turns in (before, after)]
    if before == after or said_to[0] != said_to[1]:
        return sided(one, other, None, worth)
    answers = tuple(split(side, "the answer")[1] for side in (one, other))
    prompts = turns_of(before), turns_of(after)
    return Answers(prompts[0], answers, worth, prompts)


def split_dialogue(chosen: str, rejected: str) -> Answers:
    """Return the common turns of two dialogues in hh-rlhf's form, and the last turn of each."""
    before, found, better = chosen.rpartition(OPEN_TURN)
    before_rejected, _, worse = rejected.rpartition(OPEN_TURN)
    if not found or before != before_rejected:
        raise InputError(
            'without "prompt", chosen and rejected must be dialogues "\\n\\nHuman: ...\\n\\nAssistant: ..." '
            "that differ in their last turn only"
        )
    answers = tuple(text_of(side.strip(), name) for side, name in ((better, "chosen"), (worse, "rejected")))
    return Answers(turns_of(dialogue_turns(before + OPEN_TURN)), answers, ONE)


def dialogue_turns(text: str) -> list[Turn]:
    """Return the turns of a dialogue in hh-rlhf's form, without the open assistant turn at its end.

    Raises InputError if it does not start with a named turn.
    """
    pieces = SPEAKER.split(text)
    if pieces[0].strip():
        raise InputError(f"an hh dialogue starts with a named turn, found {text[:60]!r}")
    turns = [
        {"role": ROLE[speaker], "content": said.strip()}
        for speaker, said in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    return turns[:-1] if turns and turns[-1] == {"role": "assistant", "content": ""} else turns


def numbered(record: Mapping[str, Any]) -> Answers:
    """Return response_1, response_2, ... up to the first that is missing."""
    stem = next(name for name in NUMBERED if name in record)[:-1]
    names = [f"{stem}{k}" for k in range(1, len(record) + 1)]
    given = [record[name] for name in names[: next((k for k, n in enumerate(names) if n not in record), len(names))]]
    responses = tuple(responses_of(given))
    scale = next((name for name in PREFERENCES if name in record), None)
    worth = graded(record, len(responses))
    if len(responses) == 2 and scale is not None:
        preference = numbers_of([record[scale]], scale)[0]
        worth = ONE if preference < 0 else OTHER if preference > 0 else EQUAL
    elif len(responses) == 2 and worth is None:
        worth = verdict(record)
    return Answers(prompt_of(record), responses, worth)


def lettered(record: Mapping[str, Any]) -> Answers:
    """Return response_a and response_b: texts or, in Arena's files of several turns, lists of texts beside a list of
    prompts."""
    prompt, *sides = map(unpacked, (record.get("prompt"), *(record[name] for name in LETTERED)))
    if is_texts(prompt) and all(is_texts(side) and len(side) == len(prompt) for side in sides):
        one, other = (
            [turn for said in zip(prompt, side, strict=True) for turn in map(turn_from, PAIR, said)] for side in sides
        )
        return held_with_both(one, other, verdict(record))
    return Answers(prompt_of(record), tuple(responses_of([record[name] for name in LETTERED])), verdict(record))


def unpacked(value: Any) -> Any:
    """Return the texts of a JSON list, as Arena's 55k comparisons write the turns of each side into one text."""
    if not (isinstance(value, str) and value.startswith('["') and value.endswith('"]')):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def turn_from(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


def is_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(text, str) for text in value)


def graded(record: Mapping[str, Any], answers: int) -> Worth:
    """Return what each answer is worth, from "scores", or from "ranks", of which the lowest is best."""
    name = next((name for name in NUMBERS if record.get(name) is not None), None)
    if name is None:
        return None
    values = numbers_of(record[name], name)
    if len(values) != answers:
        raise InputError(f'"{name}" must hold one number for each of the {answers} responses, found {len(values)}')
    return values if name == "scores" else tuple(-value for value in values)


def numbers_of(values: Any, name: str) -> tuple[float, ...]:
    try:
        found = tuple(float(value) for value in values)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f'"{name}" must be a list of numbers: {error}') from error
    if any(map(math.isnan, found)):
        raise InputError(f'"{name}" must hold one number for each of the responses, found NaN')
    return found


def verdict(record: Mapping[str, Any]) -> Worth:
    """Return which of two answers is better: from "winner" or "label", or from "winner_model_a" and "winner_model_b".

    Raises InputError on a bare number: some data sets count from 0, some from 1, and some mean "the first is better" by
    1.
    """
    if any(mark in record for mark in MARKS):
        first, second = (str(record.get(mark)).lower() in ("1", "1.0", "true") for mark in MARKS)
        return EQUAL if first == second else ONE if first else OTHER
    name = next((name for name in VERDICTS if name in record), None)
    if name is None:
        return None
    for names, worth in ((FIRST, ONE), (SECOND, OTHER), (TIE, EQUAL)):
        if str(record[name]).strip().lower() in names:
            return worth
    raise InputError(f'"{name}" is {record[name]!r:.60}: expected "model_a", "model_b" or "tie"')


# The first whose fields a record has.
FORMS: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Answers]], ...] = (
    (("chosen", "rejected"), compared),
    (("responses",), listed),
    *(((name,), numbered) for name in NUMBERED),
    (CONVERSATIONS, conversations),
    (LETTERED, lettered),
    (("response",), single),
    (("completion",), single),
    (("messages",), conversation),
)
