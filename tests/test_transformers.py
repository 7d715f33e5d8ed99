"""Models that run through transformers give the scores of the class itself, behind the same API."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import lightrm
from lightrm import errors
from lightrm.checkpoints import named_class
from lightrm.cli import main
from lightrm.engine.class_head import ClassHead
from lightrm.engine.padded_batches import batches, find_grouping
from lightrm.engine.padded_engine import PaddedEngine
from lightrm.engine.residence import Residence
from lightrm.schemes.grammar import parse_scheme
from tests.class_zoo import ENCODERS, gpt_neox, one_by_one, reference, with_chat, written

PAIR = "what is the weather today?", "it is sunny and warm."
OTHER = "hello"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("classes")
    found = {name: make(root / name) for name, make in ENCODERS.items()}
    return found | {"gpt_neox": gpt_neox(root / "gpt_neox"), "no pad": gpt_neox(root / "no-pad", pad=None)}


def sequences(pad: int) -> list[list[int]]:
    """Of many lengths, some with the pad id inside, at the end, at the start, or alone."""
    draw = np.random.default_rng(1)
    plain = [draw.integers(5, 590, n).tolist() for n in (1, 2, 30, 31, 7, 7, 60)]
    return [*plain, [9, pad, 11, 12], [9, 10, 11, pad], [9, 10, pad, pad], [pad, 9, 10], [pad, pad]]


@pytest.mark.parametrize("name", [*ENCODERS, "gpt_neox", "no pad"])
def test_scores_are_those_of_the_class_for_each_sequence_alone(name: str, folders: dict[str, Path]) -> None:
    rm = lightrm.load(folders[name], scheme="fp32")
    assert "kernels: transformers" in repr(rm)
    assert "because lightrm's own decoder does not run it" in repr(rm)
    assert rm.engine.grouping == ("alone" if name == "no pad" else "padded")
    model = reference(folders[name])
    ids = sequences(rm.engine.pad)
    expected = one_by_one(model, ids)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(rm.score_ids(ids), expected, atol=1e-5)
    rm.token_budget = 40  # other batches, the same scores
    np.testing.assert_allclose(rm.score_ids(ids[::-1])[::-1], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["deberta", "modernbert", "gpt_neox"])
@pytest.mark.parametrize("scheme", ["bf16", "bnb-int8", "nf4"])
def test_schemes(name: str, scheme: str, folders: dict[str, Path]) -> None:
    """As the class called directly in the scheme, whose head rounds its output to bf16; nearer to float32 in bf16."""
    if scheme != "bf16":
        pytest.importorskip("bitsandbytes")
    rm = lightrm.load(folders[name], scheme=scheme)
    head = sorted({part.partition(".")[0] for part in rm.engine.architecture.head})
    asked: dict[str, Any] = {
        "bf16": {},
        "bnb-int8": {"load_in_8bit": True, "llm_int8_skip_modules": head},
        "nf4": {
            "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16, "llm_int8_skip_modules": head,
        },
    }[scheme]  # fmt: skip
    more = {"quantization_config": transformers.BitsAndBytesConfig(**asked), "device_map": {"": "cpu"}} if asked else {}
    ids = [row for row in sequences(600) if max(row) < 600]
    direct = np.array(one_by_one(reference(folders[name], dtype=torch.bfloat16, **more), ids))
    exact = np.array(one_by_one(reference(folders[name]), ids))
    found = rm.score_ids(ids)
    error = np.abs(direct - exact).max()
    assert np.abs(found - exact).max() <= 2 * error
    assert np.abs(found - exact).max() > 0
    held = lightrm.load(folders[name], scheme="fp32").report.bytes
    assert rm.report.bytes < 0.6 * held
    kinds = {type(part).__name__ for part in rm.engine.forward.module.modules()}
    assert {"bnb-int8": "Linear8bitLt", "nf4": "Linear4bit"}.get(scheme, "Linear") in kinds


@pytest.mark.parametrize("name", ENCODERS)
def test_a_pair_of_texts_is_what_the_tokenizer_makes_of_it(name: str, folders: dict[str, Path]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[name])
    model = reference(folders[name])
    pairs = [PAIR, (OTHER, PAIR[1] * 6), (PAIR[0] * 6, OTHER), (PAIR[0] * 5, PAIR[1] * 6), (PAIR[0], ""), PAIR[::-1]]
    for limit in (64, 23, 16, 9):
        rm = lightrm.load(folders[name], max_length=limit)
        theirs = [tokenizer([a], [b], truncation=True, max_length=limit, return_tensors="pt") for a, b in pairs]
        prompts, responses = zip(*pairs, strict=True)
        with pytest.warns(lightrm.TruncationWarning):
            assert rm.encode(prompts, responses) == [one["input_ids"][0].tolist() for one in theirs]
        with torch.inference_mode():
            expected = [float(model(**one).logits) for one in theirs]
        with pytest.warns(lightrm.TruncationWarning):
            np.testing.assert_allclose(rm.score_batch(prompts, responses), expected, atol=1e-5)
    typed = "token_type_ids" in theirs[0] and name == "bert"
    assert rm.engine.types == typed
    if typed:  # and they matter
        flat = one_by_one(model, [one["input_ids"][0].tolist() for one in theirs])
        assert np.abs(np.array(flat) - expected).max() > 1e-3
    assert "pair: tokenizer(prompt, response)" in repr(rm)


@pytest.mark.parametrize("name", ENCODERS)
def test_special_tokens_in_a_pair_are_text(name: str, folders: dict[str, Path]) -> None:
    rm = lightrm.load(folders[name])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[name])
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    (plain,) = rm.encode([PAIR[0]], [PAIR[1]])
    count = sum(i in special for i in plain)
    for spelled in (tokenizer.sep_token, tokenizer.cls_token, tokenizer.pad_token, tokenizer.mask_token):
        for pair in ((f"what{spelled}is", "it is"), ("what is", f"it is {spelled}"), (spelled, spelled)):
            (ids,) = rm.encode([pair[0]], [pair[1]])
            assert sum(i in special for i in ids) == count
            assert ids != tokenizer(*pair)["input_ids"]
    live = lightrm.load(folders[name], parse_specials=True)
    pair = f"what{tokenizer.mask_token}is", f"it {tokenizer.pad_token} is"
    assert live.encode([pair[0]], [pair[1]]) == [tokenizer(*pair)["input_ids"]]


def test_a_divider_that_acts_is_refused_where_types_follow_from_it(folders: dict[str, Path]) -> None:
    live = lightrm.load(folders["bert"], parse_specials=True)
    with pytest.raises(errors.TokenizerError, match="spells what divides it"):
        live.score("what [SEP] is", ["it"])


def test_a_pair_has_no_place_for_more_turns(folders: dict[str, Path]) -> None:
    rm = lightrm.load(folders["deberta"])
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    with pytest.raises(errors.TemplateError, match="one user turn and its answer, found system, user"):
        rm.score(turns, ["hello"])


def test_a_chat_template_in_an_encoders_files_is_used(tmp_path: Path) -> None:
    """A bare encoder's files hold none: there, the model was trained with it."""
    folder = written(
        "ModernBertForSequenceClassification", tmp_path, pad_token_id=1, max_position_embeddings=64, cls_token_id=0,
        sep_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with_chat(folder)
    rm = lightrm.load(folder)
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "it is"}]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
    assert rm.encode(["hi"], ["it is"]) == [ids]
    np.testing.assert_allclose(rm.score("hi", ["it is"]), one_by_one(reference(folder), [ids]), atol=1e-5)


