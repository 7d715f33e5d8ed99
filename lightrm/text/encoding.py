"""Text -> token ids: which tokenizer reads a text, which BOS and EOS it gets, and what is cut if it is too long.

There are two ways. With the checkpoint's own template, or none, the whole text goes through the checkpoint's own
tokenizer, as in transformers (`checkpoint_tokenizer`). A frozen template repeats a trainer that tokenized pieces of
text one by one, so the pieces go through the bare vocabulary (`piece_texts`). For these, the names of special tokens
come from special_tokens_map.json, then tokenizer_config.json, then the vocabulary itself: some published reward models
contradict their own vocabulary (Ziya's BOS is `</s>`), and their trainers' tokenizers followed the map.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lightrm.errors import TemplateError, TokenizerError, TooLongError
from lightrm.text.chat_template import ChatTemplate, chat_template
from lightrm.text.checkpoint_tokenizer import CheckpointTokenizer, OwnCodeError, open_tokenizer
from lightrm.text.cutting import cut_end, cut_start
from lightrm.text.guard import Span, overlaps
from lightrm.text.pair_texts import PairTexts
from lightrm.text.piece_texts import PieceTexts
from lightrm.text.piece_tokenizers import JsonVocabulary, SentencePieceVocabulary, Vocabulary
from lightrm.text.slow_tokenizer import SlowTokenizer
from lightrm.text.templates import AnyTemplate, Cut, Ending, PairTemplate, Rendered, Template, Turn, WholeTemplate
from lightrm.text.tokenizer_files import MODEL, TokenizerFiles, read_files

NOTHING = re.compile(r"(?!)")


@dataclass(frozen=True, slots=True)
class Encoded:
    """The token ids of one text as it is scored, and how many more were cut off."""

    token_ids: list[int]
    cut: int


class Tokens:
    """The tokenizer of a checkpoint. Made by `read_tokens`; safe to use from several threads.

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
        """Read a tokenizer.model. Returns its vocabulary, its BOS and its EOS."""
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
        """The vocabulary of the tokenizer that transformers opened. A large one takes seconds; whole texts do not need
        it."""
        assert self.opened is not None
        return JsonVocabulary(self.opened.description(), self.parse_specials)

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary that pieces of text go through."""
        return self.described if self.model is None else self.model

    @property
    def adds_bos(self) -> bool:
        """Whether a text in pieces gets BOS if its template does not say."""
        if self.model is None:
            return self.described.adds_first
        # The one slow class that adds BOS unasked.
        llama = "llama" in str(self.files.config.get("tokenizer_class", "")).lower()
        return bool(self.files.config.get("add_bos_token", llama))

    @cached_property
    def pieces(self) -> PieceTexts:
        """The reader of frozen templates."""
        return PieceTexts(self.vocabulary, self.bos, self.eos, self.adds_bos, self.ending)

    @cached_property
    def own(self) -> CheckpointTokenizer | SlowTokenizer:
        """The reader of whole texts."""
        if self.opened is not None:
            return self.opened
        try:
            return open_tokenizer(self.files.folder, self.parse_specials)
        except OwnCodeError:
            assert self.model is not None
            return SlowTokenizer(self.files, self.model, self.bos, self.eos, self.adds_bos)

    @cached_property
    def pairs(self) -> PairTexts:
        """The reader of pairs of texts. Raises TokenizerError."""
        if isinstance(self.own, SlowTokenizer):
            raise TokenizerError(f"{self.files.folder}: its tokenizer class is code of its own, which pairs would need")
        return PairTexts(self.own)

    def prepare(self, template: AnyTemplate) -> None:
        """Open the tokenizer that the texts of a template need. Raises TokenizerError if it cannot be read."""
        if isinstance(template, PairTemplate):
            _ = self.pairs.segments
        else:
            _ = self.vocabulary if isinstance(template, Template) else self.own

    def own_template(self) -> ChatTemplate:
        """Return the checkpoint's chat template. Raises TemplateError if it has none, or one that is not valid
        Jinja."""
        return chat_template(self.files.chat_source(), self.own.context)

    def special(self, spelling: str) -> int:
        """Return the id of a special token. Raises TokenizerError if this tokenizer has none of that spelling."""
        own = self.own
        found = own.steering.get(spelling) if isinstance(own, CheckpointTokenizer) else None
        if found is None:
            raise TokenizerError(f"the tokenizer has no special token {spelling!r}, which this model's texts need")
        return found

    @property
    def size(self) -> int:
        """Number of ids, added tokens included."""
        return self.vocabulary.size

    def piece(self, token_id: int) -> str:
        """Return the piece of an id, as the vocabulary spells it."""
        return self.vocabulary.piece(token_id)

    def encode(
        self, template: AnyTemplate, turns: Sequence[Turn], responses: Sequence[str], limit: int, strict: bool
    ) -> list[Encoded]:
        """Return the ids of one conversation with each of its answers, at most `limit` tokens each.

        Raises TooLongError if tokens would be cut and `strict` is set, TemplateError if the template cannot express the
        conversation, TokenizerError if the tokenizer cannot read the text.
        """
        if not responses:
            return []
        reward = [] if self.reward_id is None else [self.reward_id]
        room = limit - len(reward)
        if isinstance(template, Template):
            found = self.pieces.encode(template, turns, responses, room, strict)
        elif isinstance(template, PairTemplate):
            found = self.pairs.encode(template.prompt(turns), responses, room)
        else:
            found = self.whole(template, turns, responses, room)
        for ids, kept in found:
            if not ids:
                raise TemplateError(
                    f"template {template.name!r} makes no token of this conversation: there is nothing to score"
                )
            if strict and len(kept) < len(ids):
                raise TooLongError(
                    f"the text has {len(ids)} tokens, the limit is {room}; strict=True forbids cutting it"
                )
        return [Encoded(kept + reward, len(ids) - len(kept)) for ids, kept in found]

    def encode_templated(
        self, template: AnyTemplate | None, texts: Sequence[str], limit: int, strict: bool
    ) -> list[Encoded]:
        """Return the ids of texts that a template made already, at most `limit` tokens each: special tokens act, and
        what belongs around every text is put there unless the text has it.

        template: the model's; None if it has none. Raises TooLongError if tokens would be cut and `strict` is set,
        TemplateError if a text has no token or does not say all that the template needs, TokenizerError if the
        tokenizer cannot read it.
        """
        found, side = [], self.templated_cut(template)
        for k, text in enumerate(texts):
            if isinstance(template, Template):
                ids = self.pieces.templated(template, text, self.own.pattern)
                spelled = (self.vocabulary.id_of(self.bos), self.vocabulary.id_of(self.eos))
            else:
                ids = self.own.templated(self.ended(text, self.ending))
                spelled = (self.own.bos_id, self.own.eos_id)
            if self.reward_id is not None and ids[-1:] == [self.reward_id]:
                ids.pop()
            reward = [] if self.reward_id is None else [self.reward_id]
            room = limit - len(reward)
            if not ids:
                raise TemplateError(f"text {k} has no token: there is nothing to score")
            if strict and len(ids) > room:
                raise TooLongError(
                    f"text {k} has {len(ids)} tokens, the limit is {room}; strict=True forbids cutting it"
                )
            bos, eos = ids[0] == spelled[0], ids[-1] == spelled[1]
            kept = cut_end(ids, room, int(eos)) if side == "response end" else cut_start(ids, room, int(bos))
            found.append(Encoded(kept + reward, len(ids) - len(kept)))
        return found

    def templated_cut(self, template: AnyTemplate | None) -> Cut:
        """Return where a text that is templated already is cut: where the model's template cuts, if that does not need
        to know where its answer begins."""
        ends = self.ending == "openrlhf" or (template is not None and template.cut == "response end")
        return "response end" if ends else "prompt start"

    def side(self, template: AnyTemplate) -> Cut:
        """Return where the text of a conversation is cut."""
        closes = not isinstance(template, (Template, PairTemplate)) and self.ending_of(template) == "openrlhf"
        return "response end" if closes else template.cut

    def text(self, template: AnyTemplate, turns: Sequence[Turn], response: str) -> str:
        """Return the text of one conversation with its answer before any cut. Raises TemplateError."""
        if isinstance(template, Template):
            return self.pieces.text(template, turns, response)
        if isinstance(template, PairTemplate):
            return self.pairs.text(template.prompt(turns), response)
        return self.closed(template, template.render(turns, [response], self.steering)[0]).text

    def whole(
        self, template: WholeTemplate, turns: Sequence[Turn], responses: Sequence[str], room: int
    ) -> list[tuple[list[int], list[int]]]:
        """Return, for each response, all ids and those that are kept within `room`."""
        texts = [self.closed(template, one) for one in template.render(turns, responses, self.steering)]
        every = self.own.encode_all(
            [one.text for one in texts], whole=template.whole, written=[one.written for one in texts]
        )
        return [(ids, self.kept(template, ids, room)) for ids in every]

    def closed(self, template: WholeTemplate, rendered: Rendered) -> Rendered:
        """Return a text with the ending that its trainer adds. An EOS that the caller spelled is text, and does not
        count."""
        ending = self.ending_of(template)
        text = rendered.text.rstrip("\n") if ending == "openrlhf" else rendered.text
        spans = () if self.parse_specials else rendered.written
        written = tuple((start, min(end, len(text))) for start, end in spans)
        return Rendered(self.ended(text, ending, written), written)

    def ended(self, text: str, ending: Ending, written: Sequence[Span] = ()) -> str:
        """Return a text with an ending. written: what a caller wrote in it."""
        if ending == "openrlhf":
            text = text.rstrip("\n")
        if ending != "none" and not self.ends(text, written):
            text += (" " if ending == "openrlhf" else "") + self.own.eos
        return text

    def ending_of(self, template: WholeTemplate) -> Ending:
        return template.ending if self.ending == "none" else self.ending

    def ends(self, text: str, written: Sequence[Span]) -> bool:
        """Whether a text ends in an EOS that is not the caller's. Raises TemplateError if there is no EOS."""
        if self.own.eos_id is None:
            raise TemplateError("this model's texts are closed with EOS, and its tokenizer files name none")
        eos = self.own.eos
        return text.endswith(eos) and not overlaps(len(text) - len(eos), len(text), written)

    def kept(self, template: WholeTemplate, ids: list[int], room: int) -> list[int]:
        """Return the ids that remain: OpenRLHF's data set cuts the end and sets EOS there, all others cut the start."""
        if ids and self.ending_of(template) == "openrlhf":
            assert self.own.eos_id is not None
            return cut_end([*ids[:-1], self.own.eos_id], room, 1)
        return cut_start(ids, room, int(bool(ids) and ids[0] == self.own.bos_id))

    @cached_property
    def steering(self) -> re.Pattern[str]:
        """Matches the special tokens that a caller may not write; nothing with parse_specials."""
        return NOTHING if self.parse_specials else self.own.pattern


def read_tokens(
    folder: Path, *, parse_specials: bool = False, reward_id: int | None = None, ending: Ending = "none"
) -> Tokens:
    """Read a checkpoint's tokenizer files. Raises TokenizerError if there are none or they cannot be read."""
    return Tokens(read_files(folder), parse_specials, reward_id, ending)
