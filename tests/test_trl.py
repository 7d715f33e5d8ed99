"""TRL's trainers run two steps on scores of the bundled model; and a reward function takes all they hand over."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import lightrm
from lightrm.checkpoints.hub import DEMO_FOLDER
from lightrm.integrations.trl import RewardFunction, reward_function
from tests.test_answer_numbers import several_numbers

PROMPTS = ["How do I make tea?", "Why is the sky blue?"]
ANSWERS = ["Boil water and pour it over the leaves.", "Boil water and", "Air scatters blue light most."]
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


@pytest.fixture(scope="module")
def rm() -> lightrm.RewardModel:
    return lightrm.load("demo", scheme="w8a8")


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return several_numbers(tmp_path_factory.mktemp("several"))


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model with the bundled model's tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_FOLDER, padding_side="left")
    tokenizer.pad_token, tokenizer.chat_template = tokenizer.eos_token, CHAT
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=256,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


class Recorded:
    """A reward function that keeps what the trainer handed over, and what it was given."""

    __name__ = "recorded"

    def __init__(self, function: RewardFunction) -> None:
        self.function, self.calls = function, []

    def __call__(self, **handed: Any) -> list[float | None]:
        given = self.function(**handed)
        self.calls.append((handed, given))
        return given


@pytest.mark.parametrize("conversational", [False, True], ids=["strings", "turns"])
@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
def test_a_trainer_runs_two_steps(
    method: str, conversational: bool, rm: lightrm.RewardModel, policy: Path, tmp_path: Path
) -> None:
    import datasets
    import trl

    asked = [[{"role": "user", "content": prompt}] for prompt in PROMPTS] if conversational else PROMPTS
    rows = datasets.Dataset.from_dict({"prompt": asked * 2, "note": [None, "a", "b", None]})
    settings = getattr(trl, f"{method}Config")(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, num_generations=2,
        max_completion_length=8, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
        seed=1,
    )  # fmt: skip
    function = reward_function(rm)
    recorded = Recorded(function)
    trainer = getattr(trl, f"{method}Trainer")(
        model=str(policy), reward_funcs=[function, recorded], args=settings, train_dataset=rows
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert len(recorded.calls) == 2
    logs = [log for log in trainer.state.log_history if "reward" in log]
    for (handed, given), log in zip(recorded.calls, logs, strict=True):
        prompts, completions = handed["prompts"], handed["completions"]
        assert {"completion_ids", "note", "trainer_state", "log_extra", "log_metric"} <= set(handed)
        assert len(given) == 4
        if conversational:
            completions = [one[0]["content"] for one in completions]
        assert given == rm.score_batch(prompts, completions).tolist(), "the score of what the policy said"
        assert log["rewards/demo_model/mean"] == pytest.approx(np.mean(given), rel=1e-5)
        assert log["rewards/recorded/mean"] == pytest.approx(np.mean(given), rel=1e-5)


def test_equal_prompts_are_shared_wherever_they_stand(rm: lightrm.RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    right = rm.score_batch(prompts, ANSWERS).tolist()
    asked: list[Any] = []
    encode = type(rm.text).encode

    def counted(side: Any, turns: Any, texts: Any) -> Any:
        asked.append(len(texts))
        return encode(side, turns, texts)

    monkeypatch.setattr(type(rm.text), "encode", counted)
    function = reward_function(rm)
    assert function(prompts=prompts, completions=ANSWERS, completion_ids=[[1], [2], [3]], other=[None] * 3) == right
    assert asked == [2, 1], "two answers of one prompt go together"
    assert function(prompts=[], completions=[]) == []


def test_turns_of_a_completion(rm: lightrm.RewardModel) -> None:
    """The last turn is the answer; calls of tools and unfinished turns are not scored; reasoning is left out."""
    user = {"role": "user", "content": PROMPTS[0]}
    answer = {"role": "assistant", "content": ANSWERS[0]}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    one, other = rm.score(PROMPTS[0], ANSWERS[:2]).tolist()
    later = rm.score([user, answer, {"role": "user", "content": "And then?"}], ["Wait."]).item()
    cases = [
        ([user], [answer], one),
        ([user], [answer | {"reasoning_content": "Tea needs water."}], one),
        ([user], [answer | {"content": [{"type": "text", "text": ANSWERS[0]}]}], one),
        ([user], [answer | {"tool_calls": None}], one),
        (PROMPTS[0], [answer], one),
        (PROMPTS[0], ANSWERS[1], other),
        ([user, {"role": "assistant", "content": "Boil "}], [{"role": "assistant", "content": "water and"}], other),
        ([user, answer, {"role": "user", "content": "And then?"}], [{"role": "assistant", "content": "Wait."}], later),
        ([user], [call], None),
        ([user], [call, {"role": "tool", "content": "3"}], None),
        ([user], [{"role": "assistant", "content": None}], None),
        ([user], [], None),
        ([user], None, None),
    ]
    prompts, completions, right = zip(*cases, strict=True)
    assert reward_function(rm)(prompts=list(prompts), completions=list(completions)) == list(right)


@pytest.mark.parametrize(
    ("prompts", "completions", "says"),
    [
        (["a"], ["b", "c"], "1 prompts and 2 completions"),
        ("a", ["b"], "a list of strings, or of lists of turns, found str"),
        (["a"], [3], "completion 0 must be a string or a list of turns, found int 3"),
        (
            ["a"],
            [{"role": "assistant", "content": "b"}],
            "completion 0 must be a string or a list of turns, found dict",
        ),
        (
            ["a"],
            [[{"role": "user", "content": "b"}]],
            "the last turn of completion 0 must be an assistant's or a tool's",
        ),
        ([3], ["b"], "found int 3"),
        ([[]], ["b"], "prompt must be a string or a non-empty list of turns"),
        ([[{"role": "user", "content": [{"type": "image"}]}]], ["b"], "type 'image': lightrm scores text alone"),
    ],
)
def test_what_trl_never_hands_over_is_named(prompts: Any, completions: Any, says: str, rm: lightrm.RewardModel) -> None:
    with pytest.raises(lightrm.InputError, match=says):
        reward_function(rm)(prompts=prompts, completions=completions)


def test_templated_strings_are_one_text(rm: lightrm.RewardModel) -> None:
    function = reward_function(rm, templated=True)
    prompts, completions = ["Human: what?</s>Assistant: ", "Human: why?Assistant: "], ["it is", "so"]
    right = rm.score_text([p + c for p, c in zip(prompts, completions, strict=True)]).tolist()
    assert function(prompts=prompts, completions=completions) == right
    assert right != reward_function(rm)(prompts=prompts, completions=completions)
    with pytest.raises(lightrm.InputError, match="prompt 0, with templated=True, must be a string, found list"):
        function(prompts=[[{"role": "user", "content": "a"}]], completions=["b"])


def test_a_system_turn(rm: lightrm.RewardModel, several: dict[str, Path]) -> None:
    labels = lightrm.load(several["labels"], scheme="fp32", label="kind")
    found = reward_function(labels, system="Be brief.")(prompts=["what?"], completions=["it"])
    assert found == labels.score("what?", ["it"], system="Be brief.").tolist()
    assert found != labels.score("what?", ["it"]).tolist()


def test_attributes_each_as_a_reward(several: dict[str, Path]) -> None:
    """One loaded model gives several rewards, each with a name of its own."""
    rm = lightrm.load(several["labels"], scheme="fp32")
    functions = [reward_function(rm, label=name) for name in rm.attributes]
    assert [function.__name__ for function in functions] == ["labels.kind", "labels.true"]
    prompts, answers = ["what?", "why?", "what?"], ["it", "so", "that"]
    found = np.asarray([function(prompts=prompts, completions=answers) for function in functions])
    right = [rm.score_attributes(prompt, [answer])[0] for prompt, answer in zip(prompts, answers, strict=True)]
    np.testing.assert_allclose(found.T, right, rtol=1e-5)
    loaded = reward_function(lightrm.load(several["labels"], scheme="fp32", label="true"))
    np.testing.assert_allclose(loaded(prompts=prompts, completions=answers), found[1], rtol=1e-5)
    with pytest.raises(lightrm.InputError, match="several attributes and no score: pass label= one of 'kind', 'true'"):
        reward_function(rm)
    with pytest.raises(lightrm.InputError, match="no attribute 'good'; it has 'kind', 'true'"):
        reward_function(rm, label="good")


def test_steps_as_one_reward(several: dict[str, Path]) -> None:
    """An answer without a word has no step, and no reward."""
    rm = lightrm.load(several["steps"], scheme="fp32")
    answers = ["We need 6 * 7.\n\nIt is 42.", "41", " "]
    for reduce in ("min", "last"):
        found = reward_function(rm, reduce=reduce)(prompts=["What is 6 times 7?"] * 3, completions=answers)
        right = lightrm.load(several["steps"], scheme="fp32", reduce=reduce).score("What is 6 times 7?", answers[:2])
        assert found[2] is None
        np.testing.assert_allclose(np.asarray(found[:2], np.float32), right, rtol=1e-5)
    with pytest.raises(lightrm.InputError, match="one reward with reduce= one of 'min', 'product', 'last', 'mean'"):
        reward_function(rm)
    with pytest.raises(lightrm.InputError, match=r"reduce= one of 'min', .*, found 'max'"):
        reward_function(rm, reduce="max")
    with pytest.raises(lightrm.InputError, match="templated=True is for models with one score"):
        reward_function(rm, reduce="min", templated=True)


def test_names_and_options(rm: lightrm.RewardModel) -> None:
    assert reward_function(rm).__name__ == "demo_model"
    assert reward_function("demo", name="tea").__name__ == "tea"
    assert "demo_model" in repr(reward_function(rm))
    with pytest.raises(lightrm.InputError, match="reduce is for process reward models"):
        reward_function(rm, reduce="min")
    with pytest.raises(lightrm.InputError, match="no attribute 'good'; it has a single output"):
        reward_function(rm, label="good")


def test_a_hub_snapshot_is_named_after_its_model(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--Nice-RM" / "snapshots" / "0a1b"
    shutil.copytree(DEMO_FOLDER, snapshot)
    assert reward_function(snapshot).__name__ == "Nice-RM"
