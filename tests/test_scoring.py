"""The API: order, types, input that is not text, cutting, explaining."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import lightrm
from lightrm.errors import TooLongError
from lightrm.model.head import ValueHead
from tests.zoo import HEAD_WEIGHT, LLAMA_CONFIG, Specimen, llama_weights, write_tokenizer


def write_model(folder: Path, vocabulary: int = 400) -> Path:
    weights = llama_weights() | {"value_head.weight": HEAD_WEIGHT}
    weights["model.embed_tokens.weight"] = torch.randn(vocabulary, 32, generator=torch.Generator().manual_seed(2))
    write_tokenizer(folder)
    return Specimen({"model.safetensors": weights}, LLAMA_CONFIG).write(folder)


@pytest.fixture(scope="module")
def rm(tmp_path_factory: pytest.TempPathFactory) -> lightrm.RewardModel:
    return lightrm.load(write_model(tmp_path_factory.mktemp("model")))


ANSWERS = ["it is sunny", "", "天气很好。", "it is warm and it is sunny " * 5, "x"]


def test_score_keeps_order_and_type(rm: lightrm.RewardModel) -> None:
    scores = rm.score("what is the weather?", ANSWERS)
    assert scores.dtype == np.float32
    assert scores.shape == (5,)
    one_by_one = np.concatenate([rm.score("what is the weather?", [a]) for a in ANSWERS])
    np.testing.assert_allclose(scores, one_by_one, atol=1e-5)
    np.testing.assert_allclose(rm.score("what is the weather?", ANSWERS[::-1]), scores[::-1], atol=1e-5)
    assert len(set(scores.tolist())) == 5


def test_no_responses(rm: lightrm.RewardModel) -> None:
    for scores in (rm.score("x", []), rm.score_batch([], []), rm.score_ids([])):
        assert scores.shape == (0,)
        assert scores.dtype == np.float32
    assert rm.rank("x", []) == []


def test_score_batch_takes_prompts_of_both_forms(rm: lightrm.RewardModel) -> None:
    prompts = ["what?", [{"role": "user", "content": "what?"}], "other"]
    scores = rm.score_batch(prompts, ["it is"] * 3)
    assert scores[0] == scores[1] != scores[2]


def test_rank(rm: lightrm.RewardModel) -> None:
    ranked = rm.rank("what?", [*ANSWERS, ANSWERS[0]])
    assert [r.score for r in ranked] == sorted((r.score for r in ranked), reverse=True)
    assert all(r.response == [*ANSWERS, ANSWERS[0]][r.index] for r in ranked)
    twins = [r.index for r in ranked if r.response == ANSWERS[0]]
    assert twins == [0, 5], "equal scores keep their input order"


def test_equal_answers_have_equal_scores(rm: lightrm.RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if a product of floats were rounded otherwise in each row of a batch."""
    exact = ValueHead.__call__
    monkeypatch.setattr(ValueHead, "__call__", lambda head, x_SD: exact(head, x_SD) + torch.arange(len(x_SD)))
    scores = rm.score("what?", ["x", *ANSWERS, "", "x"])
    assert scores[0] == scores[5] == scores[7]
    assert scores[2] == scores[6]
    assert [r.index for r in rm.rank("what?", ["x"] * 4)] == [0, 1, 2, 3]
    ids, done = [[5, 6, 7], [8], [5, 6, 7], [5, 6], [8], [8]], []
    found = {
        k: score for group, some in rm.engine.scores(ids, done.append) for k, score in zip(group, some, strict=True)
    }
    assert sorted(found) == list(range(6))
    assert found[0] == found[2]
    assert found[1] == found[4] == found[5]
    assert sum(done) == pytest.approx(sum(map(len, ids)))


