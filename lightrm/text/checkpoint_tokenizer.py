"""The checkpoint's own tokenizer, read by transformers: the ids of a text are exactly those of `AutoTokenizer`.

transformers decides which class a folder has, what its flags mean, and which tokens are added where. It is imported
only when such a text is read. `trust_remote_code` is always False. If a folder's tokenizer class is code of its own,
its tokenizer.json is read instead; if it has none, OwnCodeError is raised, and `slow_tokenizer` reads the text.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from lightrm.errors import TokenizerError
from lightrm.text.guard import PRIVATE, Aliased, Span, aliased, made_at, overlaps, pattern_of, steers, unused
from lightrm.text.piece_tokenizers import marks_of
from lightrm.text.shared_start import Dividers, ids_of_all
from lightrm.text.tokenizer_files import DESCRIBED, MODEL
from lightrm.text.tokenizer_limits import as_tokenizer_errors, check_description

STRANGE = "\U000ffff0 \U0003134a \ua66e"  # at least one of these becomes the unknown token, if there is one

UNUSABLE = "the tokenizer files in {} cannot be used"
UNTOLD = "{}: what the tokenizer puts around a text cannot be told from the text"


class OwnCodeError(TokenizerError):
    """The folder's tokenizer class is code of its own, which lightrm does not run."""


