"""The functions that OpenRLHF, verl and slime call, in the shape in which their sources call them.

The calls are written down from OpenRLHF 0.11.2, verl 0.9.1 and slime of August 2026; none of them is imported here.
`benchmarks/clients/trainers.py` runs the trainers' own code on the same functions.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import lightrm
from lightrm.integrations import configured, openrlhf, slime, verl
from lightrm.integrations.gathering import Gathered
from tests.test_answer_numbers import several_numbers

PROMPTS = ["How do I make tea?", "Why is the sky blue?", "How do I make tea?"]
ANSWERS = ["Boil water and pour it over the leaves.", "Air scatters blue light most.", "Boil water and"]
TEXTS = [f"Human: {prompt}\n\nAssistant: {answer}" for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]


@pytest.fixture(scope="module")
def rm() -> lightrm.RewardModel:
    return lightrm.load("demo", scheme="w8a8")


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return several_numbers(tmp_path_factory.mktemp("several"))


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment names the bundled model in w8a8; a process of its own begins."""
    for name in ("LABEL", "TEXTS", "ANSWER_END"):
        monkeypatch.delenv(f"LIGHTRM_{name}", raising=False)
    monkeypatch.setenv("LIGHTRM_MODEL", "demo")
    monkeypatch.setenv("LIGHTRM_OPTIONS", '{"scheme": "w8a8"}')
    return monkeypatch


