"""The tokenizer in a GGUF file's metadata, as the tokenizer.json and tokenizer_config.json that transformers reads.

    tokenizer.ggml.model        "gpt2": byte-level BPE with merges; "llama": sentencepiece's BPE, merges from the scores
    tokenizer.ggml.pre          names the pattern that a text is split by (gpt2 only): see SPLITS
    tokenizer.ggml.tokens       the pieces by id, with token_type: 1 normal, 2 unknown, 3 control, 4 user-defined,
                                5 unused, 6 byte
    tokenizer.ggml.bos_token_id, add_bos_token ...; tokenizer.chat_template

Files of another kind are refused by name: tokenizer files beside the GGUF file are read in place of its own.

A sentencepiece text gets a space at its start and after every special token, as in llama.cpp and in transformers' old
(`legacy`) tokenizers, and is not normalized otherwise, as with LLaMA and Mistral: the file does not tell whether its
model was trained differently. Pieces that sentencepiece matches before all others are written as normal ones with the
score 0. A vocabulary with some is refused.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from lightrm.errors import TokenizerError
from lightrm.files import cache_folder, write_text
from lightrm.text.tokenizer_files import CONFIG, DESCRIBED

NAMED = "tokenizer.ggml.model"
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "\u2581"  # sentencepiece's mark of a space
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3, QWEN2 = rf"{WORDS}|\p{{N}}{{1,3}}|{REST}", rf"{WORDS}|\p{{N}}|{REST}"
# Pattern by its name; None is the one that the byte-level step has itself.
SPLITS: dict[str, str | None] = {"llama-bpe": LLAMA3, "llama3": LLAMA3, "llama-v3": LLAMA3, "qwen2": QWEN2,
                                 "gpt-2": None}  # fmt: skip
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
CURE = "copy the model's tokenizer files beside the GGUF file to score text"


def folder_of(settings: Mapping[str, Any], path: Path) -> Path:
    """Write the tokenizer of a file into lightrm's cache, and return its folder. Raises TokenizerError."""
    made = {name: json.dumps(value, ensure_ascii=False) for name, value in described(settings, path).items()}
    digest = hashlib.sha256(json.dumps(made).encode()).hexdigest()[:32]
    folder = cache_folder() / "gguf" / digest
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        return placed(made, folder)
    return placed(made, Path(tempfile.mkdtemp(prefix="lightrm-")))


def placed(files: Mapping[str, str], folder: Path) -> Path:
    for name, text in files.items():
        with suppress(OSError, ValueError):
            if (folder / name).read_text(encoding="utf-8") == text:
                continue
        write_text(folder / name, text)
    return folder


def described(settings: Mapping[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """Return the two files as objects. Raises TokenizerError."""
    model = settings.get(NAMED)
    if model not in ("gpt2", "llama"):
        raise TokenizerError(f"{path}: its tokenizer is {str(model)[:80]!r}; lightrm reads gpt2 and llama: {CURE}")
    pieces = Pieces(settings, path)
    parts = byte_level(settings, pieces) if model == "gpt2" else sentencepiece(settings, pieces)
    names = {
        f"{role}_token": pieces.named(settings.get(f"tokenizer.ggml.{key}_token_id")) for role, key in ROLES.items()
    }
    usual = model == "llama" or settings.get("tokenizer.ggml.pre") in ("llama-bpe", "llama3", "llama-v3")
    around = ["A"]
    if settings.get("tokenizer.ggml.add_bos_token", usual) and names["bos_token"]:
        around.insert(0, names["bos_token"])
    if settings.get("tokenizer.ggml.add_eos_token", False) and names["eos_token"]:
        around.append(names["eos_token"])
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": pieces.added(),
        "post_processor": template_of(around, pieces), **parts,
    }  # fmt: skip
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
              **{role: name for role, name in names.items() if name}}  # fmt: skip
    if isinstance(chat := settings.get("tokenizer.chat_template"), str):
        config["chat_template"] = chat
    return {DESCRIBED: tokenizer, CONFIG: config}


