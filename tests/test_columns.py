"""Columns of the libraries that people keep data in go in wherever a list is wanted, and what they hold is checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

import lightrm
from lightrm.errors import InputError
from lightrm.text.columns import items
from lightrm.text.conversation import asked_often, asked_once, responses_of, texts_of, turns_of
from tests.test_scoring import write_model

TEXTS = ["a", "天气", "c"]
ASK = [[{"role": "user", "content": text}] for text in TEXTS]
ODD = ["columns", "to_pylist", "ndim"]  # an index whose labels a pandas column takes for attributes


def dataset(values: list[Any]) -> Any:
    return datasets.Dataset.from_dict({"x": values})["x"]


def streamed(values: list[Any]) -> Any:
    return datasets.Dataset.from_dict({"x": values}).to_iterable_dataset()["x"]


MAKERS: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "generator": lambda values: (value for value in values),
    "values of a dictionary": lambda values: dict(enumerate(values)).values(),
    "numpy objects": lambda values: np.array([*values, None], object)[:-1],
    "pandas objects": lambda values: pd.Series(values, ODD[: len(values)], dtype=object),
    "pandas column": lambda values: pd.DataFrame({"x": values}, ODD[: len(values)])["x"],
    "pandas arrow": lambda values: pd.Series(pa.array(values), dtype=pd.ArrowDtype(pa.array(values).type)),
    "pandas index": lambda values: pd.Index(pd.Series(values, dtype=object)),
    "pyarrow": pa.array,
    "pyarrow chunks": lambda values: pa.chunked_array([values[:1], values[1:]]),
    "pyarrow column": lambda values: pa.table({"x": values})["x"],
    "pyarrow scalars": lambda values: list(pa.array(values)),
    "a scalar that is a list": lambda values: pa.array([values])[0],
    "datasets": dataset,
    "datasets, a slice": lambda values: dataset([*values, values[0]])[: len(values)],
    "datasets, streamed": streamed,
}
OF_TEXTS: dict[str, Callable[[list[str]], Any]] = {
    **MAKERS,
    "numpy": np.array,
    "numpy strings": lambda values: np.array(values, dtype=np.dtypes.StringDType()),
    "pandas strings": lambda values: pd.Series(values, dtype="string"),
    "pandas categories": lambda values: pd.Series(values, dtype="category"),
    "pyarrow dictionary": lambda values: pa.array(values).dictionary_encode(),
    "pyarrow large": lambda values: pa.array(values, pa.large_string()),
}


@pytest.mark.parametrize("make", OF_TEXTS.values(), ids=OF_TEXTS)
def test_texts(make: Callable[[list[str]], Any]) -> None:
    found = responses_of(make(TEXTS))
    assert (found, {type(text) for text in found}) == (TEXTS, {str})
    assert texts_of(make(TEXTS)) == TEXTS
    assert asked_once(make(TEXTS), make(TEXTS)) == [(ask, [text]) for ask, text in zip(ASK, TEXTS, strict=True)]
    assert asked_often(["p"], [make(TEXTS)]) == [([{"role": "user", "content": "p"}], TEXTS)]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_conversations_and_lists_of_lists(make: Callable[[list[Any]], Any]) -> None:
    """A column of conversations, one conversation as a column of turns, and a column of lists of answers."""
    assert [turns for turns, _ in asked_once(make(ASK), TEXTS)] == ASK
    turns = [{"role": "system", "content": "s"}, *ASK[0]]
    assert turns_of(make(turns)) == turns
    assert [texts for _, texts in asked_often(TEXTS, make([TEXTS, TEXTS[:1], TEXTS]))] == [TEXTS, TEXTS[:1], TEXTS]
    assert responses_of(make([{"role": "assistant", "content": text} for text in TEXTS])) == TEXTS


def test_arrays_of_two_dimensions() -> None:
    table = np.array([TEXTS, TEXTS])
    assert [texts for _, texts in asked_often(["p", "q"], table)] == [TEXTS, TEXTS], "a row for each prompt"
    for given in (table, table[:, :1], table.astype(object), pd.DataFrame(table).to_numpy()):
        rows, columns = given.shape
        for check in (responses_of, texts_of):
            with pytest.raises(InputError, match=rf"an array of {rows} x {columns}: pass one column, such as array\["):
                check(given)
    with pytest.raises(InputError, match="prompt 0 turn 0 must be a dictionary"):
        asked_once(table, ["x", "y"])
    turns = np.array([[{"role": "assistant", "content": text}] for text in TEXTS], object)
    assert responses_of(turns) == TEXTS, "a list of one turn for each answer"


TABLES = {
    "pandas": pd.DataFrame({"p": TEXTS, "r": TEXTS}),
    "pyarrow": pa.table({"p": TEXTS, "r": TEXTS}),
    "pyarrow batch": pa.record_batch({"p": TEXTS, "r": TEXTS}),
    "datasets": datasets.Dataset.from_dict({"p": TEXTS, "r": TEXTS}),
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_tables_are_refused(table: Any) -> None:
    name = type(table).__name__
    for check in (responses_of, texts_of, turns_of, lambda given: asked_once(given, TEXTS)):
        with pytest.raises(
            InputError, match=f"found {name}, a table with the columns 'p', 'r': pass one of its columns"
        ):
            check(table)
    with pytest.raises(InputError, match=r"'c3', 'c4', \.\.\.: pass one"):
        responses_of(pd.DataFrame({f"c{k}": TEXTS for k in range(9)}))


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("one text", "found one string: write"), (b"bytes", "found one string: write"), (np.str_("one"), "found one"),
        (pa.scalar("one"), "found one string: write"), ({"a": 1}, "found dict"), ({"a"}, "found set"),
        (frozenset("a"), "found frozenset"), ({"a": 1}.keys(), "found dict_keys"), (None, "found None"),
        (7, "found int 7"), (np.array("a"), "found ndarray"), (torch.tensor(1), "found Tensor"),
    ],
)  # fmt: skip
def test_what_is_no_list(given: Any, found: str) -> None:
    for check in (responses_of, texts_of):
        with pytest.raises(InputError, match=found):
            check(given)


class Far:
    """As a column on a card, or on another machine: it has __iter__, which says that it cannot."""

    def __iter__(self) -> Any:
        raise TypeError("Series is not iterable: use to_pandas")


def broken() -> Any:
    yield "a"
    raise TypeError("from the caller's own code")


def test_columns_that_cannot_be_read() -> None:
    with pytest.raises(InputError, match="found Far, whose items cannot be read: Series is not iterable: use to_pand"):
        items(Far(), "expected texts")
    with pytest.raises(TypeError, match="the caller's own"):  # and nothing of it is hidden
        items(broken(), "expected texts")


@pytest.mark.parametrize(
    ("make", "value", "found"),
    [
        (list, None, "None"), (list, float("nan"), "float nan"), (list, 3, "int 3"), (list, b"x", "bytes b'x'"),
        (list, np.float32(2), "float32"), (list, pd.NA, "NAType <NA>"), (list, pa.scalar(3), "int 3"),
        (pa.array, None, "None"), (dataset, None, "None"),
        (lambda values: pd.Series(values, dtype=object), None, "None"),
        (lambda values: pd.Series(values, dtype="string"), None, "NAType <NA>"),
        (pd.Series, None, "(float nan|None)"), (lambda values: np.array(values, object), b"x", "bytes b'x'"),
        (lambda values: np.ma.masked_array(values, [False, True]), "b", "MaskedConstant"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named_by_its_index(make: Callable[[list[Any]], Any], value: Any, found: str) -> None:
    given = make(["a", value])
    with pytest.raises(InputError, match=f"^response 1 must be a string, found {found}"):
        responses_of(given)
    with pytest.raises(InputError, match=f"^text 1 must be a string, found {found}"):
        texts_of(given)
    with pytest.raises(InputError, match=f"^prompt 1 must be a string or a non-empty list of turns, found {found}"):
        asked_once(given, ["x", "y"])
    with pytest.raises(InputError, match=f"^prompt 1: response 1 must be a string, found {found}"):
        asked_often(["p", "q"], [["a"], given])
    with pytest.raises(InputError, match=f"^response 1 must be a string, found {found}"):
        asked_often(["p"], [given])


@pytest.fixture(scope="module")
def rm(tmp_path_factory: pytest.TempPathFactory) -> lightrm.RewardModel:
    return lightrm.load(write_model(tmp_path_factory.mktemp("model")), scheme="fp32")


def test_every_method_takes_columns(rm: lightrm.RewardModel) -> None:
    """And gives what it gives for a list."""
    frame = pd.DataFrame({"prompt": TEXTS, "response": ["it is", "no", "b"], "responses": [TEXTS, TEXTS[:2], ["x"]]})
    rows = datasets.Dataset.from_pandas(frame)
    prompts, responses, lists = (frame[name].tolist() for name in frame)
    expected = rm.score_batch(prompts, responses)
    for table in (frame, rows, pa.Table.from_pandas(frame)):
        np.testing.assert_array_equal(rm.score_batch(table["prompt"], table["response"]), expected)
        np.testing.assert_array_equal(rm.score("a", table["response"]), rm.score("a", responses))
        assert dict(rm.stream(table["prompt"], table["response"])) == dict(enumerate(expected.tolist()))
        ranked = rm.rank_batch(table["prompt"], table["responses"])
        assert [[one.position for one in found] for found in ranked] == [
            [one.position for one in found] for found in rm.rank_batch(prompts, lists)
        ]
        assert [one.response for one in rm.rank("a", table["response"])] == [
            one.response for one in rm.rank("a", responses)
        ]
        np.testing.assert_array_equal(rm.score_text(table["response"]), rm.score_text(responses))
        assert rm.encode(table["prompt"], table["response"]) == rm.encode(prompts, responses)
        ids = rm.encode(prompts, responses)
        np.testing.assert_array_equal(rm.score_ids(pa.array(ids)), rm.score_ids(pd.Series(ids)))
