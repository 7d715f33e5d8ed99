"""The class that Ray Data maps over batches, on batches as Ray 2.60 hands them over; Ray itself is not needed.

`benchmarks/clients/ray_data.py` runs it in Ray.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import lightrm
from lightrm.integrations.ray import Scorer
from tests.test_answer_numbers import several_numbers

W8A8 = {"scheme": "w8a8"}
PROMPTS = ["How do I make tea?", "Why is the sky blue?", "How do I make tea?"]
ANSWERS = ["Boil water and pour it over the leaves.", "Air scatters blue light most.", "Boil water and"]
LISTS = [ANSWERS[:2], ANSWERS[:1], []]
TURNS = [
    [{"role": "user", "content": PROMPTS[0]}],
    [
        {"role": "user", "content": PROMPTS[1]},
        {"role": "assistant", "content": "Because."},
        {"role": "user", "content": "Why?"},
    ],
    [{"role": "user", "content": PROMPTS[2]}],
]
FORMS = ("numpy", "pandas", "pyarrow")


@pytest.fixture(scope="module")
def rm() -> lightrm.RewardModel:
    return lightrm.load("demo", **W8A8)


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer("demo", W8A8)


def objects(values: list[Any]) -> np.ndarray:
    """One-dimensional, whatever lies in it."""
    found = np.empty(len(values), dtype=object)
    for k, value in enumerate(values):
        found[k] = value
    return found


def batch(form: str, **columns: list[Any]) -> Any:
    """Columns as Ray hands them over: lists as arrays of objects for numpy, as lists of Arrow's in pandas."""
    if form == "pyarrow":
        return pa.table(columns)
    if form == "pandas":
        return pa.table(columns).to_pandas(types_mapper=pd.ArrowDtype)
    return {
        name: objects([objects(one) if isinstance(one, list) else one for one in values])
        for name, values in columns.items()
    }


def column(made: Any, name: str) -> list[Any]:
    values = made[name]
    return values.to_pylist() if hasattr(values, "to_pylist") else list(values)


@pytest.mark.parametrize("form", FORMS)
def test_a_column_of_scores(form: str, rm: lightrm.RewardModel, scorer: Scorer) -> None:
    given = batch(form, prompt=PROMPTS, response=ANSWERS, n=[1, 2, 3])
    made = scorer(given)
    assert type(made) is type(given)
    assert np.asarray(column(made, "score"), np.float32).tobytes() == rm.score_batch(PROMPTS, ANSWERS).tobytes()
    assert column(made, "n") == [1, 2, 3]
    assert "score" not in (given.column_names if form == "pyarrow" else given)
    assert str({"numpy": lambda: made["score"].dtype, "pandas": lambda: made["score"].dtype,
                "pyarrow": lambda: made.schema.field("score").type}[form]()) in ("float32", "float")  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_conversations(form: str, rm: lightrm.RewardModel, scorer: Scorer) -> None:
    """Prompts in turns, some with fields that others lack; and whole conversations, the answer last."""
    right = rm.score_batch(TURNS, ANSWERS)
    made = scorer(batch(form, prompt=TURNS, response=ANSWERS))
    assert np.asarray(column(made, "score"), np.float32).tobytes() == right.tobytes()
    whole = [[*turns, {"role": "assistant", "content": text}] for turns, text in zip(TURNS, ANSWERS, strict=True)]
    sparse = [[{**turn, "name": None} for turn in turns] for turns in whole]
    conversations = Scorer("demo", W8A8, prompt=None, response="messages", output="reward")
    for messages in (whole, sparse):
        made = conversations(batch(form, messages=messages))
        assert np.asarray(column(made, "reward"), np.float32).tobytes() == right.tobytes()


@pytest.mark.parametrize("form", FORMS)
def test_lists_of_answers(form: str, rm: lightrm.RewardModel) -> None:
    scorer = Scorer("demo", W8A8, responses="answers")
    made = column(scorer(batch(form, prompt=PROMPTS, answers=LISTS)), "scores")
    right = [rm.score(prompt, texts).tolist() if texts else [] for prompt, texts in zip(PROMPTS, LISTS, strict=True)]
    assert [list(one) for one in made] == right
    assert len(column(scorer(batch("pyarrow", prompt=["a"], answers=[["b"]]).slice(0, 0)), "scores")) == 0


def test_lists_stay_lists_for_ray() -> None:
    """Ray makes arrays of lists, and of arrays of dictionaries it would store pickles."""
    made = Scorer("demo", W8A8, responses="answers")(batch("numpy", prompt=TURNS, answers=LISTS))
    assert pa.array(made["prompt"]).to_pylist() == TURNS
    assert pa.array(made["answers"]).to_pylist() == LISTS
    assert pa.types.is_list(pa.array(made["scores"]).type)


