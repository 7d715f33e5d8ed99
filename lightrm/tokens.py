"""Text -> token ids: which BOS and EOS, how a template's pieces become ids, and what is cut when it is too long.

special_tokens_map.json is asked first, then tokenizer_config.json, then the vocabulary itself: published reward
models disagree with their own vocabulary (Ziya's BOS is `</s>`), and the map is what their tokenizers obeyed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightrm.chat import chat_template
from lightrm.errors import TemplateError, TokenizerError, TooLongError
from lightrm.templates import AnyTemplate, Piece, Special, Text, Turn
from lightrm.vocabulary import JsonVocabulary, SentencePieceVocabulary, Vocabulary, read_vocabulary

SANE_LENGTH = 1 << 20  # transformers writes 1e30 for "no limit"


@dataclass(frozen=True, slots=True)
class Encoded:
    """What is scored: ids and their pieces, the whole text before any cut, and how many tokens were cut off."""

    token_ids: list[int]
    pieces: list[str]
    text: str
    cut: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """A vocabulary with its special tokens.

    chat_source: the Jinja text of the checkpoint's chat template, None if it has none.
    reward_id: a token appended to every sequence, at which the score is read (InternLM2).
    """

    vocabulary: Vocabulary
    bos: str
    eos: str
    add_bos: bool
    specials: frozenset[str]
    chat_source: str | None = None
    max_length: int | None = None
    parse_specials: bool = False
    reward_id: int | None = None

    def own_template(self) -> AnyTemplate:
        """Raises TemplateError if the checkpoint carries no chat template."""
        if self.chat_source is None:
            raise TemplateError("the checkpoint has no chat template: pass template=... by name")
        return chat_template(self.chat_source, self.specials, self.bos, self.eos, self.parse_specials)

    def encode(self, template: AnyTemplate, turns: Sequence[Turn], response: str, limit: int, strict: bool) -> Encoded:
        """Ids of one conversation with its answer, at most `limit` tokens.

        Raises TooLongError when tokens would be cut and `strict` is set.
        """
        before, answer = template.render(turns, response)
        if (template.bos is None and self.add_bos) or template.bos:
            before = [Special("bos"), *before]
        if template.joined == "all":
            pieces = join([*before, *answer])
        else:
            pieces = [*(join(before) if template.joined == "prompt" else before), *answer]
        runs = [self.piece_ids(piece, first=k == 0) for k, piece in enumerate(pieces)]
        reward = [] if self.reward_id is None else [self.reward_id]
        limit -= len(reward)
        ids = [i for run in runs for i in run]
        if not ids:
            raise TemplateError(
                f"template {template.name!r} makes no token of this conversation: there is nothing to score"
            )
        kept = ids
        if template.cut == "each side":
            seam = sum(map(len, runs[: len(pieces) - len(answer)]))
            kept = cut_end(ids[:seam], limit // 2, 0) + cut_end(ids[seam:], limit // 2, tail(pieces, runs))
        elif len(ids) > limit:
            if template.cut == "response end":
                kept = cut_end(ids, limit, tail(pieces, runs))
            else:
                opening = len(runs[0]) if isinstance(pieces[0], Special) else 0
                kept = ids[:opening] + ids[len(ids) - (limit - opening) :]
        if strict and len(kept) < len(ids):
            raise TooLongError(f"the text has {len(ids)} tokens, the limit is {limit}; strict=True forbids cutting it")
        text = "".join(self.spell(p) if isinstance(p, Special) else p.text for p in pieces)
        kept = kept + reward
        return Encoded(kept, [self.vocabulary.piece(i) for i in kept], text, len(ids) + len(reward) - len(kept))

    def piece_ids(self, piece: Piece, first: bool) -> list[int]:
        if isinstance(piece, Text):
            return self.vocabulary.encode(piece.text, first=first, glued=piece.glued) if piece.text else []
        token_id = self.vocabulary.id_of(self.spell(piece))
        if token_id is None:
            raise TemplateError(
                f"the template needs the special token {self.spell(piece)!r}, which this vocabulary does not have; "
                "choose another template"
            )
        return [token_id]

    def spell(self, special: Special) -> str:
        return {"bos": self.bos, "eos": self.eos}.get(special.name, special.name)


def join(pieces: Sequence[Piece]) -> list[Piece]:
    """Adjacent texts as one."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if isinstance(piece, Text) and isinstance(last, Text):
            joined[-1] = replace(last, text=last.text + piece.text)
        else:
            joined.append(piece)
    return joined


