"""Frozen templates: a text as pieces, each tokenized by itself and joined, as the trainers of 2023 did it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightrm.errors import TemplateError
from lightrm.text.cutting import check_sides, cut_end, cut_start
from lightrm.text.piece_tokenizers import Vocabulary, special_id
from lightrm.text.templates import BOS, EOS, Ending, Piece, Special, Template, Text, Turn

Ids = list[int]
Runs = list[Ids]  # the ids of each piece


@dataclass(frozen=True, slots=True)
class PieceTexts:
    """Reads texts in pieces.

    bos, eos: their spelling in this vocabulary; adds_bos: whether a text gets BOS where the template does not say;
    ending: how the layout's trainer closes a text, whatever the template.
    """

    vocabulary: Vocabulary
    bos: str
    eos: str
    adds_bos: bool
    ending: Ending

    def encode(
        self, template: Template, turns: Sequence[Turn], responses: Sequence[str], room: int, strict: bool
    ) -> list[tuple[Ids, Ids]]:
        """Return, for each response to one prompt, all ids and those that are kept within `room`.

        Raises TooLongError where a side is too long and `strict` is set, TemplateError where the template cannot
        express the conversation.
        """
        before = self.before(template, turns)
        known: dict[tuple[Piece, bool], Ids] = {}  # a piece of the prompt comes again with each response
        found = []
        for response in responses:
            answer = self.answer(template, response)
            pieces = joined(template, before, answer)
            runs = [self.ids_of(piece, k == 0, known) for k, piece in enumerate(pieces)]
            found.append(cut(template, pieces, runs, len(answer), room, strict))
        return found

    def templated(self, template: Template, text: str, specials: re.Pattern[str]) -> Ids:
        """Return the ids of a text that this template made already, with BOS and what closes a text unless they stand
        there. specials: matches the special tokens, which act.

        Raises TemplateError if the template's trainer tokenized prompt and answer apart.
        """
        if template.joined != "all":
            raise TemplateError(
                f"template {template.name!r} tokenizes prompt and answer apart, and a whole text does not say where "
                "the answer begins: score prompt and response instead"
            )
        found = parted(text, specials)
        if (template.bos or (template.bos is None and self.adds_bos)) and found[0] != Special(self.bos):
            found.insert(0, BOS)
        ends = [Special(self.spell(piece)) for piece in template.closing if isinstance(piece, Special)]
        if found[-1:] != ends[-1:]:
            found += ends
        if self.ending != "none":
            found = self.ended(found)
        return [i for k, piece in enumerate(found) for i in self.ids_of(piece, k == 0, {})]

    def text(self, template: Template, turns: Sequence[Turn], response: str) -> str:
        """Return the text of all pieces, special tokens spelled out."""
        pieces = joined(template, self.before(template, turns), self.answer(template, response))
        return "".join(self.spell(piece) if isinstance(piece, Special) else piece.text for piece in pieces)

    def before(self, template: Template, turns: Sequence[Turn]) -> list[Piece]:
        """Return the pieces before the answer, with BOS where the template or else the tokenizer files ask for it."""
        adds = self.adds_bos if template.bos is None else template.bos
        pieces = template.before(turns)
        return [BOS, *pieces] if adds else pieces

    def answer(self, template: Template, response: str) -> list[Piece]:
        """Return the pieces of the answer and what closes it."""
        answer = template.answer(response)
        return answer if self.ending == "none" else self.ended(answer)

    def ended(self, answer: list[Piece]) -> list[Piece]:
        """Return the answer with the EOS that the layout's trainer puts behind it, unless EOS stands there already."""
        last = answer[-1]
        if isinstance(last, Special) and self.spell(last) == self.eos:
            return answer
        if isinstance(last, Text) and self.ending == "openrlhf":
            return [*answer[:-1], replace(last, text=last.text.rstrip("\n") + " "), EOS]
        return [*answer, EOS]

    def ids_of(self, piece: Piece, first: bool, known: dict[tuple[Piece, bool], Ids]) -> Ids:
        """Return the ids of one piece, from `known` if it was tokenized before."""
        if (piece, first) not in known:
            if isinstance(piece, Special):
                found = [special_id(self.vocabulary, self.spell(piece))]
            else:
                found = self.vocabulary.encode(piece.text, first=first, glued=piece.glued) if piece.text else []
            known[piece, first] = found
        return known[piece, first]

    def spell(self, special: Special) -> str:
        return {"bos": self.bos, "eos": self.eos}.get(special.name, special.name)


def parted(text: str, specials: re.Pattern[str]) -> list[Piece]:
    """Return a text as runs of text and the special tokens that it spells."""
    found: list[Piece] = []
    at = 0
    for match in specials.finditer(text):
        found += [Text(text[at : match.start()])] * (at < match.start())
        found.append(Special(match[0]))
        at = match.end()
    return found + [Text(text[at:])] * (at < len(text))


def joined(template: Template, before: Sequence[Piece], answer: Sequence[Piece]) -> list[Piece]:
    """Return all pieces, adjacent texts joined where the template's trainer tokenized them as one string."""
    if template.joined == "all":
        return join([*before, *answer])
    return [*(join(before) if template.joined == "prompt" else before), *answer]


def join(pieces: Sequence[Piece]) -> list[Piece]:
    """Return the pieces with adjacent texts as one."""
    found: list[Piece] = []
    for piece in pieces:
        last = found[-1] if found else None
        if isinstance(piece, Text) and isinstance(last, Text):
            found[-1] = replace(last, text=last.text + piece.text)
        else:
            found.append(piece)
    return found


def cut(
    template: Template, pieces: Sequence[Piece], runs: Runs, answer: int, room: int, strict: bool
) -> tuple[Ids, Ids]:
    """Return all ids of a text, and those that remain by the template's own rule. answer: how many pieces are the
    answer's."""
    ids = [i for run in runs for i in run]
    closing = len(runs[-1]) if isinstance(pieces[-1], Special) else 0
    if template.cut == "each side":
        seam = sum(map(len, runs[: len(pieces) - answer]))
        if strict:
            check_sides(seam, len(ids) - seam, room // 2)
        return ids, cut_end(ids[:seam], room // 2, 0) + cut_end(ids[seam:], room // 2, closing)
    if template.cut == "response end":
        return ids, cut_end(ids, room, closing)
    return ids, cut_start(ids, room, len(runs[0]) if isinstance(pieces[0], Special) else 0)