class Pieces:
    """The pieces of a file by id, with their types. Unused ones at the end, which pad the embedding, are left out.

    base: how many ids the model itself has; all from there on are added tokens.
    """

    def __init__(self, settings: Mapping[str, Any], path: Path) -> None:
        """Raises TokenizerError."""
        self.path = path
        tokens, types = (settings.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
        lists = isinstance(tokens, list) and isinstance(types, np.ndarray) and len(tokens) == len(types)
        if not lists or not tokens or types is None or not all(isinstance(token, str) for token in tokens):
            raise TokenizerError(f"{path}: its tokens and token_type are no lists of one length: {CURE}")
        self.texts, self.types = list(tokens), [int(kind) for kind in types]
        while self.texts and self.types[-1] == UNUSED:
            self.texts.pop()
            self.types.pop()
        self.base = len(self.texts)
        while self.base and self.types[self.base - 1] in (CONTROL, USER):
            self.base -= 1
        if len(set(self.texts)) < len(self.texts):
            raise TokenizerError(f"{path}: its tokens list a piece twice: {CURE}")

    def named(self, token_id: Any) -> str:
        """Return the piece of an id; an empty string if there is none."""
        there = isinstance(token_id, int) and not isinstance(token_id, bool) and 0 <= token_id < len(self.texts)
        return self.texts[token_id] if there else ""

    def vocabulary(self) -> dict[str, int]:
        return {text: i for i, text in enumerate(self.texts[: self.base])}

    def added(self) -> list[dict[str, Any]]:
        """Return the tokens that are matched whole in a text."""
        return [
            {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": kind != USER}
            for i, (text, kind) in enumerate(zip(self.texts, self.types, strict=True))
            if kind in (UNKNOWN, CONTROL, USER) and text
        ]  # fmt: skip


def byte_level(settings: Mapping[str, Any], pieces: Pieces) -> dict[str, Any]:
    """Return the parts of a byte-level BPE tokenizer. Raises TokenizerError."""
    pre, merges = settings.get("tokenizer.ggml.pre"), settings.get("tokenizer.ggml.merges")
    if pre not in SPLITS:
        raise TokenizerError(
            f"{pieces.path}: it splits text as {str(pre)[:80]!r}; lightrm knows {', '.join(SPLITS)}: {CURE}"
        )
    if not isinstance(merges, list) or not all(isinstance(merge, str) and merge.count(" ") == 1 for merge in merges):
        raise TokenizerError(f"{pieces.path}: its merges are no list of pairs: {CURE}")
    split = SPLITS[pre]
    steps: list[dict[str, Any]] = [
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": split is None}
    ]
    if split is not None:
        steps.insert(0, {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False})
    return {
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": bpe(pieces, [merge.split(" ") for merge in merges]) | {"ignore_merges": split == LLAMA3},
    }


def sentencepiece(settings: Mapping[str, Any], pieces: Pieces) -> dict[str, Any]:
    """Return the parts of a tokenizer that does what sentencepiece's BPE does. Raises TokenizerError."""
    scores = settings.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) < len(pieces.texts):
        raise TokenizerError(f"{pieces.path}: its pieces have no scores: {CURE}")
    strange = [text for text, kind in zip(pieces.texts, pieces.types, strict=True)
               if kind == UNUSED or (kind == USER and not text.strip(f" {SPACE}"))]  # fmt: skip
    first = [text for text, kind, score in zip(pieces.texts, pieces.types, scores, strict=False)
             if kind == NORMAL and score >= 0]  # fmt: skip
    strange += first if len(first) > 1 else []  # the first merge has the score 0 too
    unknown = [text for text, kind in zip(pieces.texts, pieces.types, strict=True) if kind == UNKNOWN]
    if strange or len(unknown) != 1:
        raise TokenizerError(
            f"{pieces.path}: its tokenizer has the piece {(strange or [''])[0][:80]!r} and {len(unknown)} pieces for "
            f"what is unknown, which lightrm does not read: {CURE}"
        )
    spaces: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    if settings.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, {"type": "Prepend", "prepend": SPACE})
    steps = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"},
             {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]  # fmt: skip
    model = bpe(pieces, merges_of(pieces, [float(score) for score in scores]))
    return {
        "normalizer": {"type": "Sequence", "normalizers": spaces},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": model | {"unk_token": unknown[0], "fuse_unk": True, "byte_fallback": BYTE in pieces.types},
    }


def merges_of(pieces: Pieces, scores: list[float]) -> list[list[str]]:
    """Return the merges that make each piece from two others, those of the highest score first."""
    vocabulary = pieces.vocabulary()
    made = []
    for text, i in vocabulary.items():
        if pieces.types[i] != NORMAL:
            continue
        pairs = [(text[:at], text[at:]) for at in range(1, len(text))]
        pairs = [(left, right) for left, right in pairs if left in vocabulary and right in vocabulary]
        pairs.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        made += [(-scores[i], pair) for pair in pairs]
    made.sort(key=lambda entry: entry[0])
    return [list(pair) for _, pair in made]


def bpe(pieces: Pieces, merges: list[list[str]]) -> dict[str, Any]:
    return {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": pieces.vocabulary(), "merges": merges,
    }  # fmt: skip


def template_of(around: list[str], pieces: Pieces) -> dict[str, Any] | None:
    """Return the post-processor that puts BOS and EOS around a text; None if it puts nothing there."""
    if around == ["A"]:
        return None
    single: list[dict[str, Any]] = [
        {"Sequence": {"id": "A", "type_id": 0}} if name == "A" else {"SpecialToken": {"id": name, "type_id": 0}}
        for name in around
    ]
    names = [name for name in around if name != "A"]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [pieces.texts.index(name)], "tokens": [name]} for name in names},
    }