@dataclass
class Sample:
    """The fields of slime's sample that a reward may read."""

    prompt: str | list[dict[str, str]]
    response: str
    label: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def test_openrlhf_runs_the_file_and_calls_it_in_threads(demo: pytest.MonkeyPatch, rm: lightrm.RewardModel) -> None:
    """Recorded shape of SingleTurnAgentExecutor: a module named reward_func, lists of one, asyncio.to_thread."""
    spec = importlib.util.spec_from_file_location("reward_func", openrlhf.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    async def rollouts() -> list[dict[str, Any]]:
        asked = zip(TEXTS, PROMPTS, strict=True)
        return await asyncio.gather(*(asyncio.to_thread(module.reward_func, [q], [p], ["label"]) for q, p in asked))

    found = asyncio.run(rollouts())
    assert all(set(one) == {"rewards", "scores", "extra_logs"} for one in found)
    for key in ("rewards", "scores"):
        assert [one[key].shape for one in found] == [(1,)] * 3, (
            "OpenRLHF makes one number of it: torch.tensor([reward])"
        )
        assert [one[key].item() for one in found] == rm.score_text(TEXTS).tolist()


def test_openrlhf_plain_texts(demo: pytest.MonkeyPatch, rm: lightrm.RewardModel) -> None:
    """The answer is what follows the prompt, without what the policy closes it with."""
    demo.setenv("LIGHTRM_TEXTS", "plain")
    demo.setenv("LIGHTRM_ANSWER_END", "<|im_end|>")
    queries = [f"{prompt}{answer}<|im_end|>" for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    found = openrlhf.reward_func(queries, PROMPTS, None, more=1)
    np.testing.assert_array_equal(found["rewards"], rm.score_batch(PROMPTS, ANSWERS))
    with pytest.raises(lightrm.InputError, match="query 0 does not begin with its prompt"):
        openrlhf.reward_func(["Why?"], ["How?"], [None])
    with pytest.raises(lightrm.InputError, match="of one length, found 1 and 2"):
        openrlhf.reward_func(["a"], ["a", "b"], [None])
    with pytest.raises(lightrm.InputError, match="query 0 must be a string, found int 3"):
        openrlhf.reward_func([3], ["a"], [None])  # type: ignore[list-item]


def test_verl_calls_by_keyword_in_threads(demo: pytest.MonkeyPatch, rm: lightrm.RewardModel) -> None:
    """Recorded shape of verl's get_custom_reward_fn and naive reward manager: the prompt is in extra_info."""
    reward_kwargs = {"model": "demo", "options": {"scheme": "w8a8"}}
    demo.delenv("LIGHTRM_MODEL")

    def call_with_kwargs(raw_fn: Any, extra: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return raw_fn(*args, **{**kwargs, **extra})

    function = partial(call_with_kwargs, verl.compute_score, reward_kwargs)
    turns = [np.asarray([{"role": "user", "content": prompt}], dtype=object) for prompt in PROMPTS]

    def one(k: int) -> float:
        extra = {"index": k, "raw_prompt": turns[k], "num_turns": None, "rollout_reward_scores": {}}
        return function(data_source="x", solution_str=ANSWERS[k], ground_truth="", extra_info=extra)

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(one, range(3))) == rm.score_batch(PROMPTS, ANSWERS).tolist()


def test_verl_finds_the_prompt(demo: pytest.MonkeyPatch, rm: lightrm.RewardModel) -> None:
    right = rm.score(PROMPTS[0], [ANSWERS[0]]).item()
    turns = [{"role": "user", "content": PROMPTS[0]}]
    score = partial(verl.compute_score, "gsm8k", ANSWERS[0], None)
    assert score({"raw_prompt": turns, "prompt": "other"}) == right
    assert score({"raw_prompt": None, "prompt": PROMPTS[0]}) == right
    assert score({"question": PROMPTS[0]}, prompt_key="question") == right
    assert score({"prompt": turns}, reward_router_address=None, reward_model_tokenizer=None) == right
    with pytest.raises(lightrm.InputError, match=r"no 'raw_prompt' or 'prompt', only index, question: put the prompt"):
        score({"index": 1, "question": PROMPTS[0]})
    with pytest.raises(lightrm.InputError, match=r"no 'query', only nothing: .*reward_kwargs.prompt_key"):
        score({}, prompt_key="query")
    with pytest.raises(lightrm.InputError, match="extra_info must be a dictionary that holds the prompt, found None"):
        score(None)
    with pytest.raises(lightrm.InputError, match="options and label are for a model"):
        score({"prompt": "a"}, options={"scheme": "w8a8"})


def test_slime_awaits_a_sample_or_a_group(demo: pytest.MonkeyPatch, rm: lightrm.RewardModel) -> None:
    """Recorded shape of slime's async_rm and batched_async_rm."""
    asked = list(zip(PROMPTS, ANSWERS, strict=True))
    turns = [Sample([{"role": "user", "content": prompt}], answer) for prompt, answer in asked]
    right = rm.score_batch(PROMPTS, ANSWERS).tolist()

    async def rollouts(args: Any, samples: list[Sample]) -> list[Any]:
        return await asyncio.gather(*(slime.custom_rm(args, sample, evaluation=False) for sample in samples))

    plain, chat = SimpleNamespace(apply_chat_template=False), SimpleNamespace(apply_chat_template=True)
    assert asyncio.run(rollouts(plain, turns)) == right
    assert asyncio.run(rollouts(chat, turns)) == right, "turns are no templated text"
    assert asyncio.run(slime.custom_rm(plain, turns)) == right
    assert asyncio.run(slime.custom_rm(plain, [])) == []
    strings = [Sample(prompt, answer) for prompt, answer in asked]
    assert asyncio.run(slime.custom_rm(plain, strings)) == right
    templated = [Sample(f"Human: {prompt}\n\nAssistant: ", answer) for prompt, answer in asked]
    assert asyncio.run(slime.custom_rm(chat, templated)) == rm.score_text(TEXTS).tolist()
    demo.setenv("LIGHTRM_TEXTS", "templated")
    assert asyncio.run(slime.custom_rm(plain, templated)) == rm.score_text(TEXTS).tolist()
    demo.setenv("LIGHTRM_TEXTS", "plain")
    demo.setenv("LIGHTRM_ANSWER_END", "</s>")
    closed = [Sample(prompt, f"{answer}</s>") for prompt, answer in asked]
    assert asyncio.run(slime.custom_rm(chat, closed)) == right
    with pytest.raises(lightrm.InputError, match="a sample must have a prompt and a response, found str 'a'"):
        asyncio.run(slime.custom_rm(plain, "a"))  # type: ignore[arg-type]


def test_one_bad_answer_harms_no_other(demo: pytest.MonkeyPatch, rm: lightrm.RewardModel) -> None:
    """It fails by itself, even where all are computed together."""
    asked = configured.from_environment()
    bad = asked.plain([{"role": "user", "content": "a", "name": "Bob"}], "b")
    futures = asked.gathered().ask([asked.plain(PROMPTS[0], ANSWERS[0]), bad, TEXTS[1]])
    assert futures[0].result() == rm.score(PROMPTS[0], [ANSWERS[0]]).item()
    with pytest.raises(lightrm.TemplateError, match="no place for a turn's 'name'"):
        futures[1].result()
    assert futures[2].result() == rm.score_text([TEXTS[1]]).item()


def test_a_model_is_loaded_once(demo: pytest.MonkeyPatch) -> None:
    loaded: list[object] = []

    def load(model: object, options: object = None) -> lightrm.RewardModel:
        loaded.append(model)
        return lightrm.load("demo", scheme="w8a8")

    demo.setattr(configured, "load_with", load)
    demo.setattr(configured, "MODELS", configured.LoadedModels())
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda text: openrlhf.reward_func([text], [""], [None]), TEXTS * 8))
    assert loaded == ["demo"]


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({}, "LIGHTRM_MODEL is not set: let it name a folder"),
        ({"LIGHTRM_MODEL": "demo", "LIGHTRM_TEXTS": "chat"}, "LIGHTRM_TEXTS must be templated or plain, found 'chat'"),
        ({"LIGHTRM_MODEL": "demo", "LIGHTRM_OPTIONS": "w8a8"}, "LIGHTRM_OPTIONS must be a JSON object .*found 'w8a8'"),
        ({"LIGHTRM_MODEL": "demo", "LIGHTRM_OPTIONS": "[1]"}, "LIGHTRM_OPTIONS must be a JSON object"),
        ({"LIGHTRM_MODEL": "demo", "LIGHTRM_OPTIONS": '{"shceme": "w8a8"}'}, "options has 'shceme'; those .* scheme,"),
        ({"LIGHTRM_MODEL": "demo", "LIGHTRM_OPTIONS": '{"beside": 1}'}, "options has 'beside'"),
    ],
)
def test_the_environment_is_checked(environment: dict[str, str], says: str) -> None:
    with pytest.raises(lightrm.InputError, match=says):
        configured.from_environment(environment)