class CheckpointTokenizer:
    """A tokenizer that keeps special tokens in the caller's text from acting. Safe to use from several threads."""

    def __init__(self, tokenizer: Any, folder: Path, parse_specials: bool) -> None:
        self.tokenizer, self.folder, self.parse_specials = tokenizer, folder, parse_specials
        self.lock = threading.Lock()
        self.fill = str(getattr(tokenizer, "fill_token", None) or "")
        vocabulary = tokenizer.get_vocab()
        self.bos_id, self.eos_id = vocabulary.get(self.bos), vocabulary.get(self.eos)
        steering = {
            str(name) for name in tokenizer.special_tokens_map.values() if isinstance(name, str) and name.strip()
        }
        added = [token for token in tokenizer.added_tokens_decoder.values() if steers(token.content, token.special)]
        steering |= {token.content for token in added}
        if not (folder / DESCRIBED).is_file() and (folder / MODEL).is_file():  # it may match these without listing them
            steering |= marks_of((folder / MODEL).read_bytes())
        strange = {*self.plain(STRANGE, False)}
        if getattr(tokenizer, "split_special_tokens", False):  # special tokens are text, even the template's
            # But merges, of the name alone or in a text, may make the same id. The unknown token is made of anything.
            merged = self.backend.get_vocab(with_added_tokens=False) if self.backend is not None else {}
            made = {name for name in steering & merged.keys() if merged[name] not in strange}
            split = {name for name in steering & vocabulary.keys() if vocabulary[name] in self.plain(name, False)}
            steering = made | split
        steering.add(self.fill)
        self.steering = {name: int(vocabulary[name]) for name in steering & vocabulary.keys()}
        self.pattern = pattern_of(self.steering)
        unknown = {vocabulary.get(str(tokenizer.unk_token)), *strange}
        self.counted = frozenset(self.steering.values()) - unknown
        self.aliases: dict[int, Aliased] = {}

    @cached_property
    def context(self) -> dict[str, str]:
        """The special tokens that a chat template sees: every named token that is set, by its name."""
        return {name: str(token) for name, token in self.tokenizer.special_tokens_map.items() if isinstance(token, str)}

    @property
    def bos(self) -> str:
        """The spelling of BOS, empty if there is none."""
        return str(self.tokenizer.bos_token or "")

    @property
    def eos(self) -> str:
        """The spelling of EOS, empty if there is none."""
        return str(self.tokenizer.eos_token or "")

    @property
    def backend(self) -> Any:
        """The object of the tokenizers library; None for a tokenizer written in Python."""
        return self.tokenizer.backend_tokenizer if self.tokenizer.is_fast else None

    def description(self) -> bytes:
        """Return the tokenizer as a tokenizer.json. Raises TokenizerError for one written in Python."""
        if self.backend is None:
            raise TokenizerError(f"{self.folder}: the class {type(self.tokenizer).__name__} is not read here")
        return str(self.backend.to_str()).encode()

    def encode_all(self, texts: Sequence[str], *, whole: bool, written: Sequence[Sequence[Span]]) -> list[list[int]]:
        """Return the ids of each text. whole: with what the tokenizer itself puts around a text (BOS, EOS).

        written: for each text the spans that the caller wrote; special tokens spelled there are plain text. Raises
        TokenizerError if the tokenizer cannot read them as plain text.
        """
        ids = self.plain_all(texts, whole)
        if self.parse_specials:
            return ids
        return [self.checked(*one, whole) for one in zip(texts, ids, written, strict=True)]

    def checked(self, text: str, ids: list[int], written: Sequence[Span], whole: bool) -> list[int]:
        """Return `ids` if no special token in them comes from the caller's text, otherwise new ids in which none
        does."""
        meant = [match.span() for match in self.pattern.finditer(text)]
        kept = [span for span in meant if not overlaps(*span, written)]
        bare, full = self.around if whole else ((), ())
        if len(kept) == len(meant) and self.count(ids) - (self.count(full) - self.count(bare)) <= len(kept):
            return ids
        found = self.guarded(text, kept)
        if self.count(found) > len(kept):
            raise TokenizerError(
                f"{self.folder}: the tokenizer makes a special token of a text that spells none; remove it from the "
                "text, or pass parse_specials=True to let it act"
            )
        return self.surrounded(found) if whole else found

    def plain(self, text: str, whole: bool) -> list[int]:
        with self.lock, as_tokenizer_errors(UNUSABLE.format(self.folder)):
            tokenizer = self.tokenizer
            if self.fill and self.fill in text and self.backend is not None:
                # CodeLlama's class fills in there, and reads every later text otherwise than before.
                if not self.parse_specials:
                    return list(self.backend.encode(text, add_special_tokens=whole).ids)
                tokenizer = copy.deepcopy(tokenizer)
            found = tokenizer(text, add_special_tokens=whole, truncation=False, padding=False, verbose=False)
        return list(found["input_ids"])

    def plain_all(self, texts: Sequence[str], whole: bool) -> list[list[int]]:
        """Return `plain` of each text. What all texts begin with is tokenized once."""
        closing = self.closing if whole else 0
        if self.backend is None or closing is None:
            return [self.plain(text, whole) for text in texts]
        return ids_of_all(texts, self.plain, whole, closing, self.dividers, self.pattern)

    @cached_property
    def dividers(self) -> Dividers:
        """The special tokens at which a text can be divided: those that are matched before normalization."""
        added = self.backend.get_added_tokens_decoder().values()
        names = {token.content for token in added if not token.normalized} & self.steering.keys()
        longest = max((len(token.content) for token in added), default=0)
        return Dividers({name: self.steering[name] for name in names}, longest)

    def count(self, ids: Sequence[int]) -> int:
        """Return the number of steering tokens. The unknown token does not count, since plain text makes it too."""
        return sum(i in self.counted for i in ids)

    @cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """The ids of a text alone, and of the same text with what the tokenizer itself puts around any text."""
        return self.plain("a", False), self.plain("a", True)

    @cached_property
    def closing(self) -> int | None:
        """The number of ids that the tokenizer itself puts behind a text; None if it cannot be determined."""
        bare, full = self.around
        at = next((k for k in range(len(full)) if full[k : k + len(bare)] == bare), None)
        return None if at is None else len(full) - at - len(bare)

    def templated(self, text: str) -> list[int]:
        """Return the ids of a text in which every special token acts, with what the tokenizer itself puts around a
        text, each side unless the text has it already. Raises TokenizerError."""
        ids, (bare, full) = self.plain(text, False), self.around
        if self.closing is None:
            raise TokenizerError(UNTOLD.format(self.folder))
        end = len(full) - self.closing
        before, after = full[: end - len(bare)], full[end:]
        if ids[: len(before)] == before:
            before = []
        if ids[len(ids) - len(after) :] == after:
            after = []
        return before + ids + after

    def surrounded(self, ids: list[int]) -> list[int]:
        """Return the ids with what the tokenizer itself puts around a text. Raises TokenizerError."""
        bare, full = self.around
        if self.closing is None:
            raise TokenizerError(UNTOLD.format(self.folder))
        end = len(full) - self.closing
        return full[: end - len(bare)] + ids + full[end:]

    def guarded(self, text: str, kept: Sequence[Span]) -> list[int]:
        """Return ids in which only the special tokens at the spans `kept` act."""
        if self.backend is None:
            return self.apart(text, kept)
        with self.lock, as_tokenizer_errors(UNUSABLE.format(self.folder)):
            kept = made_at(self.backend, text, kept, self.steering, self.pattern.findall(text))
            alphabet = unused(text, len(self.steering))
            if alphabet not in self.aliases:  # keep one unusual alphabet only: a caller's text chooses it
                usual = {first: second for first, second in self.aliases.items() if first == PRIVATE.start}
                self.aliases = usual | {alphabet: aliased(self.backend, self.steering, alphabet)}
            return self.aliases[alphabet].encode(text, kept)

    def apart(self, text: str, kept: Sequence[Span]) -> list[int]:
        """As `guarded`, for tokenizers written in Python: the texts between the special tokens are read one by one."""
        ids, at = [], 0
        for start, end in [*kept, (len(text), len(text))]:
            if text[at:start]:
                with self.lock, as_tokenizer_errors(UNUSABLE.format(self.folder)):
                    part = self.tokenizer(text[at:start], add_special_tokens=False, split_special_tokens=True)
                ids += part["input_ids"]
            if text[start:end]:
                ids.append(self.steering[text[start:end]])
            at = end
        return ids