def test_a_batch_and_its_rows_have_the_same_bits(scorer: Scorer) -> None:
    together = scorer(batch("numpy", prompt=PROMPTS, response=ANSWERS))["score"]
    alone = [
        scorer(batch("numpy", prompt=[prompt], response=[answer]))["score"]
        for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
    ]
    assert np.concatenate(alone).tobytes() == together.tobytes()
    empty = scorer(batch("numpy", prompt=[], response=[]))["score"]
    assert (empty.dtype, empty.shape) == (np.float32, (0,))


@pytest.mark.parametrize("form", FORMS)
def test_bad_rows(form: str, rm: lightrm.RewardModel, scorer: Scorer) -> None:
    """One stops the batch with its number, or has its error in a column while all others are scored."""
    odd = [*TURNS[:2], [{"role": "user", "content": "a", "name": "Bob"}]]  # which the template has no place for
    given = {"prompt": odd, "response": [ANSWERS[0], None, ANSWERS[2]]}
    with pytest.raises(lightrm.InputError, match=r"row 1 of the batch: the response must be a string, found"):
        scorer(batch(form, **given))
    with pytest.raises(lightrm.TemplateError, match=r"row 2 of the batch: .*no place for a turn's 'name'"):
        scorer(batch(form, prompt=odd, response=ANSWERS))
    made = Scorer("demo", W8A8, errors="wrong")(batch(form, **given))
    scores, wrong = column(made, "score"), column(made, "wrong")
    assert scores[0] == rm.score(TURNS[0], ANSWERS[:1]).item()
    assert np.isnan(np.asarray(scores[1:], np.float32)).all()
    assert pd.isna(wrong[0])
    assert "must be a string" in wrong[1]
    assert "no place for" in wrong[2]
    lists = Scorer("demo", W8A8, responses="answers", errors="wrong")
    made = lists(batch(form, prompt=PROMPTS, answers=[ANSWERS, [None], [ANSWERS[0]]]))
    found = column(made, "scores")
    assert list(found[0]) == rm.score(PROMPTS[0], ANSWERS).tolist()
    assert found[1] is None
    assert list(found[2]) == rm.score(PROMPTS[2], ANSWERS[:1]).tolist()


@pytest.mark.parametrize("form", FORMS)
def test_columns_are_checked(form: str, scorer: Scorer) -> None:
    with pytest.raises(lightrm.InputError, match="the batch has no column 'prompt': it has question, response"):
        scorer(batch(form, question=["a"], response=["b"]))
    with pytest.raises(lightrm.InputError, match="has a column 'score' already: pass another name as output="):
        scorer(batch(form, prompt=["a"], response=["b"], score=[1.0]))


def test_what_is_no_batch(scorer: Scorer) -> None:
    for wrong in ([{"prompt": "a", "response": "b"}], "a", None, 3):
        with pytest.raises(lightrm.InputError, match="a batch must be a dictionary of arrays, a pandas data frame or"):
            scorer(wrong)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"response": "prompt"}, "must be different columns, found prompt, prompt, score"),
        ({"output": "response"}, "must be different columns"),
        ({"errors": "score"}, "must be different columns"),
        ({"prompt": None, "responses": "answers"}, "prompt=None is for whole conversations"),
        ({"options": {"shceme": "w8a8"}}, "options has 'shceme'; those that can be passed on are scheme,"),
        ({"options": ["w8a8"]}, "options must be a dictionary of lightrm.load's options, found list"),
        ({"label": "good"}, "no attribute 'good'; it has a single output"),
        ({"options": {"reduce": "min"}}, "reduce is for process reward models"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(lightrm.InputError, match=says):
        Scorer("demo", **arguments)


def test_it_crosses_processes_by_its_arguments(rm: lightrm.RewardModel, scorer: Scorer) -> None:
    """The class and its arguments are pickled; a model in memory is not."""
    cls, arguments = pickle.loads(pickle.dumps((Scorer, {"model": "demo", "options": W8A8, "errors": "e"})))
    assert cls(**arguments).errors == "e"
    with pytest.raises(lightrm.InputError, match="each process loads the model by itself"):
        Scorer(rm)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="pass its path and options to the other process"):
        pickle.dumps(scorer)


def test_attributes_and_steps(tmp_path: Path) -> None:
    models = several_numbers(tmp_path)
    made = Scorer(models["labels"], {"scheme": "fp32"}, label="true")(batch("numpy", prompt=["what?"], response=["it"]))
    right = lightrm.load(models["labels"], scheme="fp32").score_attributes("what?", ["it"])[0, 1]
    assert made["score"][0] == pytest.approx(right, rel=1e-5)
    answer, options = "We need 6 * 7.\n\nIt is 42.", {"scheme": "fp32", "reduce": "min"}
    made = Scorer(models["steps"], options)(batch("numpy", prompt=["6 * 7?"], response=[answer]))
    assert made["score"][0] == pytest.approx(lightrm.load(models["steps"], **options).score("6 * 7?", [answer]).item())
