"""Tiny tokenizers of every kind that people publish, trained once: the raw material of `tests/tokenizer_draws.py`.

A `tokenizer.json` is returned as its JSON object, so that settings can be changed without training again.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from functools import lru_cache
from io import BytesIO
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

Json = dict[str, Any]
CORPUS = (
    "Human: what is the weather today? Assistant: it is sunny and warm. Hello world, hello there!",
    "The quick brown fox jumps over the lazy dog.\n\nIt said: hello, hello; and then (again) nothing.\n",
    "user\nsystem\nassistant\nYou are a helpful assistant. <|im_start|>user <|im_end|>\n <s> </s> [INST] [/INST]",
    "你好，今天天气很好。 12 345 6789 naïve café façade e\u0301 ﬁne   three   spaces\t\ttabs\r\n  end  ",
    'def f(x):\n    return x + 1\n\n\n<think>\nstep by step\n</think>\n\nso: 42. <tool_call> {"a": [1, 2]}',
)
BYTES = tuple(f"<0x{value:02X}>" for value in range(256))
UNKNOWN, BOS, EOS = "<unk>", "<s>", "</s>"
# How Llama-3's and Qwen's tokenizers cut a text: facts of their published files.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")


def as_json(tokenizer: Tokenizer) -> Json:
    return dict(json.loads(tokenizer.to_str()))


def byte_level(*, cut: str | None = None, prefix: bool = False, ignore_merges: bool = False) -> Tokenizer:
    """GPT-2's kind; with `cut`, Llama-3's and Qwen's."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=cut is None)
    parts = [] if cut is None else [pre_tokenizers.Split(Regex(cut), behavior="isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*parts, level]) if parts else level
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, show_progress=False, initial_alphabet=alphabet)
    )
    return tokenizer


def byte_fallback(unknown: str = UNKNOWN) -> Tokenizer:
    """Llama-2's vocabulary: `▁` for a space, and a piece for each byte that no other piece spells."""
    tokenizer = Tokenizer(models.BPE(unk_token=unknown, fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    trainer = trainers.BpeTrainer(vocab_size=520, show_progress=False, special_tokens=[UNKNOWN, BOS, EOS, *BYTES])
    tokenizer.train_from_iterator([part for text in CORPUS for part in text.split("\n")], trainer)
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(pieces)
    return tokenizer


@lru_cache
def trained(kind: str) -> str:
    """A `tokenizer.json` of this kind, with no added tokens but those of its own vocabulary, and no post-processor."""
    if kind == "gpt2":
        tokenizer = byte_level()
    elif kind == "gpt2 prefix":
        tokenizer = byte_level(prefix=True)
    elif kind == "llama3":
        tokenizer = byte_level(cut=LLAMA3, ignore_merges=True)
    elif kind == "qwen":
        tokenizer = byte_level(cut=QWEN)
        tokenizer.normalizer = normalizers.NFC()
    elif kind.startswith("metaspace"):
        tokenizer = byte_fallback()
        scheme = kind.removeprefix("metaspace ")
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    elif kind == "prepend":  # Llama-2's file of 2023
        tokenizer = byte_fallback()
        tokenizer.pre_tokenizer = None  # type: ignore[assignment]
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "gemma":
        tokenizer = byte_fallback()
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    elif kind == "unigram":
        tokenizer = unigram()
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
        trainer = trainers.WordPieceTrainer(vocab_size=200, show_progress=False, special_tokens=names)
        tokenizer.train_from_iterator(CORPUS, trainer)
    elif kind == "wordlevel":
        tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        words = trainers.WordLevelTrainer(special_tokens=[UNKNOWN], show_progress=False)
        tokenizer.train_from_iterator(CORPUS, words)
    else:
        raise ValueError(kind)
    found = as_json(tokenizer)
    found["added_tokens"] = [token for token in found["added_tokens"] if token["content"] not in BYTES]
    return json.dumps(found)


def unigram() -> Tokenizer:
    """T5's and XLM-R's kind: a Unigram with sentencepiece's table of characters."""
    model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model("unigram", rule="nmt_nfkc"))
    vocabulary = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    from sentencepiece import sentencepiece_model_pb2

    table = sentencepiece_model_pb2.ModelProto.FromString(model.serialized_model_proto())
    charsmap = base64.b64encode(table.normalizer_spec.precompiled_charsmap).decode()
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Precompiled(base64.b64decode(charsmap)), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in (UNKNOWN, BOS, EOS)])
    return tokenizer


KINDS = (
    "gpt2", "gpt2 prefix", "llama3", "qwen", "metaspace first", "metaspace always", "metaspace never", "prepend",
    "gemma", "unigram", "wordpiece", "wordlevel",
)  # fmt: skip


def tokenizer_json(kind: str) -> Json:
    """A fresh copy that may be changed."""
    return dict(json.loads(trained(kind)))


@lru_cache(maxsize=256)
def sentencepiece_model(
    model_type: str = "bpe",
    *,
    rule: str = "identity",
    symbols: tuple[str, ...] = (),
    control: tuple[str, ...] = (),
    byte_fallback: bool = True,
    dummy_prefix: bool = True,
    split_digits: bool = True,
    extra_spaces: bool = False,
) -> bytes:
    """A trained `tokenizer.model`; `symbols` are user-defined pieces, `control` are control pieces."""
    target = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in CORPUS for line in text.split("\n") if line] * 4),
        model_writer=target,
        model_type=model_type,
        vocab_size=480 if byte_fallback else 220,
        byte_fallback=byte_fallback,
        split_digits=split_digits,
        normalization_rule_name=rule,
        user_defined_symbols=list(symbols),
        control_symbols=list(control),
        add_dummy_prefix=dummy_prefix,
        remove_extra_whitespaces=not extra_spaces,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return target.getvalue()


def add_tokens(description: Json, tokens: Sequence[tuple[str, Json]]) -> Json:
    """The same tokenizer.json with added tokens: (spelling, flags). A spelling that the vocabulary has keeps its id."""
    tokenizer = Tokenizer.from_str(json.dumps(description))
    for spelling, flags in tokens:
        token = AddedToken(spelling, **flags)
        if flags.get("special"):
            tokenizer.add_special_tokens([token])
        else:
            tokenizer.add_tokens([token])
    return as_json(tokenizer)


def ids_of(description: Json) -> dict[str, int]:
    return Tokenizer.from_str(json.dumps(description)).get_vocab(with_added_tokens=True)