def test_attributes_and_steps(demo: pytest.MonkeyPatch, several: dict[str, Path]) -> None:
    demo.setenv("LIGHTRM_MODEL", str(several["labels"]))
    demo.setenv("LIGHTRM_OPTIONS", '{"scheme": "fp32"}')
    demo.setenv("LIGHTRM_LABEL", "true")
    (found,) = configured.from_environment().rewards([configured.from_environment().plain("what?", "it")])
    right = lightrm.load(several["labels"], scheme="fp32").score_attributes("what?", ["it"])[0, 1]
    assert found == pytest.approx(right, rel=1e-5)
    with pytest.raises(lightrm.InputError, match="templated texts have no label"):
        openrlhf.reward_func(["what? it"], ["what?"], [None])
    steps = {"model": str(several["steps"]), "options": {"scheme": "fp32", "reduce": "min"}}
    answer = "We need 6 * 7.\n\nIt is 42."
    found = verl.compute_score("math", answer, "42", {"prompt": "What is 6 times 7?"}, **steps)
    right = lightrm.load(several["steps"], scheme="fp32", reduce="min").score("What is 6 times 7?", [answer]).item()
    assert found == pytest.approx(right, rel=1e-5)


def test_what_waits_becomes_one_pack() -> None:
    """While one pack is computed the next ones gather; the order of a caller's answers stays his."""
    packs: list[list[int]] = []
    begun, go = threading.Event(), threading.Event()

    def double(asked: list[int]) -> list[float]:
        packs.append(asked)
        begun.set()
        assert go.wait(10)
        return [2.0 * one for one in asked]

    gathered: Gathered[int] = Gathered(lambda: double, most=40)
    first = gathered.ask([0])
    assert begun.wait(10)
    with ThreadPoolExecutor(16) as threads:
        rest = list(threads.map(lambda k: gathered.ask([k])[0], range(1, 64)))
    rest[9].cancel()
    go.set()
    assert first[0].result(10) == 0
    assert [future.result(10) for future in rest if not future.cancelled()] == [
        2.0 * k for k in range(1, 64) if k != 10
    ]
    assert rest[9].cancelled()
    assert len(packs) == 3, "one, then forty, then the rest"
    assert sorted(k for pack in packs for k in pack) == [k for k in range(64) if k != 10]


def test_a_model_that_does_not_load_is_told_to_all() -> None:
    """And the next who asks tries again."""
    tries: list[int] = []

    def opens() -> Any:
        tries.append(1)
        if len(tries) == 1:
            time.sleep(0.1)
            raise lightrm.CheckpointError("no such folder")
        return lambda asked: [1.0] * len(asked)

    gathered: Gathered[str] = Gathered(opens)
    futures: list[Future[float]] = gathered.ask(["a", "b"])
    for future in futures:
        with pytest.raises(lightrm.CheckpointError, match="no such folder"):
            future.result(10)
    assert gathered.ask(["c"])[0].result(10) == 1.0
    assert gathered.ask([]) == []


def test_a_key_holds_what_a_model_depends_on() -> None:
    models = configured.LoadedModels()
    one = configured.Configured("demo", {"scheme": "w8a8"}, texts="plain")
    same = configured.Configured("demo", json.loads('{"scheme": "w8a8"}'), answer_end="</s>")
    assert models.of(one) is models.of(same)
    assert models.of(one) is not models.of(configured.Configured("demo", {"scheme": "fp32"}))
    assert models.of(one) is not models.of(configured.Configured("demo", {"scheme": "w8a8"}, label="a"))
