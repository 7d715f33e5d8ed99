"""Data that judges a reward model: prompts with answers, and what the answers are worth, in the forms people publish.

    chosen and rejected      {"prompt", "chosen", "rejected"}: strings, lists of strings (RewardBench 2), or turns
    hh-rlhf                  {"chosen", "rejected"}: whole dialogues as "\\n\\nHuman: ...\\n\\nAssistant: ..."
    ranked lists             {"prompt", "responses"} with "scores" (higher is better) or "ranks" (0 is best)
    answers without labels   {"prompt", "responses"}: enough for fidelity

JSONL, gzipped or not, Parquet and CSV, where a cell may hold a JSON list. "lang", "kind" (or RewardBench's "subset")
and "source" are kept for breakdowns; a language that is not named is told from the script.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightrm.conversation import Prompt, kind, responses_of, turns_of
from lightrm.errors import InputError
from lightrm.records import is_parquet, lines_of, parquet_batches
from lightrm.templates import Turn

SPEAKER = re.compile(r"(?:^|\n\n)(System|Human|Assistant):")
ROLE = {"System": "system", "Human": "user", "Assistant": "assistant"}
OPEN_TURN = "\n\nAssistant:"
HAN = re.compile(r"[\u3400-\u9fff]")
MOSTLY_HAN = 0.2  # share of characters from which a text counts as Chinese
MOST_FIELD = 2**24  # characters of one CSV cell


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt with its answers. worth: of each answer, higher is better, ties count as no preference; None where
    nobody said. lang, kind, source: what it is broken down by."""

    prompt: Prompt
    responses: tuple[str, ...]
    worth: tuple[float, ...] | None
    lang: str
    kind: str
    source: str


def read_questions(path: str | Path, tell: Callable[[str], None] | None = None) -> list[Question]:
    """Every usable record of a file; what is wrong with the others goes to `tell`, by number, or is raised without it.

    Raises InputError if the file is of no kind that is read, or holds nothing usable.
    """
    found = list(questions_in(Path(path), tell))
    if not found:
        raise InputError(f"{path} holds no record that can be judged: see lightrm.questions for the forms")
    return found


def questions_in(path: Path, tell: Callable[[str], None] | None = None) -> Iterator[Question]:
    """As `read_questions`, a record at a time."""
    for number, record in numbered(path):
        try:
            yield question_of(record)
        except InputError as error:
            if tell is None:
                raise InputError(f"{path}, record {number}: {error}") from error
            tell(f"record {number}: {error}")


def calibration_pairs(path: Path) -> Iterator[tuple[Prompt, str]]:
    """Each prompt with each of its responses, one after the other."""
    for question in questions_in(path):
        for response in question.responses:
            yield question.prompt, response


def numbered(path: Path) -> Iterator[tuple[int, Any]]:
    """Records with their numbers, from 1; a line that is not JSON comes as the text it is."""
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    if is_parquet(path):
        rows: Iterable[Any] = (row for batch in parquet_batches(path) for row in batch.to_pylist())
        yield from enumerate(rows, 1)
    elif {".csv", ".tsv"} & set(path.suffixes):
        csv.field_size_limit(MOST_FIELD)
        text = b"".join(lines_of(path)).decode("utf-8-sig", "replace")
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if ".tsv" in path.suffixes else ",")
        yield from enumerate(({key: opened(cell) for key, cell in row.items()} for row in rows), 1)
    else:
        for number, line in enumerate(lines_of(path), 1):
            if text := line.decode("utf-8-sig", "replace").strip():
                yield number, loaded(text)


def loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def opened(cell: str | None) -> Any:
    """A CSV cell; a JSON list in it is read as one."""
    value = loaded(cell) if cell and cell.startswith("[") and cell.endswith("]") else cell
    return value if isinstance(value, list) else cell


