"""Data that judges: every published form gives the same question, and what is wrong is named by number."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from lightrm.data.preferences import Question, question_of, questions_of, read_questions
from lightrm.data.record_forms import dialogue_turns
from lightrm.errors import InputError

DIALOGUE = "\n\nHuman: What is 2 + 2?\n\nAssistant: Four.\n\nHuman: And 3 + 3?\n\nAssistant:"
TURNS = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And 3 + 3?"},
]
SIX_TURN, FISH_TURN = ({"role": "assistant", "content": said} for said in ("Six.", "Fish."))
SIX = Question(TURNS, ("Six.", "Fish."), (1.0, 0.0), "en", "all", "all")


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": DIALOGUE, "chosen": "Six.", "rejected": "Fish."},
        {"prompt": DIALOGUE, "chosen": "Six.", "rejected": "Fish.", "format": "hh"},
        {"prompt": TURNS, "chosen": "Six.", "rejected": "Fish."},
        {"chosen": f"{DIALOGUE} Six.", "rejected": f"{DIALOGUE} Fish."},
        {
            "chosen": [*TURNS, {"role": "assistant", "content": "Six."}],
            "rejected": [*TURNS, {"role": "assistant", "content": "Fish."}],
        },
        {"prompt": TURNS, "responses": ["Six.", "Fish."], "scores": [1, 0]},
        {"prompt": TURNS, "chosen": [SIX_TURN], "rejected": [FISH_TURN]},  # TRL, the prompt apart
        {"prompt": TURNS, "chosen": [*TURNS, SIX_TURN], "rejected": [*TURNS, FISH_TURN]},
        {"prompt": "And 3 + 3?", "chosen": [*TURNS, SIX_TURN], "rejected": [*TURNS, FISH_TURN], "messages": None},
        {"prompt": np.array(TURNS, object), "chosen": np.array([SIX_TURN], object), "rejected": (FISH_TURN,)},
        {"context": TURNS, "response1": "Six.", "response2": "Fish.", "overall_preference": -2},  # HelpSteer3
        {"prompt": TURNS, "response_1": "Six.", "response_2": "Fish.", "preference_strength": -1},  # HelpSteer2
        {"prompt": TURNS, "response_1": "Six.", "response_2": "Fish.", "winner": "model_a"},  # PPE
        {"prompt": TURNS, "response_1": "Six.", "response_2": "Fish.", "label": "response_1"},
        {"prompt": TURNS, "response_1": "Six.", "response_2": "Fish.", "scores": [True, False]},
        {"prompt": TURNS, "response_a": "Six.", "response_b": "Fish.", "winner": "model_a"},  # Arena
        {"prompt": TURNS, "response_a": "Six.", "response_b": "Fish.", "winner_model_a": "1", "winner_model_b": "0"},
        {"conversation_a": [*TURNS, SIX_TURN], "conversation_b": [*TURNS, FISH_TURN], "winner": "model_a"},
    ],
    ids=" ".join,
)
def test_forms_of_one_pair(record: dict) -> None:
    assert question_of(record) == SIX


def test_lists_and_columns() -> None:
    ranked = question_of({"prompt": "x", "responses": ["a", "b", "c"], "ranks": [2, 0, 1], "source": "s", "kind": "k"})
    assert ranked.worth == (-2.0, 0.0, -1.0)
    assert (ranked.source, ranked.kind) == ("s", "k")
    rewardbench2 = question_of({"prompt": "x", "chosen": ["a"], "rejected": ["b", "c"], "subset": "Math", "id": 3})
    assert (rewardbench2.responses, rewardbench2.worth, rewardbench2.kind) == (("a", "b", "c"), (1.0, 0.0, 0.0), "Math")
    assert question_of({"prompt": "x", "responses": ["天空是蓝色的。"]}).worth is None
    assert question_of({"prompt": "x", "responses": ["天空是蓝色的。"]}).lang == "zh"
    assert question_of({"prompt": "x", "responses": ["sky"], "lang": "de"}).lang == "de"


def test_one_answer_and_conversations() -> None:
    for record in (
        {"prompt": TURNS, "response": "Six."}, {"prompt": TURNS, "completion": [SIX_TURN]},
        {"messages": [*TURNS, SIX_TURN]},
        {"messages": TURNS, "response": SIX_TURN}, {"messages": TURNS, "responses": ["Six."]},
    ):  # fmt: skip
        found = question_of(record)
        assert (found.prompt, found.responses, found.worth) == (TURNS, ("Six.",), None)
    call = [{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}, {"role": "tool", "content": "6"}]
    tools = question_of({"prompt": TURNS, "chosen": [*call, SIX_TURN], "rejected": [*call, FISH_TURN]})
    assert tools.prompt == [*TURNS, *call]
    arena = question_of({"prompt": ["hi"], "response_a": ["Six."], "response_b": ["Fish."], "winner_model_b": 1})
    assert (arena.prompt, arena.worth) == ([{"role": "user", "content": "hi"}], (0.0, 1.0))
    many = question_of({"prompt": "x", "response_1": "a", "response_2": "b", "response_3": "c", "scores": [0, 1, 0]})
    assert (many.responses, many.worth) == (("a", "b", "c"), (0.0, 1.0, 0.0))
    passage = {"context": "a passage", "question": "?", "response": "y"}
    with pytest.raises(InputError, match="found context, question, response"):
        question_of(passage)


def test_verdicts() -> None:
    for said, worth in (
        ("model_b", (0.0, 1.0)), ("A", (1.0, 0.0)), ("B>A", (0.0, 1.0)), ("tie", (0.0, 0.0)),
        ("tie (bothbad)", (0.0, 0.0)), ("both_bad", (0.0, 0.0)),
    ):  # fmt: skip
        assert question_of({"prompt": "x", "response_a": "a", "response_b": "b", "winner": said}).worth == worth
    for name, said in (("label", 1), ("label", 0), ("winner", "gpt-4"), ("label", "1")):
        with pytest.raises(InputError, match=f'"{name}" is {said!r}: expected "model_a", "model_b" or "tie"'):
            question_of({"prompt": "x", "response_1": "a", "response_2": "b", name: said})
    for preference, worth in ((3, (0.0, 1.0)), (0, (0.0, 0.0)), ("-1", (1.0, 0.0))):
        record = {"context": TURNS, "response1": "a", "response2": "b", "overall_preference": preference}
        assert question_of(record).worth == worth
    with pytest.raises(InputError, match="found NaN"):
        question_of({"prompt": "x", "response1": "a", "response2": "b", "overall_preference": float("nan")})


def test_bytes_that_are_no_text_are_reported(tmp_path: Path) -> None:
    path, told = tmp_path / "a.jsonl", []
    path.write_bytes(
        b'{"prompt": "x", "chosen": "a\xff", "rejected": "b"}\n{"prompt": "x", "chosen": "a", "rejected": "b"}\n'
        b'{"prompt": "\xff", "chosen": "a", "rejected": "b"}\n'
        b'{"prompt": "x", "chosen": "a", "rejected": "b", "kind": "\xff"}'
    )
    found = read_questions(path, told.append)
    assert [question.kind for question in found] == ["all", "\\udcff"]
    assert [line.split(":")[0] for line in told] == ["a.jsonl, line 1", "a.jsonl, line 3"]
    assert all("lone surrogate" in line for line in told)


def test_questions_by_path_or_by_record(tmp_path: Path) -> None:
    record = {"prompt": "x", "chosen": "a", "rejected": "b"}
    path = tmp_path / "a.json"
    path.write_text(json.dumps([record, record]))
    expected = [question_of(record)] * 2
    for given in (path, str(path), [record, record], (record for _ in range(2)), expected, [expected[0], record]):
        assert questions_of(given) == expected
    for given, says in (
        (3, "found int 3"),
        (record, "found dict"),
        ([record, 3], "record 2: expected an object"),
        (None, "None"),
    ):
        with pytest.raises(InputError, match=says):
            questions_of(given)
    with pytest.raises(InputError, match="there is no file"):
        questions_of("gone.jsonl")


def test_a_plain_prompt_stays_text_whatever_it_says() -> None:
    """A named form wins, and half a dialogue is none: what a user wrote makes no turns."""
    for prompt, form in ((DIALOGUE, "plain"), ("\n\nHuman: and no end", None), ("x\n\nAssistant:", None)):
        record = {"prompt": prompt, "chosen": "a", "rejected": "b"} | ({"format": form} if form else {})
        assert question_of(record).prompt == prompt


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ([1], "expected an object"),
        ({}, "found nothing"),
        ({"prompt": "x", "text": "y"}, 'expected "chosen" and "rejected"'),
        ({"prompt": "x", "responses": []}, "no answer"),
        ({"prompt": "x", "responses": ["a"], "scores": [1, 2]}, "one number for each of the 1"),
        ({"prompt": "x", "responses": ["a"], "ranks": ["first"]}, "list of numbers"),
        ({"prompt": "x", "responses": ["a"], "scores": [float("nan")]}, "one number"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt must be"),
        ({"chosen": f"{DIALOGUE} a", "rejected": "\n\nHuman: other\n\nAssistant: b"}, "last turn only"),
        ({"chosen": TURNS, "rejected": TURNS[1:]}, "differ before"),
        ({"prompt": "x", "chosen": 1, "rejected": "b"}, "must be a list of strings"),
    ],
)
def test_what_is_wrong_is_said(record: object, says: str) -> None:
    with pytest.raises(InputError, match=says):
        question_of(record)


def test_files(tmp_path: Path) -> None:
    record = {"prompt": "x", "chosen": 'a, "b"\nc', "rejected": "d", "lang": "en", "kind": "k", "source": "s"}
    expected = [question_of(record)] * 2
    plain, zipped, table = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz", tmp_path / "a.csv"
    plain.write_text("\ufeff" + json.dumps(record) + "\n\n" + json.dumps(record), encoding="utf-8")
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(record))
        writer.writeheader()
        writer.writerows([record, record])
    columns = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record, record]), columns)
    for path in (plain, zipped, table, columns):
        assert read_questions(path) == expected, path.name

    lists = tmp_path / "lists.csv"
    with lists.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["prompt", "responses", "scores"], ["[x]", '["a", "b"]', "[2, 1]"]])
    assert read_questions(lists)[0].responses == ("a", "b")
    assert read_questions(lists)[0].worth == (2.0, 1.0)


def test_bad_records_are_numbered(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"prompt": "x", "chosen": "a", "rejected": "b"}\nnot json\n{"prompt": 1}\n', encoding="utf-8")
    told: list[str] = []
    assert len(read_questions(path, told.append)) == 1
    assert [line.split(":")[0] for line in told] == ["some.jsonl, line 2", "some.jsonl, line 3"]
    with pytest.raises(InputError, match=r"^some\.jsonl, line 2: not JSON"):
        read_questions(path)
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(InputError, match="no record"):
        read_questions(path)
    with pytest.raises(InputError, match="there is no file"):
        read_questions(tmp_path / "gone.jsonl")


def test_dialogues() -> None:
    assert dialogue_turns(DIALOGUE) == TURNS
    with pytest.raises(InputError, match="starts with a named turn"):
        dialogue_turns("hello\n\nHuman: x")
