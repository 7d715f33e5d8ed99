"""What callers hand in: every list that gives its items in order, turns as people write them, and nothing misread."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lightrm.errors import InputError, TemplateError
from lightrm.text.conversation import responses_of, turns_of
from lightrm.text.templates import Template, find_template, said


class Column:
    """As pandas and polars give a column: an index of its own, items in order."""

    def __init__(self, values: list[Any]) -> None:
        self.values, self.ndim = values, 1

    def __iter__(self):
        return iter(self.values)

    def __getitem__(self, key: object) -> Any:
        raise KeyError(key)


class Frame(Column):
    columns = ("a", "b")


TEXTS = ["a", "天气"]
LISTS = [
    TEXTS, tuple(TEXTS), np.array(TEXTS), np.array(TEXTS, object), pa.array(TEXTS), pa.chunked_array([TEXTS]),
    Column(TEXTS), Column([np.str_(text) for text in TEXTS]), (text for text in TEXTS),
]  # fmt: skip


@pytest.mark.parametrize("given", LISTS, ids=lambda given: type(given).__name__)
def test_lists_of_texts(given: Any) -> None:
    found = responses_of(given)
    assert found == TEXTS
    assert {type(text) for text in found} == {str}


TURNS = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]


@pytest.mark.parametrize(
    "given",
    [TURNS, tuple(TURNS), np.array(TURNS, object), (turn for turn in TURNS), Column(TURNS), pa.array(TURNS)],
    ids=lambda given: type(given).__name__,
)
def test_lists_of_turns(given: Any) -> None:
    assert turns_of(given) == TURNS


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("a", r"write \[response\]"), ({"a": 1}, "found dict"), ({"a", "b"}, "found set"),
        (Frame(["a"]), "found Frame"),
        (pa.table({"a": TEXTS}), "found Table"), (np.array("a"), "found"), (np.array([TEXTS]), "an array of 1 x 2"),
        ([TEXTS], "response 0 must be a string or one assistant turn"),
        (np.array([1, 2]), "response 0 must be a string"),
        (None, "found None"), (b"a", "write"), ([float("nan")], "response 0 must be a string, found float"),
        ([{"role": "user", "content": "x"}], "role 'user', expected an assistant's"),
        ([{"role": "assistant", "content": "x", "tool_calls": [1]}], "holds 'tool_calls' beside its content"),
        ([{"role": "assistant", "content": "x", "reasoning_content": "r"}], "holds 'reasoning_content'"),
        ([[{"role": "assistant", "content": "x"}, {"role": "assistant", "content": "y"}]], "earlier turns"),
    ],
)  # fmt: skip
def test_what_is_no_list_of_responses(given: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        responses_of(given)


def test_responses_as_turns() -> None:
    turn = {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    assert responses_of(["ab", turn, [turn], np.array([turn], object), {**turn, "num_tokens": 3}]) == ["ab"] * 5


def test_parts_and_other_keys_of_a_turn() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": np.array([1, 2])}}}
    given = [
        {
            "role": "developer",
            "content": [{"type": "text", "text": "one ", "image": None}, {"type": "text", "text": "two"}],
        },
        {"role": "user", "content": "x", "name": "Ada", "extra": None},
        {"role": "assistant", "content": None, "tool_calls": np.array([call], object), "reasoning_content": "hm"},
        {"role": "tool", "content": "7", "tool_call_id": "1"},
    ]
    found = turns_of(given)
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert found[0] == {"role": "developer", "content": parts}
    assert said(found[0]) == "one two"
    assert found[1] == {"role": "user", "content": "x", "name": "Ada"}
    assert found[2]["content"] is None
    assert said(found[2]) == ""
    assert [*found[1]] == ["role", "content", "name"], "in the caller's order"
    assert found[2]["reasoning_content"] == "hm"
    assert found[2]["tool_calls"][0]["function"]["arguments"] == {"x": [1, 2]}
    assert turns_of(found) == found


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], "holds a part of type 'image_url': lightrm scores text"),
        (["a"], "a part must be"), ([{"text": "a"}], "a part must be"),
        ([{"type": "text"}], "text part must be a string"),
        ([{"type": "text", "text": "\ud800"}], "lone surrogate"), ({"type": "text"}, "must be a string, found dict"),
        (None, "must be a string, found None"), (7, "found int 7"),
    ],
)  # fmt: skip
def test_contents_that_are_refused(content: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        turns_of([{"role": "user", "content": content}])


@pytest.mark.parametrize("name", ["ziya", "plain", "ultrarm"])
@pytest.mark.parametrize(
    "more", [{"tool_calls": [1]}, {"name": "Ada"}, {"reasoning_content": "r"}], ids=lambda more: next(iter(more))
)
def test_a_fixed_form_drops_nothing(name: str, more: dict[str, Any]) -> None:
    turns = turns_of([{"role": "user", "content": "x", **more}])
    template: Any = find_template(name)
    with pytest.raises(TemplateError, match=f"has no place for a turn's '{next(iter(more))}'"):
        _ = template.before(turns) if isinstance(template, Template) else template.render(turns, ["y"], None)
