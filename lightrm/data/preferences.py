"""Data to judge a reward model with: prompts with answers, what each answer is worth, and groups to break results down
by.

Files of any kind in `record_files`, on this machine or on the hub; records of any form in `record_forms`. The fields
"lang", "kind" (or RewardBench's "subset", or HelpSteer3's "domain") and "source" are kept for breakdowns. If no
language is named, the script tells it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lightrm.data.data_source import ALL, DataSource, source_of
from lightrm.data.record_columns import Columns
from lightrm.errors import InputError
from lightrm.text.columns import has, kind
from lightrm.text.conversation import Prompt

HAN = re.compile(r"[\u3400-\u9fff]")
MOSTLY_HAN = 0.2  # share of characters from which a text counts as Chinese
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt with its answers.

    worth: of each answer; higher is better, and ties count as no preference; None if the data does not say. lang, kind,
    source: groups that results are broken down by. prompts: of each answer, where two conversations went different
    ways before their last answers; else empty.
    """

    prompt: Prompt
    responses: tuple[str, ...]
    worth: tuple[float, ...] | None
    lang: str
    kind: str
    source: str
    prompts: tuple[Prompt, ...] = ()

    @property
    def each_prompt(self) -> tuple[Prompt, ...]:
        """The prompt of each answer."""
        return self.prompts or (self.prompt,) * len(self.responses)

    @property
    def worths(self) -> tuple[float, ...]:
        """The worth of each answer, NaN if the data does not say."""
        return self.worth or (math.nan,) * len(self.responses)


def read_questions(path: str | os.PathLike[str] | DataSource, tell: Tell | None = None) -> list[Question]:
    """Read every usable record of a file, or of a data set on the hub by its address "hf://datasets/owner/name". tell:
    called with a line about each unusable one; without it, they raise InputError.

    Raises InputError if the file cannot be read, or holds no usable record.
    """
    return [question for _, question in numbered_questions(path, tell)]


def numbered_questions(
    path: str | os.PathLike[str] | DataSource, tell: Tell | None = None
) -> list[tuple[int, Question]]:
    """As `read_questions`, each with the place of its row among all rows, from 0."""
    source = source_of(path)
    found = list(questions_in(source, tell))
    if not found:
        raise InputError(f"{source} holds no record that can be judged: see lightrm.data.record_forms for the forms")
    return found


def questions_of(data: object, tell: Tell | None = None) -> list[Question]:
    """Return questions: those of a file, by its path or address, of a table of pandas, polars, pyarrow or `datasets`,
    or of a list of questions or records. Raises InputError."""
    if isinstance(data, str | os.PathLike | DataSource):
        return read_questions(data, tell)
    records = records_of(data)
    if isinstance(data, Mapping | bytes) or not isinstance(records, Iterable):
        raise InputError(f"expected questions, records or the path of a file, found {kind(data)}")
    found = []
    for number, one in enumerate(records, 1):
        try:
            found.append(one if isinstance(one, Question) else question_of(one))
        except InputError as error:
            raise InputError(f"record {number}: {error}") from error
    return found


def questions_in(source: DataSource, tell: Tell | None = None) -> Iterator[tuple[int, Question]]:
    """As `numbered_questions`, one record at a time."""
    for place, row in enumerate(source.rows()):
        try:
            if row.error:
                raise InputError(row.error)
            yield place, question_of(row.record, source.columns)
        except InputError as error:
            if tell is None:
                raise InputError(f"{row.name}: {error}") from error
            tell(f"{row.name}: {error}")


def calibration_pairs(path: str | os.PathLike[str] | DataSource) -> Iterator[tuple[Prompt, str]]:
    """Yield each prompt with each of its responses."""
    for _, question in questions_in(source_of(path)):
        yield from zip(question.each_prompt, question.responses, strict=True)


def question_of(record: Any, columns: Columns = ALL) -> Question:
    """Return a record as a question. columns: those with prompt and answers. Raises InputError if it has none of the
    known forms."""
    answers = columns.answers(record)
    if not answers.responses:
        raise InputError("there is no answer to score")
    return Question(
        prompt=answers.prompt,
        responses=answers.responses,
        worth=answers.worth,
        lang=label(record, "lang") or language(" ".join(answers.responses)),
        kind=label(record, "kind", "subset", "domain") or "all",
        source=label(record, "source") or "all",
        prompts=answers.prompts,
    )


def records_of(data: Any) -> Any:
    """Return the rows of a table as records, by what its type can do; anything else as it is."""
    if has(data, "iter_rows"):  # polars
        return data.iter_rows(named=True)
    if has(data, "iterrows"):  # pandas, whose cells without a value are NaN
        return map(valued, data.to_dict("records"))
    return data.to_pylist() if has(data, "to_pylist") else data  # pyarrow


def valued(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if not (isinstance(value, float) and math.isnan(value))}


def label(record: Mapping[str, Any], *names: str) -> str:
    """Return the first of some fields that has a value, as printable text."""
    found = next((str(record[name]) for name in names if record.get(name)), "")
    return found.encode("utf-8", "backslashreplace").decode()


def language(text: str) -> str:
    return "zh" if len(HAN.findall(text)) > MOSTLY_HAN * len(text) else "en"
