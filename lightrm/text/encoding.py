"""Text -> token ids: which tokenizer reads a text, which BOS and EOS it gets, and what is cut when it is too long.

There are two ways. Where the checkpoint's own template decides, or none, the text goes whole through the checkpoint's
own tokenizer, as transformers reads it (`checkpoint_tokenizer`). A frozen template repeats a trainer that tokenized
its pieces one by one: they go through the bare vocabulary (`piece_tokenizers`). For these, special_tokens_map.json is
asked first, then tokenizer_config.json, then the vocabulary itself: published reward models disagree with their own
vocabulary (Ziya's BOS is `</s>`), and the map is what their tokenizers obeyed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from lightrm.errors import TemplateError, TooLongError
from lightrm.text.chat_template import ChatTemplate, chat_template
from lightrm.text.checkpoint_tokenizer import CheckpointTokenizer, OwnCodeError, open_tokenizer
from lightrm.text.guard import Span, overlaps, pattern_of, steers
from lightrm.text.piece_tokenizers import JsonVocabulary, SentencePieceVocabulary, Vocabulary, marks_of
from lightrm.text.templates import AnyTemplate, Ending, Piece, Special, Template, Text, Turn, WholeTemplate
from lightrm.text.tokenizer_files import MODEL, TokenizerFiles, read_files

NOTHING = re.compile(r"(?!)")


@dataclass(frozen=True, slots=True)
class Encoded:
    """What is scored: ids, the whole text before any cut, and how many tokens were cut off."""

    token_ids: list[int]
    text: str
    cut: int


class Tokens:
    """The text side of a checkpoint. Made by `read_tokens`; safe to use from several threads.

    reward_id: a token appended to every sequence, at which the score is read (InternLM2).
    ending: what the layout's trainer puts at the end of a text, whatever the template.
    """

    def __init__(self, files: TokenizerFiles, parse_specials: bool, reward_id: int | None, ending: Ending) -> None:
        self.files, self.parse_specials, self.reward_id, self.ending = files, parse_specials, reward_id, ending
        self.max_length = files.max_length
        self.opened = open_tokenizer(files.folder, parse_specials) if files.described else None
        self.model: SentencePieceVocabulary | None = None
        if self.opened is None:
            self.model, self.bos, self.eos = self.read_model()
        else:
            self.bos, self.eos = self.opened.bos, self.opened.eos

    def read_model(self) -> tuple[SentencePieceVocabulary, str, str]:
        """A tokenizer.model, its BOS and its EOS."""
        files, content = self.files, (self.files.folder / MODEL).read_bytes()
        model = SentencePieceVocabulary(content, files.added, self.parse_specials)
        bos, eos = (files.named(role) or model.own(role) for role in ("bos", "eos"))
        if self.parse_specials:
            # Hugging Face's slow tokenizers split text at these before sentencepiece sees it.
            names = {*files.added, bos, eos, files.named("pad"), files.named("unk")}
            live = {name: i for name in names if name and (i := model.id_of(name)) is not None}
            model = SentencePieceVocabulary(content, live, True)
        return model, bos, eos

    @cached_property
    def described(self) -> JsonVocabulary:
        """The vocabulary of what transformers opened: large ones take seconds, and whole texts need none."""
        assert self.opened is not None
        return JsonVocabulary(self.opened.description(), self.parse_specials)

    @property
    def vocabulary(self) -> Vocabulary:
        """Of pieces, for frozen templates."""
        return self.described if self.model is None else self.model

    @property
    def add_bos(self) -> bool:
        """Whether a text in pieces gets BOS unasked."""
        if self.model is None:
            return self.described.adds_first
        # The one slow class that adds BOS unasked.
        llama = "llama" in str(self.files.config.get("tokenizer_class", "")).lower()
        return bool(self.files.config.get("add_bos_token", llama))

    def prepare(self, template: AnyTemplate) -> None:
        """Open what the texts of a template go through. Raises TokenizerError if it cannot be read."""
        _ = self.vocabulary if isinstance(template, Template) else self.own

    @cached_property
    def own(self) -> CheckpointTokenizer | None:
        """The tokenizer of whole texts; None where its class is code of its own, and pieces have to do."""
        try:
            return self.opened or open_tokenizer(self.files.folder, self.parse_specials)
        except OwnCodeError:
            return None

    def own_template(self) -> ChatTemplate:
        """Raises TemplateError if the checkpoint carries no chat template, or one that is no Jinja."""
        source = self.files.chat_source()
        if self.own is not None:
            return chat_template(source, self.own.context)
        named = {role: self.bos if role == "bos" else self.eos if role == "eos" else self.files.named(role)
                 for role in ("bos", "eos", "pad", "unk")}  # fmt: skip
        return chat_template(source, {f"{role}_token": name for role, name in named.items() if name})

    @property
    def size(self) -> int:
        """Number of ids, added tokens included."""
        return self.vocabulary.size

    def piece(self, token_id: int) -> str:
        """The piece behind an id, as the vocabulary spells it."""
        return self.vocabulary.piece(token_id)

    def encode(self, template: AnyTemplate, turns: Sequence[Turn], response: str, limit: int, strict: bool) -> Encoded:
        """Ids of one conversation with its answer, at most `limit` tokens.

        Raises TooLongError when tokens would be cut and `strict` is set, TemplateError or TokenizerError where the
        template or the tokenizer cannot take the text.
        """
        reward = [] if self.reward_id is None else [self.reward_id]
        room = limit - len(reward)
        if isinstance(template, Template):
            ids, kept, text = self.of_pieces(template, turns, response, room, strict)
        else:
            ids, kept, text = self.of_whole(template, turns, response, room)
        if strict and len(kept) < len(ids):
            raise TooLongError(f"the text has {len(ids)} tokens, the limit is {room}; strict=True forbids cutting it")
        return Encoded(kept + reward, text, len(ids) - len(kept))

    def of_whole(
        self, template: WholeTemplate, turns: Sequence[Turn], response: str, room: int
    ) -> tuple[list[int], list[int], str]:
        """Ids, those that are kept, and the text."""
        ending = template.ending if self.ending == "none" else self.ending
        rendered = template.render(turns, response, NOTHING if self.parse_specials else self.steering)
        written = () if self.parse_specials else rendered.written
        body = rendered.text.rstrip("\n") if ending == "openrlhf" else rendered.text
        written = tuple((start, min(end, len(body))) for start, end in written)
        text = self.ended(body, written, ending)
        if self.own is not None:
            ids = self.own.encode(text, whole=template.whole, written=written)
        else:
            ids = self.apart(text, written, template.whole)
        if not ids:
            raise nothing(template.name)
        bos_id, _, eos_id = self.edges
        if ending == "openrlhf":
            assert eos_id is not None
            ids[-1] = eos_id  # as its data set does, after a cut, too
            return ids, cut_end(ids, room, 1), text
        return ids, cut_start(ids, room, int(ids[0] == bos_id)), text

    @cached_property
    def edges(self) -> tuple[int | None, str, int | None]:
        """Of whole texts: the id of BOS, the spelling of EOS, and its id; None for one that is not there."""
        if self.own is not None:
            return self.own.bos_id, self.own.eos, self.own.eos_id
        bos, eos = (self.vocabulary.id_of(name) if name else None for name in (self.bos, self.eos))
        return bos, self.eos, eos

    @cached_property
    def steering(self) -> re.Pattern[str]:
        """Spellings of the tokens that steer the model."""
        if self.own is not None:
            return self.own.pattern
        named = {self.bos, self.eos, self.files.named("pad"), self.files.named("unk"), *self.files.added}
        marks = marks_of((self.files.folder / MODEL).read_bytes())
        return pattern_of(name for name in named | marks if steers(name, special=True))

    def ended(self, text: str, written: Sequence[Span], ending: Ending) -> str:
        """A text as a trainer closes it. An EOS that the caller spelled is text and closes nothing."""
        if ending == "none":
            return text
        _, eos, eos_id = self.edges
        if eos_id is None:
            raise TemplateError("this model's texts are closed with EOS, and its tokenizer files name none")
        closed = text.endswith(eos) and not overlaps(len(text) - len(eos), len(text), written)
        return text if closed else text + (" " if ending == "openrlhf" else "") + eos

    def apart(self, text: str, written: Sequence[Span], whole: bool) -> list[int]:
        """A whole text piece by piece, as Hugging Face's slow tokenizers of 2023 did: where no other is to be had."""
        pieces: list[Piece] = [Special("bos")] if whole and self.add_bos and self.bos else []
        at = 0
        for match in self.steering.finditer(text):
            if not overlaps(*match.span(), written):
                pieces += [Text(text[at : match.start()]), Special(match[0])]
                at = match.end()
        pieces.append(Text(text[at:]))
        if whole and self.files.config.get("add_eos_token") and self.eos:
            pieces.append(Special("eos"))
        return [i for k, piece in enumerate(pieces) for i in self.ids_of(piece, first=k == 0)]

    def of_pieces(
        self, template: Template, turns: Sequence[Turn], response: str, room: int, strict: bool
    ) -> tuple[list[int], list[int], str]:
        """As `of_whole`. Raises TooLongError where a side is cut and `strict` is set."""
        before, answer = template.render(turns, response)
        if self.ending != "none":
            answer = self.ended_pieces(answer)
        if (template.bos is None and self.add_bos) or template.bos:
            before = [Special("bos"), *before]
        if template.joined == "all":
            pieces = join([*before, *answer])
        else:
            pieces = [*(join(before) if template.joined == "prompt" else before), *answer]
        runs = [self.ids_of(piece, first=k == 0) for k, piece in enumerate(pieces)]
        ids = [i for run in runs for i in run]
        if not ids:
            raise nothing(template.name)
        text = "".join(self.spell(p) if isinstance(p, Special) else p.text for p in pieces)
        closing = len(runs[-1]) if isinstance(pieces[-1], Special) else 0
        if template.cut == "each side":
            seam = sum(map(len, runs[: len(pieces) - len(answer)]))
            if strict:
                check_sides(seam, len(ids) - seam, room // 2)
            return ids, cut_end(ids[:seam], room // 2, 0) + cut_end(ids[seam:], room // 2, closing), text
        if template.cut == "response end":
            return ids, cut_end(ids, room, closing), text
        return ids, cut_start(ids, room, len(runs[0]) if isinstance(pieces[0], Special) else 0), text

    def ended_pieces(self, answer: Sequence[Piece]) -> list[Piece]:
        """What closes an answer, as `ended` would close its text."""
        last = answer[-1]
        if isinstance(last, Special) and self.spell(last) == self.eos:
            return list(answer)
        if isinstance(last, Text) and self.ending == "openrlhf":
            return [*answer[:-1], replace(last, text=last.text.rstrip("\n") + " "), Special("eos")]
        return [*answer, Special("eos")]

    def ids_of(self, piece: Piece, first: bool) -> list[int]:
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


def nothing(name: str) -> TemplateError:
    return TemplateError(f"template {name!r} makes no token of this conversation: there is nothing to score")


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


def cut_end(ids: list[int], limit: int, keep: int) -> list[int]:
    """At most `limit` ids; what goes is the end before the last `keep`."""
    if len(ids) <= limit:
        return ids
    return ids[: limit - keep] + ids[len(ids) - keep :]


def cut_start(ids: list[int], limit: int, keep: int) -> list[int]:
    """At most `limit` ids; what goes is the start after the first `keep`."""
    if len(ids) <= limit:
        return ids
    return ids[:keep] + ids[len(ids) - (limit - keep) :]


def check_sides(prompt: int, answer: int, limit: int) -> None:
    """Raises TooLongError."""
    for side, tokens in (("prompt", prompt), ("answer", answer)):
        if tokens > limit:
            raise TooLongError(
                f"the {side} has {tokens} tokens, the limit for each side is {limit}; strict=True forbids cutting it"
            )


def read_tokens(
    folder: Path, *, parse_specials: bool = False, reward_id: int | None = None, ending: Ending = "none"
) -> Tokens:
    """Read a checkpoint's tokenizer files. Raises TokenizerError if there are none or they cannot be read."""
    return Tokens(read_files(folder), parse_specials, reward_id, ending)