def open_tokenizer(folder: Path, parse_specials: bool) -> CheckpointTokenizer:
    """Read a folder's tokenizer. Raises TokenizerError, or OwnCodeError if the class is code of the folder."""
    if (folder / DESCRIBED).is_file():
        check_description(folder / DESCRIBED)
    try:
        found = read(folder)
    except OwnCodeError:
        raise
    except TokenizerError as error:
        name = damaged(folder)
        if name is None:
            raise
        raise TokenizerError(f"{folder / name} cannot be read: {error.__cause__ or error}") from error
    with as_tokenizer_errors(UNUSABLE.format(folder)):
        return CheckpointTokenizer(found, folder, parse_specials)


def read(folder: Path) -> Any:
    with as_tokenizer_errors(UNUSABLE.format(folder)):
        transformers = import_module("transformers")
        with quiet(transformers):
            try:
                found = transformers.AutoTokenizer.from_pretrained(
                    str(folder), local_files_only=True, trust_remote_code=False
                )
            except ValueError as error:
                if "trust_remote_code" not in str(error):
                    raise
                if not (folder / DESCRIBED).is_file():
                    raise OwnCodeError(f"{folder}: its tokenizer class is code of its own, which is not run") from error
                found = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    return found


def damaged(folder: Path) -> str | None:
    """Return the name of the vocabulary file that cannot be read; None if each of them can be read by itself."""
    readers = (DESCRIBED, tokenizers.Tokenizer.from_file), (MODEL, sentencepiece.SentencePieceProcessor)
    for name, reader in readers:
        if (folder / name).is_file():
            try:
                with as_tokenizer_errors(UNUSABLE.format(folder)):
                    reader(str(folder / name))
            except TokenizerError:
                return name
    return None


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Suppress what transformers prints about configs."""
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
