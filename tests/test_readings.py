"""Where a score is read, against the classes that read it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import lightrm
from lightrm import errors
from lightrm.checkpoints.detect import open_checkpoint
from lightrm.checkpoints.score_position import Reading
from lightrm.cli import main
from tests.zoo import HEAD_WEIGHT, LLAMA_CONFIG, Specimen, llama_weights, write_tokenizer

WEIGHTS = llama_weights()
PAD = 9
# The end of a text, pads among it and behind it, and nothing but pads.
IDS = [[5, 6, 7, 8, 9], [5, 6, 9, 9], [9, 5, 9, 6, 7], [9, 9, 9], [9], [5], [7, 9, 8, 9]]


def classifier(pad: int | None, **more: object) -> dict[str, object]:
    return {**LLAMA_CONFIG, "architectures": ["LlamaForSequenceClassification"], "pad_token_id": pad, **more}


def folder_of(path: Path, config: dict[str, object]) -> Path:
    return Specimen({"model.safetensors": WEIGHTS | {"score.weight": HEAD_WEIGHT}}, config).write(path)


@pytest.mark.parametrize("pad", [PAD, None, -1, 0], ids=str)
def test_pad_tokens_are_read_as_transformers_reads_them(pad: int | None, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, classifier(pad, id2label={"0": "LABEL_0"}))
    model = transformers.LlamaForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    model.config.pad_token_id = pad  # whatever a generation_config would do to it
    with torch.inference_mode():
        expected = [float(model(input_ids=torch.tensor([ids])).logits) for ids in IDS]
    rm = lightrm.load(folder, scheme="fp32", device="cpu")
    np.testing.assert_allclose(rm.score_ids(IDS), expected, rtol=1e-4, atol=1e-5)
    shown = repr(rm)
    assert ("not pad (9)" in shown) == (pad == PAD)
    assert ("has no pad_token_id" in shown) == (pad in (None, -1))


@given(ids=st.lists(st.integers(0, 3), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_rules_are_transformers_formulas(ids: list[int]) -> None:
    """The last that is not pad, by transformers 5; before the first pad, by transformers 4, whose classes some models
    brought with them."""
    row = torch.tensor(ids)
    now = int((torch.arange(len(ids)) * (row != 2)).argmax())
    then = (int((row == 2).int().argmax()) - 1) % len(ids)
    assert Reading("last but pad", "", 2).end(ids) - 1 == now
    assert Reading("before pad", "", 2).end(ids) - 1 == then
    for rule in ("last", "last but pad", "before pad"):
        once = Reading(rule, "", 2).cut(ids)
        assert once == Reading(rule, "", 2).cut(once)


@pytest.mark.parametrize("name", ["Qwen2ForRewardModel", "INFORMForSequenceClassification"])
def test_classes_that_read_before_the_first_pad(name: str, tmp_path: Path) -> None:
    plain = lightrm.load(folder_of(tmp_path / "last", classifier(None)))
    rm = lightrm.load(folder_of(tmp_path / "own", {**classifier(PAD), "architectures": [name]}))
    assert f"before the first pad ({PAD}), as {name} reads" in repr(rm)
    np.testing.assert_array_equal(
        rm.score_ids([[5, 6, 9, 7], [9, 5], [5, 6]]), plain.score_ids([[5, 6], [9, 5], [5, 6]])
    )


def test_the_mask_of_other_layouts_knows_no_pad(tmp_path: Path) -> None:
    """OpenRLHF, Ziya and the others read the last token that is attended to, whatever its id."""
    last = lightrm.load(folder_of(tmp_path / "last", classifier(None))).score_ids(IDS)
    masked = lightrm.load(folder_of(tmp_path / "masked", {**classifier(PAD), "value_head_prefix": "score"}))
    assert "the last token, as OpenRLHF reads: the last of the mask" in repr(masked)
    np.testing.assert_array_equal(masked.score_ids(IDS), last)


def test_every_way_to_score_reads_the_same_token(tmp_path: Path) -> None:
    """EOS is pad, and ends each text: all scores are those of the texts without it."""
    texts = ["it is sunny.", "it is warm and sunny today.", "你好"]
    scores = {}
    for name, pad in (("pad", 2), ("none", None)):
        folder = folder_of(tmp_path / name, classifier(pad, vocab_size=96))
        grown = {k: v for k, v in WEIGHTS.items() if "embed" not in k}
        table = torch.randn(340, 32, generator=torch.Generator().manual_seed(1))
        tensors = grown | {"model.embed_tokens.weight": table, "score.weight": HEAD_WEIGHT}
        folder = Specimen({"model.safetensors": tensors}, classifier(pad, vocab_size=340)).write(folder)
        write_tokenizer(folder)
        scores[name] = lightrm.load(folder, template="ziya")
    rm, plain = scores["pad"], scores["none"]
    ids = plain.encode(["what is it?"] * 3, texts)
    assert all(one[-1] == 2 for one in ids), "the template closes with EOS"
    expected = plain.score_ids([one[:-1] for one in ids])
    assert np.abs(expected - plain.score_ids(ids)).min() > 1e-3, "and where it is read matters"
    np.testing.assert_array_equal(rm.score("what is it?", texts), expected)
    np.testing.assert_array_equal(rm.score_batch(["what is it?"] * 3, texts), expected)
    np.testing.assert_array_equal(rm.score_ids(ids), expected)
    assert dict(rm.stream(["what is it?"] * 3, texts)) == pytest.approx(dict(enumerate(expected.tolist())))
    alone = [rm.explain("what is it?", text).score for text in texts]  # float sums of another pack
    np.testing.assert_allclose(alone, expected, atol=1e-5)
    ranked = rm.rank("what is it?", texts)
    assert [one.score for one in ranked] == sorted(expected.tolist(), reverse=True)
    exact = rm.rank_batch(["what is it?"], [texts], exact=True, bound=100.0)
    assert [one.index for one in exact[0]] == [one.index for one in ranked]
    assert exact.effort.tokens < sum(map(len, ids)), "what stands behind the position is not computed"


ATHENE = {**LLAMA_CONFIG, "architectures": ["AtheneForSequenceClassification"], "vocab_size": 128256}


@pytest.fixture(scope="module")
def athene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    table = torch.randn(128256, 32, generator=torch.Generator().manual_seed(2)).half()
    tensors = WEIGHTS | {"model.embed_tokens.weight": table, "v_head.weight": HEAD_WEIGHT}
    return Specimen({"model.safetensors": tensors}, ATHENE).write(tmp_path_factory.mktemp("athene"))


def test_athene_is_read_at_its_last_cls(athene: Path) -> None:
    """By its class: rewards of all tokens, the last one whose id is 128003."""
    checkpoint = open_checkpoint(athene)
    assert (checkpoint.layout.name, checkpoint.reward_id) == ("athene", 128003)
    model = transformers.LlamaModel.from_pretrained(athene, dtype=torch.float32).eval()
    ids = [[5, 6, 128003], [5, 128003, 6, 128003, 7, 8], [128003]]
    with torch.inference_mode():
        rewards = [model(torch.tensor([one])).last_hidden_state[0] @ HEAD_WEIGHT[0] for one in ids]
    expected = [
        float(r[[k for k, i in enumerate(one) if i == 128003][-1]]) for r, one in zip(rewards, ids, strict=True)
    ]
    rm = lightrm.load(athene, scheme="fp32")
    np.testing.assert_allclose(rm.score_ids(ids), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(lightrm.InputError, match="read at its token 128003, which the sequence does not hold"):
        rm.score_ids([[5, 6]])


CHAT = "{{ bos_token }}{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"


def test_athenes_text_is_its_pipelines(athene: Path, tmp_path: Path) -> None:
    """tokenizer(apply_chat_template(...) + cls_token): the second BOS, and the token at the end."""
    words = {word: k for k, word in enumerate(["<s>", "user", "assistant", "hello", "there", "<unk>"])} | {
        "<|cls|>": 128003
    }
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<s>", "<|cls|>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", cls_token="<|cls|>")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path)
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).symlink_to(athene / name)
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there hello"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False) + tokenizer.cls_token
    expected = tokenizer(text)["input_ids"]
    assert expected == [0, 0, 1, 3, 2, 4, 3, 128003]
    rm = lightrm.load(tmp_path, scheme="fp32")
    assert rm.encode(["hello"], ["there hello"]) == [expected]
    np.testing.assert_array_equal(rm.score("hello", ["there hello"]), rm.score_ids([expected]))


@pytest.mark.parametrize(
    "classes", [["CustomAutoModelForSequenceClassification"], ["LlamaForSequenceClassification"], None]
)
def test_athene_by_any_name_is_not_deepspeed_chat(athene: Path, classes: list[str] | None, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(athene / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**ATHENE, "architectures": classes}))
    assert open_checkpoint(tmp_path).layout.name == "athene"
    (tmp_path / "config.json").write_text(json.dumps({**ATHENE, "vocab_size": 1000}))
    with pytest.raises(errors.ConfigError, match="read at token 128003, and vocab_size is 1000"):
        open_checkpoint(tmp_path)


def test_inspect_tells_the_position_and_the_fields(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, classifier(PAD, unsloth_version="2024.9", torch_dtype="float32"))
    told = " ".join(CliRunner().invoke(main, ["inspect", str(folder)]).output.split())
    assert "read at the last token that is not pad (9), as LlamaForSequenceClassification reads" in told
    assert "pad_token_id" in told.partition("config read")[2].partition("config ignored")[0]
    assert "unsloth_version" in told.partition("config ignored")[2]


def test_inspect_says_what_is_wrong_with_a_template_nobody_asked_for(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, classifier(PAD))
    write_tokenizer(folder, chat_template="{% if %}")
    found = CliRunner().invoke(main, ["inspect", str(folder)])
    assert found.exit_code == 0
    assert "template none:" in " ".join(found.output.split())
