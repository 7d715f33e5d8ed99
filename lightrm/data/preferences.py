"""Data to judge a reward model with: prompts with answers, what each answer is worth, and groups to break results down
by.

Files of any kind in `record_files`, records of any form in `record_forms`. The fields "lang", "kind" (or RewardBench's
"subset", or HelpSteer3's "domain") and "source" are kept for breakdowns. If no language is named, the script tells it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightrm.data.record_files import read_rows
from lightrm.data.record_forms import answers_of
from lightrm.errors import InputError
from lightrm.text.columns import kind
from lightrm.text.conversation import Prompt

HAN = re.compile(r"[\u3400-\u9fff]")
MOSTLY_HAN = 0.2  # share of characters from which a text counts as Chinese
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt with its answers.

    worth: of each answer; higher is better, and ties count as no preference; None if the data does not say. lang, kind,
    source: groups that results are broken down by.
    """

    prompt: Prompt
    responses: tuple[str, ...]
    worth: tuple[float, ...] | None
    lang: str
    kind: str
    source: str

    @property
    def worths(self) -> tuple[float, ...]:
        """The worth of each answer, NaN if the data does not say."""
        return self.worth or (math.nan,) * len(self.responses)


def read_questions(path: str | Path, tell: Tell | None = None) -> list[Question]:
    """Read every usable record of a file. tell: called with a line about each unusable one; without it, they raise
    InputError.

    Raises InputError if the file cannot be read, or holds no usable record.
    """
    found = list(questions_in(Path(path), tell))
    if not found:
        raise InputError(f"{path} holds no record that can be judged: see lightrm.data.record_forms for the forms")
    return found


def questions_of(data: object, tell: Tell | None = None) -> list[Question]:
    """Return questions: those of a file, by its path, or of a list of questions or records. Raises InputError."""
    if isinstance(data, str | os.PathLike):
        return read_questions(os.fspath(data), tell)
    if isinstance(data, Mapping | bytes) or not isinstance(data, Iterable):
        raise InputError(f"expected questions, records or the path of a file, found {kind(data)}")
    found = []
    for number, one in enumerate(data, 1):
        try:
            found.append(one if isinstance(one, Question) else question_of(one))
        except InputError as error:
            raise InputError(f"record {number}: {error}") from error
    return found


def questions_in(path: Path, tell: Tell | None = None) -> Iterator[Question]:
    """As `read_questions`, one record at a time."""
    for row in read_rows(path):
        try:
            if row.error:
                raise InputError(row.error)
            yield question_of(row.record)
        except InputError as error:
            if tell is None:
                raise InputError(f"{path}, record {row.number}: {error}") from error
            tell(f"record {row.number}: {error}")


def calibration_pairs(path: Path) -> Iterator[tuple[Prompt, str]]:
    """Yield each prompt with each of its responses."""
    for question in questions_in(path):
        for response in question.responses:
            yield question.prompt, response


def question_of(record: Any) -> Question:
    """Return a record as a question. Raises InputError if it has none of the known forms."""
    answers = answers_of(record)
    if not answers.responses:
        raise InputError("there is no answer to score")
    return Question(
        prompt=answers.prompt,
        responses=answers.responses,
        worth=answers.worth,
        lang=label(record, "lang") or language(" ".join(answers.responses)),
        kind=label(record, "kind", "subset", "domain") or "all",
        source=label(record, "source") or "all",
    )


def label(record: Mapping[str, Any], *names: str) -> str:
    """Return the first of some fields that has a value, as printable text."""
    found = next((str(record[name]) for name in names if record.get(name)), "")
    return found.encode("utf-8", "backslashreplace").decode()


def language(text: str) -> str:
    return "zh" if len(HAN.findall(text)) > MOSTLY_HAN * len(text) else "en"
