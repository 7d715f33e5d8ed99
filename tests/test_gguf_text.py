"""Tokenizers in GGUF files: the ids are those of the tokenizer that was written into the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers

import lightrm
from lightrm.text.gguf_tokenizer import LLAMA3, QWEN2, described, folder_of
from tests.test_gguf import MIXES, plain_model, write

gguf = pytest.importorskip("gguf")

TEXTS = (
    "What is the weather today?",
    "  two  spaces,\n\nand lines\t", "don't I'LL 12345 3.14 ÄÖ ü", "你好，今天很好。 🦜🏽",
    "", " ", "a", "e\u0301 \u00e9", "def f(x):\n    return x ** 2  # ok\r\n", "Ünïcödé ﬁ ½ \u200b\u3000x",
)  # fmt: skip
CHAT = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def sentencepiece_settings(model: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    """What llama.cpp's converter writes of a tokenizer.model."""
    size = model.vocab_size()
    kinds = [
        2 if model.is_unknown(i) else 3 if model.is_control(i) else 5 if model.is_unused(i)
        else 6 if model.is_byte(i) else 1 for i in range(size)
    ]  # fmt: skip
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in range(size)],
        "tokenizer.ggml.scores": np.array([model.get_score(i) for i in range(size)], np.float32),
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
    }


