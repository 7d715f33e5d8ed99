"""What sentence-transformers' evaluators call on a model, in the exact shape of their calls.

The evaluators themselves run in `benchmarks/clients/sentence_transformers.py`: scikit-learn and the rest of them are
too much for CI.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import lightrm

PAIRS = [["How do I make tea?", "Boil water and pour it over."], ["How do I make tea?", "Boil water and"], ["x", "y"]]


@pytest.fixture(scope="module")
def rm() -> lightrm.RewardModel:
    return lightrm.load("demo", scheme="w8a8", device="cpu")


class Evaluator:
    """The calls of sentence-transformers 6.2.0's CrossEncoderRerankingEvaluator, ...ClassificationEvaluator and
    ...CorrelationEvaluator."""

    name = "dev"

    def __call__(self, model: Any) -> np.ndarray:
        found = model.predict(
            PAIRS, prompt_name=None, batch_size=64, convert_to_numpy=True, show_progress_bar=False
        )  # fmt: skip
        assert model.num_labels == 1
        model.model_card_data.set_evaluation_metrics(self, {"dev_map": 0.5}, -1, -1)
        return found


def test_an_evaluator_finds_what_it_calls(rm: lightrm.RewardModel) -> None:
    found = Evaluator()(rm)
    expected = rm.score_batch([prompt for prompt, _ in PAIRS], [answer for _, answer in PAIRS])
    assert found.dtype == np.float32
    assert found.tobytes() == expected.tobytes()
    assert rm.model_card_data.metrics == {"Evaluator dev": {"dev_map": 0.5}}


def test_pairs_of_every_kind(rm: lightrm.RewardModel) -> None:
    expected = rm.predict(PAIRS).tobytes()
    turns = [([{"role": "user", "content": p}], [{"role": "assistant", "content": r}]) for p, r in PAIRS]
    for pairs in (list(map(tuple, PAIRS)), np.asarray(PAIRS), (tuple(pair) for pair in PAIRS), turns):
        assert rm.predict(pairs).tobytes() == expected
    assert rm.predict([]).shape == (0,)


def test_batch_size_changes_no_score(rm: lightrm.RewardModel) -> None:
    assert rm.predict(PAIRS, batch_size=1).tobytes() == rm.predict(PAIRS, batch_size=64).tobytes()


@pytest.mark.parametrize(
    ("pairs", "options", "says"),
    [
        (("a", "b"), {}, r"pair 0 must be \(prompt, response\), found str 'a'; one pair is a list of one"),
        ([("a", "b"), ("a", "b", "c")], {}, r"pair 1 must be \(prompt, response\), found tuple"),
        ("ab", {}, r"expected a list of \(prompt, response\) pairs, found str 'ab'"),
        ([{"prompt": "a"}], {}, r"pair 0 must be \(prompt, response\), found dict"),
        ([("a", None)], {}, "response 0 must be a string, found None"),
        (PAIRS, {"prompt_name": "query"}, "prompt_name='query': lightrm has no prompts by name"),
        (PAIRS, {"convert_to_numpy": False}, "scores are a numpy array"),
        (PAIRS, {"batch_size": 0}, "batch_size must be a positive whole number, found 0"),
    ],
)
def test_what_is_no_list_of_pairs(pairs: Any, options: dict[str, Any], says: str, rm: lightrm.RewardModel) -> None:
    with pytest.raises(lightrm.InputError, match=says):
        rm.predict(pairs, **options)


def test_a_ranking_reads_as_cross_encoders(rm: lightrm.RewardModel) -> None:
    """`CrossEncoder.rank(query, documents, top_k=, return_documents=)` returns dictionaries with these keys."""
    query, documents = PAIRS[0][0], [PAIRS[1][1], PAIRS[0][1], "A sonnet has fourteen lines."]
    scores = rm.predict([(query, text) for text in documents])
    hits = rm.rank(query, documents, top_k=2, return_documents=True)
    order = np.argsort(-scores)[:2].tolist()
    assert [(hit["corpus_id"], hit["score"], hit["text"]) for hit in hits] == [
        (i, float(scores[i]), documents[i]) for i in order
    ]
    assert [(hit.index, hit.score, hit.response) for hit in hits] == [
        (hit["corpus_id"], hit["score"], hit["text"]) for hit in hits
    ]
    with pytest.raises(KeyError):
        hits[0]["position"]