def test_decoders_read_the_chat_template(folders: dict[str, Path]) -> None:
    rm = lightrm.load(folders["gpt_neox"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["gpt_neox"])
    chat = [{"role": "user", "content": PAIR[0]}, {"role": "assistant", "content": PAIR[1]}]
    ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
    assert rm.encode(*([text] for text in PAIR)) == [ids]
    found = rm.explain(*PAIR)
    assert found.token_ids == ids
    assert found.text == tokenizer.apply_chat_template(chat, tokenize=False)
    assert found.score == pytest.approx(one_by_one(reference(folders["gpt_neox"]), [ids])[0], abs=1e-5)


def test_the_same_api(folders: dict[str, Path]) -> None:
    rm = lightrm.load(folders["deberta"], scheme="bf16")
    prompt, answers = PAIR[0], ["it is", "sunny", "it is sunny and warm today", "no"]
    scores = rm.score(prompt, answers)
    assert scores.dtype == np.float32
    assert dict(rm.stream([prompt] * 4, answers)) == dict(enumerate(rm.score_batch([prompt] * 4, answers).tolist()))
    assert [r.index for r in rm.rank(prompt, answers)] == np.argsort(-scores, kind="stable").tolist()
    exact = rm.rank(prompt, answers, exact=True, bound=10.0)
    full = lightrm.load(folders["deberta"], scheme="fp32").score(prompt, answers)
    assert [r.index for r in exact] == np.argsort(-full, kind="stable").tolist()
    assert rm.explain(prompt, "it is").text.startswith("[CLS]what is")
    with pytest.raises(errors.SchemeError, match="runs in transformers, not in lightrm's own decoder"):
        rm.save(folders["deberta"] / "saved")
    with pytest.raises(errors.InputError, match="holds id 600"):
        rm.score_ids([[600]])
    with pytest.raises(errors.InputError, match="65 tokens, this model has 64 positions"):
        rm.score_ids([[5] * 65])
    with pytest.raises(errors.InputError, match="without beside="):
        lightrm.load(folders["deberta"], beside=lightrm.load("demo", scheme="fp32"))
    with pytest.raises(errors.InputError, match="rounds nothing to calibrate"):
        lightrm.load(folders["deberta"], calibration=[PAIR])


@pytest.mark.parametrize("budget", [64, 4096])
def test_equal_sequences_have_equal_scores(
    budget: int, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the class rounded otherwise in each row of a batch. The bar still counts every token."""
    rm = lightrm.load(folders["gpt_neox"], scheme="fp32", token_budget=budget)
    exact = ClassHead.__call__
    monkeypatch.setattr(ClassHead, "__call__", lambda head, x_SK: exact(head, x_SK) + torch.arange(len(x_SK)))
    ids = [[5] * 30, [6, 7], [5] * 30, [8] * 31, [6, 7], [6, 7]]
    done: list[float] = []
    scores = rm.engine.all_scores(ids, done.append)
    assert scores[0] == scores[2]
    assert scores[1] == scores[4] == scores[5]
    assert sum(done) == sum(map(len, ids))
    if budget == 4096:
        assert rm.engine.distinct_tokens(ids) == 3 * 31


def test_threads_and_forks_get_the_same_scores(folders: dict[str, Path]) -> None:
    rm = lightrm.load(folders["gpt_neox"], token_budget=64)
    ids = sequences(1)
    expected = rm.score_ids(ids)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: rm.score_ids(ids), range(8)):
            np.testing.assert_allclose(found, expected, atol=1e-6)
    rm.engine.turn.acquire()  # as if another thread computed at the moment of the fork
    rm.engine.forked()
    np.testing.assert_allclose(rm.score_ids(ids), expected, atol=1e-6)


def test_jobs_measurements_and_the_command_line(folders: dict[str, Path], tmp_path: Path, few_draws: None) -> None:
    run: Callable[..., Any] = lambda *words: CliRunner().invoke(main, list(map(str, words)))  # noqa: E731
    folder = tmp_path / "model"
    folder.mkdir()
    for path in folders["bert"].iterdir():
        os.link(path, folder / path.name)
    rows = [{"prompt": PAIR[0], "responses": ["it is", "sunny", f"no {k}"]} for k in range(3)]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    assert run("score", source, "-m", folder, "-o", target, "--quiet", "--engine", "transformers").exit_code == 0
    scored = [json.loads(line) for line in target.read_text().splitlines()]
    rm = lightrm.load(folder)
    np.testing.assert_allclose(scored[0]["scores"], rm.score(PAIR[0], rows[0]["responses"]), atol=1e-5)
    assert run("score", source, "-m", folder, "-o", target, "--quiet").exit_code == 1  # it exists already
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(json.dumps({"prompt": PAIR[0], "chosen": "it is", "rejected": f"no {k}"}) for k in "ab"))
    found = run("fidelity", folder, "--data", pairs, "--schemes", "bnb-int8", "--quiet")
    assert "bnb-int8" in found.output, found.output
    found = run("fidelity", folder, "--data", pairs, "--quiet")
    assert "where there are fp32, bf16, fp16, bnb-int8, nf4; found w8a8, w4a8" in found.output
    assert run("evaluate", folder, "--data", pairs, "--quiet").exit_code == 0
    found = run("inspect", folder)
    held = sum(t.numel() for t in load_file(folder / "model.safetensors").values())
    for said in ("BertForSequenceClassification", f"the files hold {held:,} numbers", "pair: tokenizer"):
        assert said in " ".join(found.output.split())
    (folder / "model.safetensors").unlink()
    found = run("plan", folder)
    assert f"{held:,} parameters" in found.output
    assert "auto takes fp32" in found.output
    assert found.output.count("resident, batches of 8192") == 4


def test_a_journal_of_other_weights_or_another_engine_is_not_continued(folders: dict[str, Path]) -> None:
    from lightrm.jobs.identity import identity

    one = identity(lightrm.load(folders["gpt_neox"]), "m")
    other = identity(lightrm.load(folders["no pad"]), "m")
    assert one["engine"] == "transformers"
    assert "GPTNeoXForSequenceClassification, sdpa attention" in one["positions"]
    assert one["config"] != other["config"]
    path = folders["no pad"] / "model.safetensors"
    weights = load_file(path)
    weights["score.weight"][0, 0] += 1
    save_file(weights, path, {"format": "pt"})
    assert identity(lightrm.load(folders["no pad"]), "m")["weights"] != other["weights"]


def llama(folder: Path) -> Path:
    written(
        "LlamaForSequenceClassification", folder, num_key_value_heads=2, max_position_embeddings=128, pad_token_id=1
    )
    return with_chat(folder)


def test_native_families_run_in_either_engine(tmp_path: Path) -> None:
    folder = llama(tmp_path / "llama")
    ours, theirs = (lightrm.load(folder, scheme="fp32", engine=name) for name in ("auto", "transformers"))
    assert (ours.engine.name, theirs.engine.name) == ("lightrm", "transformers")
    assert "because asked for" in repr(theirs)
    ids = sequences(1)
    np.testing.assert_allclose(ours.score_ids(ids), theirs.score_ids(ids), atol=1e-4)
    np.testing.assert_allclose(ours.score(*PAIR[:1], [PAIR[1]]), theirs.score(*PAIR[:1], [PAIR[1]]), atol=1e-4)
    with pytest.raises(errors.SchemeError, match="where there are auto, fp32, bf16, fp16, bnb-int8, nf4; found 'w8a8'"):
        lightrm.load(folder, scheme="w8a8", engine="transformers")
    with pytest.raises(errors.InputError, match="engine must be 'auto', 'lightrm', 'transformers', found 'vllm'"):
        lightrm.load(folder, engine="vllm")
    lightrm.load(folder, scheme="w8a8").save(tmp_path / "quantized")
    with pytest.raises(errors.UnsupportedModelError, match="quantized by lightrm, whose own engine alone"):
        lightrm.load(tmp_path / "quantized", engine="transformers")


def test_what_a_trainer_wrote_into_the_config_is_not_ignored(tmp_path: Path) -> None:
    """OpenRLHF's normalization: transformers' class does not know it, and would give scores on another scale."""
    folder = written("LlamaForSequenceClassification", tmp_path, pad_token_id=1)
    config = json.loads((folder / "config.json").read_text())
    more = {"value_head_prefix": "score", "normalize_reward": True, "mean": 1.0, "std": 2.0}
    (folder / "config.json").write_text(json.dumps(config | more))
    lightrm.load(folder)
    with pytest.raises(
        errors.UnsupportedModelError, match=r"which the code of its trainer reads and Llama\w+ does not"
    ):
        lightrm.load(folder, engine="transformers")


PROPORTIONAL = {"rope_type": "proportional", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}


def test_a_native_family_with_a_part_that_is_not_runs_in_transformers(tmp_path: Path) -> None:
    folder = written("LlamaForSequenceClassification", tmp_path, rope_parameters=PROPORTIONAL, pad_token_id=1)
    rm = lightrm.load(folder)
    assert "RoPE scaling 'proportional' is not supported" in repr(rm)
    np.testing.assert_allclose(rm.score_ids([[5, 6, 7]]), one_by_one(reference(folder), [[5, 6, 7]]), atol=1e-5)


class OpenAssistant(torch.nn.Module):
    """What the class of OpenAssistant's training code computes for one text."""

    def __init__(self, config: transformers.GPTNeoXConfig) -> None:
        super().__init__()
        self.gpt_neox = transformers.GPTNeoXModel(config)
        self.out_proj = torch.nn.Linear(config.hidden_size, 1)

    def score(self, ids: list[int], pooling: str) -> float:
        hidden_TD = self.gpt_neox(torch.tensor([ids])).last_hidden_state[0]
        return float(self.out_proj(hidden_TD[-1] if pooling == "last" else hidden_TD.mean(0)))


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_open_assistants_pythia(pooling: str, tmp_path: Path) -> None:
    from tests.class_zoo import SIZES, byte_level

    torch.manual_seed(5)
    config = transformers.GPTNeoXConfig(**SIZES, max_position_embeddings=128)
    model = OpenAssistant(config).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    raw = config.to_dict() | {
        "architectures": ["GPTNeoXRewardModel"], "model_type": "gpt_neox_reward_model", "pooling": pooling,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(raw))
    tokenizer = byte_level(["<|endoftext|>", "<|padding|>", "<|prompter|>", "<|assistant|>"])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|padding|>",
        additional_special_tokens=["<|prompter|>", "<|assistant|>"],
    ).save_pretrained(tmp_path)  # fmt: skip
    rm = lightrm.load(tmp_path)
    text = f"<|prompter|>{PAIR[0]}<|endoftext|><|assistant|>{PAIR[1]}<|endoftext|>"
    ids = tokenizer.encode(text).ids
    assert rm.encode(*([one] for one in PAIR)) == [ids]
    with torch.inference_mode():
        many = [ids, [7], [8, 9, 1, 1], list(range(5, 60))]
        expected = [model.score(one, pooling) for one in many]
    np.testing.assert_allclose(rm.score_ids(many), expected, atol=1e-5)
    assert rm.engine.grouping == "padded"
    assert ("mean over all tokens" if pooling == "mean" else "the last token, as GPTNeoXRewardModel") in repr(rm)
    assert rm.engine.architecture.parameters == sum(part.numel() for part in model.parameters())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"pooling": "max"}))
    with pytest.raises(errors.ConfigError, match="'pooling' must be 'last' or 'mean', found 'max'"):
        lightrm.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"architectures": ["DebertaV2PairRM"]}, errors.UnsupportedModelError, "DebertaV2PairRM compares two answers"),
        ({"architectures": ["MyRewardModel"]}, errors.UnsupportedModelError, "MyRewardModel of model_type"),
        ({"architectures": None}, errors.UnsupportedModelError, "no architectures entry of model_type 'deberta-v2'"),
        ({"architectures": ["BertForSequenceClassification"]}, errors.UnsupportedModelError,
         "has DebertaV2ForSequenceClassification for that model_type"),
        ({"model_type": "deberta-v9"}, errors.UnsupportedModelError, "knows no such model_type here; a newer"),
        ({"auto_map": {"AutoModelForSequenceClassification": "m.DebertaV2ForSequenceClassification"}},
         errors.UnsupportedModelError, "code of the checkpoint's own"),
        ({"id2label": {"0": "a", "1": "b"}}, errors.TensorMismatchError, "has 1 rows: is the config another model's"),
        ({"hidden_size": 65}, errors.ConfigError, "transformers cannot make DebertaV2ForSequenceClassification of it"),
        ({"intermediate_size": 32}, errors.TensorMismatchError, "asks for"),
        ({"num_hidden_layers": 3}, errors.TensorMismatchError, "are missing: deberta.encoder.layer.2"),
        ({"num_hidden_layers": 1}, errors.TensorMismatchError, "has no place for deberta.encoder.layer.1"),
        ({"quantization_config": {"quant_method": "gptq"}}, errors.UnsupportedModelError, "quantized by 'gptq'"),
    ],
)  # fmt: skip
def test_refused_by_name(
    change: dict[str, Any], error: type[Exception], says: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    config = json.loads((folders["deberta"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    os.link(folders["deberta"] / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(error, match=re.escape(says).replace("\\ ", " ")):
        lightrm.load(tmp_path)


def test_weights_that_are_not_the_models(folders: dict[str, Path], tmp_path: Path) -> None:
    weights = load_file(folders["deberta"] / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folders["deberta"] / "config.json").read_bytes())

    def loaded(held: dict[str, torch.Tensor]) -> lightrm.RewardModel:
        save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
        return lightrm.load(tmp_path, engine="transformers")

    with pytest.raises(errors.MissingHeadError, match=r"hold classifier\.bias"):
        loaded({name: tensor for name, tensor in weights.items() if name != "classifier.bias"})
    with pytest.raises(errors.NumericsError, match="holds NaN or Inf"):
        loaded({**weights, "classifier.weight": weights["classifier.weight"] / 0})
    with pytest.raises(errors.TensorMismatchError, match=r"has no place for v_head\.weight"):
        loaded({**weights, "v_head.weight": torch.zeros(1, 64)})
    rm = loaded({**weights, "lm_predictions.lm_head.bias": torch.zeros(600)})
    assert rm.report.ignored == ("lm_predictions.lm_head.bias",)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(errors.UnsupportedModelError, match="merge it with peft"):
        loaded(weights)


def test_several_outputs_are_attributes(tmp_path: Path) -> None:
    """No score until the caller says which; each output is the class's own."""
    names = {"0": "helpful", "1": "safe", "2": "short"}
    folder = written("RobertaForSequenceClassification", tmp_path, num_labels=3, id2label=names, pad_token_id=1)
    rows = [[5, 6, 7], [9, 8]]
    rm = lightrm.load(folder)
    with pytest.raises(errors.InputError, match="label=NAME"):
        rm.score_ids(rows)
    assert rm.attributes == ("helpful", "safe", "short")
    model = reference(folder)
    with torch.inference_mode():
        outputs = np.array([model(input_ids=torch.tensor([row])).logits[0].tolist() for row in rows])
    found = rm.engine.all_scores(rows, head=rm.engine.head.attributes())
    np.testing.assert_allclose(found, outputs, atol=1e-5)
    np.testing.assert_allclose(lightrm.load(folder, label="safe").score_ids(rows), outputs[:, 1], atol=1e-5)
    weighed = lightrm.load(folder, weights={"helpful": 2.0, "short": -1.0}).score_ids(rows)
    np.testing.assert_allclose(weighed, 2 * outputs[:, 0] - outputs[:, 2], atol=1e-5)
    with pytest.raises(errors.InputError, match="no attribute 'kind'; it has 'helpful'"):
        lightrm.load(folder, label="kind")


def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "bart", "architectures": ["BartForSequenceClassification"], "num_labels": 1})
    )
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(errors.UnsupportedModelError, match="has an encoder and a decoder"):
        lightrm.load(tmp_path)


def test_without_transformers_the_error_names_the_extra(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(errors.UnsupportedModelError, match=r"'gpt_neox'.*is not supported; lightrm runs llama"):
        lightrm.load(folders["gpt_neox"], engine="lightrm")
    monkeypatch.setattr(named_class, "find_spec", lambda name: None)
    for engine in ("auto", "lightrm", "transformers"):
        with pytest.raises(errors.UnsupportedModelError, match=re.escape("pip install 'lightrm[transformers]'")):
            lightrm.load(folders["gpt_neox"], engine=engine)


def test_memory(folders: dict[str, Path], tmp_path: Path) -> None:
    rm = lightrm.load(folders["deberta"], token_budget=100)
    assert rm.token_budget == 100
    assert "batches of 100 tokens, as asked" in repr(rm)
    with pytest.raises(errors.SchemeError, match="transformers does not stream layers"):
        lightrm.load(folders["deberta"], memory="513MiB")
    with pytest.raises(errors.SchemeError, match="inputs are a multiple of 64"):
        lightrm.load(written("GPTNeoXForSequenceClassification", tmp_path, hidden_size=32), scheme="nf4")


def column(ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor | None) -> torch.Tensor:
    """A class that reads the last column, whatever is padding."""
    return ids[:, -1:].float()


def fussy(ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor | None) -> torch.Tensor:
    if len(ids) > 1:
        raise ValueError("Cannot handle batch sizes > 1 if no padding token is defined.")
    return ids[:, -1:].float()


def summed(ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor | None) -> torch.Tensor:
    return (ids * mask).sum(1, keepdim=True).float()


def test_grouping_is_found_by_asking_the_model() -> None:
    found = {f.__name__: find_grouping(f, 100, [0], 0, False, CPU, 1e-7) for f in (column, fussy, summed)}
    assert found == {"column": "equal lengths", "fussy": "alone", "summed": "padded"}
    lengths = [3, 5, 5, 1, 5]
    assert list(batches(lengths, 10, "padded")) == [[1, 2], [4, 0], [3]]
    assert list(batches(lengths, 10, "equal lengths")) == [[1, 2], [4], [0], [3]]
    assert list(batches(lengths, 10, "alone")) == [[1], [2], [4], [0], [3]]
    assert list(batches([30], 10, "padded")) == [[0]]


def drawn(ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor | None) -> torch.Tensor:
    return torch.rand(len(ids), 1)


def test_a_model_that_draws_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="draws numbers at random"):
        find_grouping(drawn, 100, [0], 0, False, CPU, 1e-7)


def test_a_longer_text_beside_it_changes_no_score(tmp_path: Path) -> None:
    """longrope takes other frequencies for a whole batch if its longest row is long."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [8.0] * 8, "rope_theta": 10000.0}
    folder = written(
        "Phi3ForSequenceClassification", tmp_path, max_position_embeddings=128, pad_token_id=1,
        original_max_position_embeddings=16, rope_parameters=rope | {"original_max_position_embeddings": 16},
    )  # fmt: skip
    rm = lightrm.load(folder, engine="transformers")
    assert rm.engine.grouping == "equal lengths"
    draw = np.random.default_rng(2)
    ids = [draw.integers(5, 590, n).tolist() for n in (6, 6, 12, 40, 40)]
    model = reference(folder)
    expected = one_by_one(model, ids)
    np.testing.assert_allclose(rm.score_ids(ids), expected, atol=1e-5)
    with torch.inference_mode():
        mixed = model(input_ids=torch.tensor([ids[0] + [1] * 34, ids[3]]), attention_mask=torch.ones(2, 40)).logits
    assert abs(float(mixed[0]) - expected[0]) > 1e-3  # in one batch, it would


def test_the_budget_is_halved_where_memory_runs_out() -> None:
    seen: list[int] = []

    def small(ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor | None) -> torch.Tensor:
        seen.append(ids.numel())
        if ids.numel() > 12:
            raise torch.OutOfMemoryError("out")
        return summed(ids, mask, types)

    shape: Any = None
    engine = PaddedEngine(
        small,
        shape,
        ClassHead("a head"),
        parse_scheme("fp32", CPU),
        CPU,
        Residence(40, 0, 2**30, 0, ""),
        1,
        "padded",
        0,
        False,
        None,
    )
    rows = [[k] * n for k, n in ((1, 5), (2, 6), (3, 4), (4, 1), (5, 6))]
    with pytest.warns(lightrm.MemoryWarning, match="halved"):
        found = engine.all_scores(rows)
    assert found.tolist() == [sum(row) for row in rows]
    assert engine.tokens <= 12
    with pytest.raises(errors.MemoryLimitError, match="sequence of 13 tokens alone"):
        engine.all_scores([[1] * 13])