def byte_level_settings(pre: str, size: int = 500) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Train a byte-level tokenizer that splits like a published one, and what llama.cpp's converter writes of it."""
    split = {"qwen2": QWEN2, "llama-bpe": LLAMA3}.get(pre)
    made = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=pre == "llama-bpe"))
    made.normalizer = tokenizers.normalizers.NFC() if pre == "qwen2" else None
    steps = [tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)]
    if split is not None:
        steps.insert(0, tokenizers.pre_tokenizers.Split(tokenizers.Regex(split), "isolated"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator([*TEXTS, "the weather is what we today do", "12 345 6789"] * 4, trainer)
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    made.add_tokens(["<think>"])
    model, base = json.loads(made.to_str())["model"], len(json.loads(made.to_str())["model"]["vocab"])
    pieces = [made.id_to_token(i) for i in range(made.get_vocab_size())]
    kinds = [1] * base + [3, 3, 4]
    return made, {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*pieces, *(f"[PAD{i}]" for i in range(len(pieces), len(pieces) + 5))],
        "tokenizer.ggml.token_type": np.array([*kinds, *[5] * 5], np.int32),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.eos_token_id": base + 1,
        "tokenizer.ggml.bos_token_id": base,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT,
    }


def read(folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_sentencepiece(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LLaMA's own vocabulary: the ids of sentencepiece itself, and the marks of a chat as one token each."""
    path = shared / "tokenizers" / "llama.tokenizer.model"
    if not path.is_file():
        pytest.skip(f"no tokenizer at {path}")
    monkeypatch.setenv("LIGHTRM_CACHE", str(tmp_path))
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    settings = sentencepiece_settings(model)
    settings["tokenizer.ggml.tokens"].append("<|im_start|>")
    settings["tokenizer.ggml.token_type"] = np.append(settings["tokenizer.ggml.token_type"], np.int32(3))
    settings["tokenizer.ggml.scores"] = np.append(settings["tokenizer.ggml.scores"], np.float32(-1000))
    folder = folder_of(settings, path)
    found = read(folder)
    for text in TEXTS:
        assert found.encode(text, add_special_tokens=False).ids == model.encode(text), text
        assert found.encode(text).ids == [1, *model.encode(text)]
    last = model.vocab_size()
    assert found.encode("<|im_start|>user", add_special_tokens=False).ids == [last, *model.encode("user")]
    assert folder_of(settings, path) == folder, "written once"
    (folder / "tokenizer.json").write_text("{}")
    assert read(folder_of(settings, path)).encode("a").ids == found.encode("a").ids, "and again when damaged"


def test_pieces_that_are_matched_first(shared: Path) -> None:
    """Baichuan's vocabulary has 390 such pieces, and llama.cpp's converter does not mark them."""
    path = shared / "tokenizers" / "baichuan-13b.tokenizer.model"
    if not path.is_file():
        pytest.skip(f"no tokenizer at {path}")
    settings = sentencepiece_settings(sentencepiece.SentencePieceProcessor(model_file=str(path)))
    with pytest.raises(lightrm.LightRMError, match=r"has the piece '<SEP>' .*does not read"):
        described(settings, path)


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe", "gpt-2"])
def test_byte_level(pre: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTRM_CACHE", str(tmp_path))
    made, settings = byte_level_settings(pre)
    found = read(folder_of(settings, Path("model.gguf")))
    for text in (*TEXTS, "<|im_start|>user\nWhat <think> is<|im_end|>\n"):
        assert found.encode(text).ids == made.encode(text).ids, text
    assert found.get_vocab() == made.get_vocab(), "without the padding of the embedding"


def test_a_file_scores_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same scores as from a folder with the tokenizer that was written into the file; beside it, it comes first."""
    monkeypatch.setenv("LIGHTRM_CACHE", str(tmp_path / "cache"))
    made, settings = byte_level_settings("qwen2")
    model = plain_model(vocab_size=len(settings["tokenizer.ggml.tokens"]))
    model.load_state_dict(write(tmp_path / "model.gguf", model, MIXES["Q8_0"], more=settings))
    model.save_pretrained(tmp_path / "plain")
    made.save(str(tmp_path / "plain" / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT, "bos_token": "<|im_start|>",
              "eos_token": "<|im_end|>"}  # fmt: skip
    (tmp_path / "plain" / "tokenizer_config.json").write_text(json.dumps(config))
    asked = "What is it? <|im_end|>", ["sunny weather", "warm"]
    rm, expected = (lightrm.load(tmp_path / name, scheme="fp32") for name in ("model.gguf", "plain"))
    np.testing.assert_allclose(rm.score(*asked), expected.score(*asked), atol=1e-5)
    quantized = lightrm.load(tmp_path / "model.gguf", scheme="w8a8")
    quantized.save(tmp_path / "own")
    np.testing.assert_array_equal(lightrm.load(tmp_path / "own").score(*asked), quantized.score(*asked))
    beside = {**config, "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(beside))
    made.save(str(tmp_path / "tokenizer.json"))
    assert (lightrm.load(tmp_path / "model.gguf", scheme="fp32").score(*asked) != rm.score(*asked)).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokenizer.ggml.model": "t5"}, "its tokenizer is 't5'; lightrm reads gpt2 and llama"),
        ({"tokenizer.ggml.pre": "tekken"}, "splits text as 'tekken'"),
        ({"tokenizer.ggml.merges": ["a"]}, "merges are no list of pairs"),
        ({"tokenizer.ggml.merges": None}, "merges are no list of pairs"),
        ({"tokenizer.ggml.token_type": np.array([1])}, "no lists of one length"),
        ({"tokenizer.ggml.tokens": None}, "no lists of one length"),
        ({"tokenizer.ggml.model": "llama"}, "its pieces have no scores"),
    ],
)
def test_other_tokenizers_are_refused_by_name(change: dict, says: str) -> None:
    _, settings = byte_level_settings("qwen2")
    with pytest.raises(lightrm.LightRMError, match=rf"model\.gguf: .*{says}.*beside the GGUF file"):
        described(settings | change, Path("model.gguf"))


def test_token_ids_are_scored_without_a_tokenizer(tmp_path: Path) -> None:
    model = plain_model()
    write(tmp_path / "model.gguf", model, MIXES["Q8_0"], more={"tokenizer.ggml.model": "rwkv"})
    with pytest.warns(UserWarning, match=r"only token ids can be scored: .*model\.gguf: its tokenizer is 'rwkv'"):
        rm = lightrm.load(tmp_path / "model.gguf")
    assert rm.score_ids([[1, 2, 3]]).shape == (1,)
    with pytest.raises(lightrm.LightRMError, match="beside the GGUF file"):
        rm.score("a", ["b"])