def test_the_best_of_a_ranking(rm: lightrm.RewardModel) -> None:
    whole = rm.rank("what?", ANSWERS)
    assert rm.rank("what?", ANSWERS, top_k=2) == whole[:2]
    assert rm.rank("what?", ANSWERS, top_k=99) == whole
    assert [[r.index for r in one] for one in rm.rank_batch(["what?"] * 2, [ANSWERS, ANSWERS[:1]], top_k=1)] == [
        [whole[0].index], [0],
    ]  # fmt: skip
    bare = rm.rank("what?", ANSWERS, top_k=2, return_documents=False)
    assert [(r.index, r.score, r.response) for r in bare] == [(r.index, r.score, "") for r in whole[:2]]
    for wrong in (0, -1, True, 1.5, "2"):
        with pytest.raises(lightrm.InputError, match="top_k must be a positive whole number, found"):
            rm.rank("what?", ANSWERS, top_k=wrong)  # type: ignore[arg-type]
    with pytest.warns(DeprecationWarning, match=r"position is index now, and goes in lightrm 0\.2"):
        assert whole[0].position == whole[0].index


@pytest.mark.parametrize("call", [
    lambda rm, text: rm.score("what?", [text]), lambda rm, text: rm.score_batch(["what?"], [text]),
    lambda rm, text: rm.score_text([text]), lambda rm, text: next(rm.stream(["what?"], [text])),
    lambda rm, text: rm.rank("what?", [text]), lambda rm, text: rm.rank_batch(["what?"], [[text]]),
    lambda rm, text: rm.predict([("what?", text)]), lambda rm, text: rm.encode(["what?"], [text]),
])  # fmt: skip
def test_a_warning_of_cuts_points_at_the_caller(rm: lightrm.RewardModel, call: Callable[..., object]) -> None:
    with pytest.warns(lightrm.TruncationWarning) as caught:
        call(rm, "it is sunny and warm. " * 60)
    assert [one.filename for one in caught] == [__file__]


def test_score_ids_takes_lists_and_arrays(rm: lightrm.RewardModel) -> None:
    ids = [1, 5, 9, 2]
    forms = [ids, np.array(ids), torch.tensor(ids), tuple(ids)]
    assert len(set(rm.score_ids(forms).tolist())) == 1


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([], "sequence 1 must be a non-empty list"),
        ([1.5], "whole numbers"),
        (["a"], "whole numbers"),
        ([[1]], "non-empty list"),
        (None, "found None"),
        ([400], "holds id 400, this model has ids 0 to 399"),
        ([-1], "holds id -1"),
        ([1] * 257, "257 tokens, this model has 256 positions"),
    ],
)
def test_bad_ids(rm: lightrm.RewardModel, ids: object, says: str) -> None:
    with pytest.raises(lightrm.InputError, match=says):
        rm.score_ids([[1], ids])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("prompt", "responses", "says"),
    [
        (None, ["a"], "prompt must be a string or a non-empty list of turns, found None"),
        (3, ["a"], "found int 3"),
        ([], ["a"], "non-empty list of turns"),
        (b"x", ["a"], "found bytes"),
        ([{"role": "user"}], ["a"], "turn 0 must be a dictionary with 'role' and 'content'"),
        ([{"role": "robot", "content": "x"}], ["a"], "role 'robot' is none of system, user, assistant"),
        ([{"role": "user", "content": None}], ["a"], "prompt turn 0 must be a string, found None"),
        ([{"role": "assistant", "content": "x"}], ["a"], "must end in a user turn"),
        ("x", "a", r"found one string: write \[response\]"),
        ("x", None, "responses must be a list of strings, found None"),
        ("x", ["a", None], "response 1 must be a string, found None"),
        ("x", [7], "response 0 must be a string, found int 7"),
        ("x", ["\ud800"], "response 0 holds a lone surrogate"),
        ("a\udfff", ["x"], "prompt holds a lone surrogate .* at character 1"),
    ],
)
def test_bad_input(rm: lightrm.RewardModel, prompt: object, responses: object, says: str) -> None:
    with pytest.raises(lightrm.InputError, match=says):
        rm.score(prompt, responses)  # type: ignore[arg-type]


def test_batches_must_match(rm: lightrm.RewardModel) -> None:
    with pytest.raises(lightrm.InputError, match="found 2 prompts and 1 responses"):
        rm.score_batch(["a", "b"], ["c"])
    with pytest.raises(lightrm.InputError, match="found one string and 1 responses"):
        rm.score_batch("a", ["c"])


