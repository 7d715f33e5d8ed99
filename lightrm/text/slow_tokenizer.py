"""A whole text through tokenizer.model alone, as Hugging Face's slow tokenizers of 2023 read it.

Used only for folders whose tokenizer class is code of their own, which lightrm does not run; transformers 5 no longer
has a slow class to use instead. It has those attributes of `checkpoint_tokenizer.CheckpointTokenizer` that whole texts
need.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from lightrm.text.guard import Span, overlaps, pattern_of, steers
from lightrm.text.piece_tokenizers import SentencePieceVocabulary, marks_of, special_id
from lightrm.text.tokenizer_files import MODEL, TokenizerFiles


@dataclass(frozen=True)
class SlowTokenizer:
    """bos, eos: their spelling, empty if there is none. adds_bos: whether a whole text gets BOS."""

    files: TokenizerFiles
    vocabulary: SentencePieceVocabulary
    bos: str
    eos: str
    adds_bos: bool

    @cached_property
    def bos_id(self) -> int | None:
        return self.vocabulary.id_of(self.bos) if self.bos else None

    @cached_property
    def eos_id(self) -> int | None:
        return self.vocabulary.id_of(self.eos) if self.eos else None

    @cached_property
    def context(self) -> dict[str, str]:
        """The special tokens that a chat template sees, by name."""
        named = {"bos": self.bos, "eos": self.eos, "pad": self.files.named("pad"), "unk": self.files.named("unk")}
        return {f"{role}_token": spelling for role, spelling in named.items() if spelling}

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches the tokens that steer the model."""
        marks = marks_of((self.files.folder / MODEL).read_bytes())
        named = {*self.context.values(), *self.files.added} | marks
        return pattern_of(name for name in named if steers(name, special=True))

    def encode_all(self, texts: Sequence[str], *, whole: bool, written: Sequence[Sequence[Span]]) -> list[list[int]]:
        """Return the ids of each text. whole: with BOS and EOS as the tokenizer files ask for them; written: for each
        text the spans that a caller wrote, in which special tokens are text."""
        return [self.encode(text, whole, spans) for text, spans in zip(texts, written, strict=True)]

    def encode(self, text: str, whole: bool, written: Sequence[Span]) -> list[int]:
        before, after = self.around if whole else ([], [])
        ids, at = [*before], 0
        for match in self.pattern.finditer(text):
            if not overlaps(*match.span(), written):
                ids += [*self.run(text[at : match.start()]), special_id(self.vocabulary, match[0])]
                at = match.end()
        ids += self.run(text[at:])
        return ids + after

    @property
    def around(self) -> tuple[list[int], list[int]]:
        """BOS and EOS, as the tokenizer files ask for them around a whole text."""
        adds_bos, adds_eos = self.adds_bos and self.bos, self.files.config.get("add_eos_token") and self.eos
        return (
            [special_id(self.vocabulary, self.bos)] if adds_bos else [],
            [special_id(self.vocabulary, self.eos)] if adds_eos else [],
        )

    def templated(self, text: str) -> list[int]:
        """Return the ids of a text in which every special token acts, with BOS and EOS as the tokenizer files ask for
        them, unless the text has them already."""
        ids, (before, after) = self.encode(text, False, ()), self.around
        return before * (ids[:1] != before) + ids + after * (ids[-1:] != after)

    def run(self, text: str) -> list[int]:
        return self.vocabulary.encode(text, first=False, glued=False) if text else []