def tail(pieces: Sequence[Piece], runs: Sequence[list[int]]) -> int:
    """Tokens of the special token that closes the text; 0 if it ends in text."""
    return len(runs[-1]) if isinstance(pieces[-1], Special) else 0


def cut_end(ids: list[int], limit: int, keep: int) -> list[int]:
    """At most `limit` ids; what goes is the end before the last `keep`."""
    if len(ids) <= limit:
        return ids
    return ids[: limit - keep] + ids[len(ids) - keep :]


def read_tokens(
    folder: Path, *, parse_specials: bool = False, reward_id: int | None = None, fallback: dict[str, Any] | None = None
) -> Tokens:
    """Read a checkpoint's tokenizer files; `fallback` is its config.json, asked last for bos and eos ids.

    Raises TokenizerError if there are none or they cannot be read.
    """
    special_map = read_json(folder / "special_tokens_map.json")
    config = read_json(folder / "tokenizer_config.json")
    added = added_tokens(folder, config)
    vocabulary = read_vocabulary(folder, added, parse_specials)
    named = {role: special_name(special_map, role) or special_name(config, role) for role in ("bos", "eos")}
    for role, own in own_specials(vocabulary, fallback or {}).items():
        named[role] = named[role] or own
    specials = {*added, *named.values(), special_name(special_map, "pad"), special_name(special_map, "unk")}
    if isinstance(vocabulary, JsonVocabulary):
        specials |= set(vocabulary.added_tokens())
    elif isinstance(vocabulary, SentencePieceVocabulary) and parse_specials:
        # Hugging Face's slow tokenizers split text at these before sentencepiece sees it.
        live = {s: i for s in specials if s and (i := vocabulary.id_of(s)) is not None}
        vocabulary = SentencePieceVocabulary((folder / "tokenizer.model").read_bytes(), live, True)
    longest = config.get("model_max_length")
    return Tokens(
        vocabulary=vocabulary,
        bos=named["bos"],
        eos=named["eos"],
        add_bos=adds_bos(vocabulary, config),
        specials=frozenset(s for s in specials if s),
        chat_source=read_chat_source(folder, config),
        max_length=longest if isinstance(longest, int) and 0 < longest < SANE_LENGTH else None,
        parse_specials=parse_specials,
        reward_id=reward_id,
    )


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise TokenizerError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def special_name(config: dict[str, Any], role: str) -> str:
    """The spelling of a special token: a string, or an object with `content`; empty if unset."""
    value = config.get(f"{role}_token")
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def added_tokens(folder: Path, config: dict[str, Any]) -> dict[str, int]:
    """Tokens that JSON files add to a tokenizer.model, by spelling."""
    found = {text: i for text, i in read_json(folder / "added_tokens.json").items() if isinstance(i, int)}
    decoder = config.get("added_tokens_decoder") or {}
    try:
        return found | {token["content"]: int(token_id) for token_id, token in decoder.items()}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise TokenizerError(
            f"{folder}/tokenizer_config.json: added_tokens_decoder is not readable: {error!r}"
        ) from error


def own_specials(vocabulary: Vocabulary, config: dict[str, Any]) -> dict[str, str]:
    """BOS and EOS as the vocabulary or, for a tokenizer.json, config.json names them."""
    if isinstance(vocabulary, SentencePieceVocabulary):
        ids: dict[str, Any] = {"bos": vocabulary.processor.bos_id(), "eos": vocabulary.processor.eos_id()}
    else:
        ids = {role: config.get(f"{role}_token_id") for role in ("bos", "eos")}
    return {role: vocabulary.piece(i) if isinstance(i, int) and i >= 0 else "" for role, i in ids.items()}


def adds_bos(vocabulary: Vocabulary, config: dict[str, Any]) -> bool:
    """Whether the tokenizer itself puts BOS before a text."""
    if isinstance(vocabulary, JsonVocabulary):
        return vocabulary.adds_first()
    llama = "llama" in str(config.get("tokenizer_class", "")).lower()  # the one slow class that adds BOS unasked
    return bool(config.get("add_bos_token", llama))


def read_chat_source(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    source = config.get("chat_template") or read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(source, list):  # several named templates
        source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
    return source if isinstance(source, str) else None