@pytest.mark.parametrize("text", ["", "\x00", "a\x00b", "\ufffe", "\u202e", "😀", "\r\n\t", "e\u0301"])
def test_odd_text_has_a_defined_score(rm: lightrm.RewardModel, text: str) -> None:
    scores = rm.score_batch([text, "x"], ["x", text])
    assert np.isfinite(scores).all()
    assert scores[0] == rm.score(text, ["x"])[0] or np.isclose(scores[0], rm.score(text, ["x"])[0], atol=1e-5)


def test_nul_is_a_byte_of_its_own(rm: lightrm.RewardModel) -> None:
    assert "<0x00>" in rm.explain("a\x00b", "x").pieces, "a NUL does not end the text"


def test_overlong_text_warns_once_or_raises(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    long = "it is sunny and warm. " * 40
    rm = lightrm.load(folder, max_length=64)
    with pytest.warns(
        lightrm.TruncationWarning, match=r"2 of 3 texts were longer than 64 tokens and lost \d+ tokens"
    ) as caught:
        scores = rm.score("what?", [long, "short", long + "!"])
    assert len(caught) == 1
    assert caught[0].filename == __file__, "the warning points at the caller"
    assert scores[0] == scores[2]
    assert rm.explain("what?", long).token_ids[-1] == 2, "EOS is kept"
    assert rm.explain("what?", long).cut > 0
    strict = lightrm.load(folder, max_length=64, strict=True)
    with pytest.raises(TooLongError, match="the limit is 64"):
        strict.score("what?", [long])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strict.score("what?", ["short"])
    with pytest.raises(lightrm.InputError, match="between 8 and this model's 256 positions, found 257"):
        lightrm.load(folder, max_length=257)
    with pytest.raises(lightrm.InputError, match="token_budget must be a positive whole number"):
        lightrm.load(folder, token_budget=0)


def test_explain(rm: lightrm.RewardModel) -> None:
    explained = rm.explain("what is the weather?", "it <s> is")
    assert explained.text == "<s>Human:what is the weather?\n\nAssistant:it <s> is</s>"
    assert explained.token_ids[0] == 1
    assert explained.token_ids[-1] == 2
    assert explained.token_ids.count(1) == 1, "the user's <s> is text"
    assert len(explained.pieces) == len(explained.token_ids)
    assert explained.score == rm.score("what is the weather?", ["it <s> is"])[0]
    assert "template ziya" in str(explained)
    assert "&lt;s&gt;" in explained._repr_html_()


def test_repr_says_what_runs_and_why(rm: lightrm.RewardModel) -> None:
    text = repr(rm)
    for part in ("ziya", "llama 2x32", "RoPE", "linear, no bias, raw", "fp32", "on cpu", "because"):
        assert part in text
    assert "MiB" in str(rm.report)


def test_without_tokenizer_files_ids_still_score(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()
    rm = lightrm.load(folder)
    assert np.isfinite(rm.score_ids([[1, 2, 3]])).all()
    assert "score_ids only" in repr(rm)
    with pytest.raises(lightrm.TokenizerError, match="copy the model's tokenizer files"):
        rm.score("x", ["y"])
    with pytest.raises(lightrm.TokenizerError, match="neither"):
        lightrm.load(folder, template="ziya")


def test_overflowing_scores_raise(rm: lightrm.RewardModel, tmp_path: Path) -> None:
    weights = llama_weights() | {"value_head.weight": HEAD_WEIGHT * 1e38}
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1e4
    broken = lightrm.load(Specimen({"model.safetensors": weights}, LLAMA_CONFIG).write(tmp_path))
    with pytest.raises(lightrm.NumericsError, match="the score of sequence 0 is"):
        broken.score_ids([[1, 2]])


def test_a_model_shows_what_users_call(rm: lightrm.RewardModel) -> None:
    assert {name for name in dir(rm) if not name.startswith("_")} == {
        "score", "score_batch", "score_ids", "score_text", "stream", "rank", "rank_batch", "explain", "encode", "save",
        "score_steps", "score_steps_batch", "score_attributes", "attributes", "predict", "num_labels",
        "model_card_data",
        "device", "template", "max_length", "token_budget", "checkpoint", "engine", "report", "text",
    }  # fmt: skip
