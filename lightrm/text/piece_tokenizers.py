"""Pieces of text <-> ids: the two kinds of tokenizer files, behind one small protocol.

A user's text must never become a special token. A sentencepiece model matches its user-defined pieces
(`<reserved_102>`) inside any text, and a tokenizer.json matches its added tokens (`<|im_end|>`). By default both are
turned off here. With `parse_specials=True` they act, as in Hugging Face's tokenizers.
"""

from __future__ import annotations

import json
import re
from copy import deepcopy
from functools import cache, cached_property
from importlib import import_module
from typing import Any, Protocol

import sentencepiece
import tokenizers

from lightrm.errors import TemplateError, TokenizerError
from lightrm.text.guard import pattern_of, steers
from lightrm.text.tokenizer_limits import as_tokenizer_errors

USER_DEFINED, CONTROL = 4, 3  # SentencePiece.Type in sentencepiece_model.proto


class Vocabulary(Protocol):
    """What frozen templates need of a tokenizer."""

    @property
    def size(self) -> int:
        """Number of ids, added tokens included."""

    def encode(self, text: str, *, first: bool, glued: bool) -> list[int]:
        """Return the ids of a run of text. first: it opens the sequence; glued: no space mark is put before it."""

    def id_of(self, piece: str) -> int | None:
        """Return the id of one exact piece or special token, None if there is none."""

    def piece(self, token_id: int) -> str:
        """Return the piece of an id, as the vocabulary spells it."""


def special_id(vocabulary: Vocabulary, spelling: str) -> int:
    """Return the id of a special token that a template writes. Raises TemplateError if the vocabulary lacks it."""
    token_id = vocabulary.id_of(spelling)
    if token_id is None:
        raise TemplateError(
            f"the template needs the special token {spelling!r}, which this vocabulary does not have; choose another "
            "template"
        )
    return token_id


class SentencePieceVocabulary:
    """A `tokenizer.model`. added: tokens that JSON files beside it add, with their ids."""

    def __init__(self, model: bytes, added: dict[str, int], parse_specials: bool) -> None:
        proto = model_proto(model)
        if not parse_specials:
            disarm(proto)
        self.processor = load_processor(proto)
        proto.normalizer_spec.add_dummy_prefix = False
        self.glued = load_processor(proto)
        self.added = added
        self.live = re.compile(f"({pattern_of(added).pattern})") if parse_specials and added else None

    @property
    def size(self) -> int:
        return max([self.processor.get_piece_size(), *(i + 1 for i in self.added.values())])

    def encode(self, text: str, *, first: bool, glued: bool) -> list[int]:
        processor = self.glued if glued else self.processor
        if self.live is None:
            return list(processor.encode(text))
        ids: list[int] = []
        for part in self.live.split(text):
            ids += [self.added[part]] if part in self.added else processor.encode(part)
        return ids

    def id_of(self, piece: str) -> int | None:
        if piece in self.added:
            return self.added[piece]
        token_id = int(self.processor.piece_to_id(piece))
        return token_id if self.processor.id_to_piece(token_id) == piece else None

    def piece(self, token_id: int) -> str:
        if token_id < self.processor.get_piece_size():
            return str(self.processor.id_to_piece(token_id))
        return next((text for text, i in self.added.items() if i == token_id), f"<{token_id}>")

    def own(self, role: str) -> str:
        """Return the model's own BOS or EOS; empty if it has none."""
        token_id = self.processor.bos_id() if role == "bos" else self.processor.eos_id()
        return self.piece(token_id) if token_id >= 0 else ""


class JsonVocabulary:
    """A `tokenizer.json`, read by the tokenizers library."""

    def __init__(self, content: bytes, parse_specials: bool) -> None:
        with as_tokenizer_errors("tokenizer.json cannot be read"):
            description = json.loads(content)
            if not parse_specials:
                for token in description.get("added_tokens", ()):
                    token["special"] = steers(token["content"], token["special"])
            self.tokenizer = tokenizers.Tokenizer.from_str(json.dumps(description))
            self.later = tokenizers.Tokenizer.from_str(json.dumps(without_first_prefix(description)))
        for tokenizer in (self.tokenizer, self.later):
            tokenizer.encode_special_tokens = not parse_specials
            tokenizer.no_truncation()
            tokenizer.no_padding()

    @property
    def size(self) -> int:
        return int(self.tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, first: bool, glued: bool) -> list[int]:
        tokenizer = self.tokenizer if first and not glued else self.later
        with as_tokenizer_errors("tokenizer.json cannot encode a text"):
            return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def id_of(self, piece: str) -> int | None:
        token_id = self.tokenizer.token_to_id(piece)
        return None if token_id is None else int(token_id)

    def piece(self, token_id: int) -> str:
        return self.tokenizer.id_to_token(token_id) or f"<{token_id}>"

    @cached_property
    def adds_first(self) -> bool:
        """Whether the file's own post-processor puts a token before a text."""
        with as_tokenizer_errors("tokenizer.json cannot encode a text"):
            bare = self.tokenizer.encode("a", add_special_tokens=False).ids
            return list(self.tokenizer.encode("a", add_special_tokens=True).ids[: len(bare)]) != list(bare)


def without_first_prefix(description: dict) -> dict:  # type: ignore[type-arg]
    """Return the same tokenizer for a run of text that does not open the sequence.

    Metaspace with prepend_scheme `first` adds a space mark only at the very start. A later run that is encoded alone
    would get one that the whole text does not have.
    """
    copy = deepcopy(description)
    pending = [copy.get("pre_tokenizer")]
    while pending:
        step = pending.pop()
        if isinstance(step, dict):
            pending += step.get("pretokenizers", ())
            if step.get("type") == "Metaspace" and step.get("prepend_scheme") == "first":
                step["prepend_scheme"] = "never"
    return copy


def load_processor(proto: Any) -> sentencepiece.SentencePieceProcessor:
    """Raises TokenizerError."""
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    except Exception as error:  # the binding raises RuntimeError, OSError or TypeError by version
        raise TokenizerError(f"tokenizer.model is not a sentencepiece model: {error}") from error


def disarm(proto: Any) -> None:
    """Retype the user-defined marks of a sentencepiece model as control pieces. These keep their ids, and no text
    matches them."""
    for piece in proto.pieces:
        if piece.type == USER_DEFINED and steers(piece.piece, special=False):
            piece.type = CONTROL


def marks_of(model: bytes) -> set[str]:
    """Return the control and user-defined pieces of a sentencepiece model that steer a model."""
    listed = (piece.piece for piece in model_proto(model).pieces if piece.type in (USER_DEFINED, CONTROL))
    return {piece for piece in listed if steers(piece, special=False)}


@cache
def messages() -> Any:
    """Return sentencepiece's protobuf classes.

    Those that come with sentencepiece 0.2.3 need one major version of protobuf. For any other, transformers has a copy
    that all versions read. Both cannot be imported in one process.
    """
    try:
        return import_module("sentencepiece.sentencepiece_model_pb2")
    except Exception:  # ImportError, or protobuf's own VersionError
        return import_module("transformers.utils.sentencepiece_model_pb2_new")


def model_proto(model: bytes) -> Any:
    """Return a sentencepiece model as its description. Raises TokenizerError."""
    proto = messages().ModelProto()
    try:
        proto.ParseFromString(model)
    except Exception as error:  # protobuf's own, by version
        raise TokenizerError(f"tokenizer.model is not a sentencepiece model ({len(model)} bytes): {error}") from error
    return proto