def question_of(record: Any) -> Question:
    """Raises InputError if a record is of none of the known forms."""
    if not isinstance(record, Mapping):
        raise InputError(f"expected an object, found {kind(record)}")
    prompt: Prompt
    responses: tuple[str, ...]
    worth: tuple[float, ...] | None
    if "chosen" in record and "rejected" in record:
        prompt, responses, worth = compared(record)
    elif "prompt" in record and "responses" in record:
        responses = tuple(responses_of(record["responses"]))
        prompt, worth = prompt_of(record["prompt"], record.get("format")), graded(record, len(responses))
    else:
        found = ", ".join(map(str, record)) or "nothing"
        raise InputError(f'expected "chosen" and "rejected", or "prompt" and "responses", found {found}')
    if not responses:
        raise InputError("there is no answer to score")
    return Question(
        prompt=prompt,
        responses=responses,
        worth=worth,
        lang=str(record.get("lang") or language(" ".join(responses))),
        kind=str(record.get("kind") or record.get("subset") or "all"),
        source=str(record.get("source") or "all"),
    )


def compared(record: Mapping[str, Any]) -> tuple[Prompt, tuple[str, ...], tuple[float, ...]]:
    chosen, rejected, prompt = record["chosen"], record["rejected"], record.get("prompt")
    if is_turns(chosen) and is_turns(rejected):
        before, better, worse = split_turns(chosen, rejected)
        return turns_of(before), (better, worse), (1.0, 0.0)
    if not prompt and isinstance(chosen, str) and isinstance(rejected, str):
        turns, better, worse = split_dialogue(chosen, rejected)
        return turns, (better, worse), (1.0, 0.0)
    good, bad = ([side] if isinstance(side, str) else side for side in (chosen, rejected))
    answers = (*responses_of(good), *responses_of(bad))
    return prompt_of(prompt, record.get("format")), answers, (1.0,) * len(good) + (0.0,) * len(bad)


def is_turns(value: Any) -> bool:
    return isinstance(value, Sequence) and bool(value) and all(isinstance(t, Mapping) and "content" in t for t in value)


def split_turns(chosen: Sequence[Turn], rejected: Sequence[Turn]) -> tuple[list[Turn], str, str]:
    """Two conversations that differ in their last turn only: what is before it, and the two answers."""
    before = list(chosen[:-1])
    if before != list(rejected[:-1]):
        raise InputError("chosen and rejected are conversations that differ before their last turn")
    better, worse = (responses_of([side[-1]["content"]])[0] for side in (chosen, rejected))
    return before, better, worse


def split_dialogue(chosen: str, rejected: str) -> tuple[list[Turn], str, str]:
    """Two dialogues in hh-rlhf's form: the turns before the last one, and the two last ones."""
    before, found, better = chosen.rpartition(OPEN_TURN)
    before_rejected, _, worse = rejected.rpartition(OPEN_TURN)
    if not found or before != before_rejected:
        raise InputError(
            'without "prompt", chosen and rejected must be dialogues "\\n\\nHuman: ...\\n\\nAssistant: ..." '
            "that differ in their last turn only"
        )
    return dialogue_turns(before + OPEN_TURN), better.strip(), worse.strip()


def prompt_of(prompt: Any, form: Any) -> Prompt:
    """A prompt as `score` takes it; a dialogue of hh-rlhf's, named so or unmistakably one, as its turns."""
    if isinstance(prompt, str):
        dialogue = prompt.startswith("\n\nHuman:") and prompt.rstrip().endswith(OPEN_TURN)
        return turns_of(dialogue_turns(prompt)) if form == "hh" or (form is None and dialogue) else prompt
    return turns_of(prompt)


def dialogue_turns(text: str) -> list[Turn]:
    """The turns of a dialogue in hh-rlhf's form, without the open assistant turn it ends in.

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


def graded(record: Mapping[str, Any], answers: int) -> tuple[float, ...] | None:
    """What each answer is worth, from "scores", or from "ranks", where less is better."""
    name = next((name for name in ("scores", "ranks") if record.get(name) is not None), None)
    if name is None:
        return None
    try:
        values = tuple(float(value) for value in record[name])
    except (TypeError, ValueError) as error:
        raise InputError(f'"{name}" must be a list of numbers: {error}') from error
    if len(values) != answers or any(map(math.isnan, values)):
        raise InputError(f'"{name}" must hold one number for each of the {answers} responses, found {len(values)}')
    return values if name == "scores" else tuple(-value for value in values)


def language(text: str) -> str:
    return "zh" if len(HAN.findall(text)) > MOSTLY_HAN * len(text) else "en"
