"""Which columns hold the prompt and the answers, where a caller says so: a record under the names that `record_forms`
knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightrm.data.record_forms import FIELDS, Answers, answers_of, is_turns
from lightrm.errors import InputError
from lightrm.text.columns import kind

PROMPTS = ("prompt", "context", "messages")
NAMED = 20  # columns in a message


@dataclass(frozen=True, slots=True)
class Columns:
    """prompt: the column with the prompt, None for the usual ones. responses: the columns with the answers; a single
    one may hold one answer or a list of them."""

    prompt: str | None = None
    responses: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (*([] if self.prompt is None else [self.prompt]), *self.responses)

    def answers(self, record: Any, labels: bool = True) -> Answers:
        """As `answers_of`. Raises InputError, which names the columns that there are, if one is missing."""
        return answers_of(self.renamed(record) if self.names and isinstance(record, Mapping) else record, labels)

    def check(self, record: Mapping[str, Any], file: str = "") -> None:
        """Raise InputError if a column is missing. file: which holds a table, so that no other row has the column."""
        missing = [name for name in self.names if name not in record]
        if missing:
            raise InputError(f"{file}{': ' * bool(file)}there is no column {missing[0]!r}, found {listed(record)}")

    def renamed(self, record: Mapping[str, Any]) -> dict[str, Any]:
        self.check(record)
        replaced = {*(PROMPTS if self.prompt is not None else ())}
        if self.responses:
            numbered = (name for name in record if str(name).startswith("response"))
            replaced |= {*(FIELDS - {*PROMPTS}), *numbered}
        held = {name: value for name, value in record.items() if name not in replaced}
        if self.prompt is not None:
            held["prompt"] = self.given(record, self.prompt)
        if len(self.responses) == 1:
            value = self.given(record, self.responses[0])
            held["response" if isinstance(value, str | Mapping) or is_turns(value) else "responses"] = value
        else:
            held |= {f"response_{k}": self.given(record, name) for k, name in enumerate(self.responses, 1)}
        return held

    def given(self, record: Mapping[str, Any], name: str) -> Any:
        if record[name] is None:
            raise InputError(f"column {name!r} holds {kind(None)} here")
        return record[name]


def listed(record: Mapping[str, Any]) -> str:
    names = [repr(str(name)) for name in record]
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "") or "none"
