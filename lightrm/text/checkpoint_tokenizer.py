"""The checkpoint's own tokenizer, read by transformers: token for token what `AutoTokenizer` gives of a whole text.

transformers decides which class a folder has, what its flags mean and which tokens are added where; it is imported
here and only when such a text is read. `trust_remote_code` is always False. A folder whose tokenizer class is code of
its own is read as a tokenizer.json where it has one; else `OwnCodeError` says so, and the caller has rules for those.
"""

from __future__ import annotations

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
from lightrm.text.tokenizer_limits import check_description, told

STRANGE = "\U000ffff0 \U0003134a \ua66e"  # a vocabulary that has an unknown token makes it of one of these

UNUSABLE = "the tokenizer files in {} cannot be used"


class OwnCodeError(TokenizerError):
    """The folder's tokenizer class is code of its own, which is not run."""


class CheckpointTokenizer:
    """A tokenizer that knows what a caller wrote. Safe to use from several threads."""

    def __init__(self, tokenizer: Any, folder: Path, parse_specials: bool) -> None:
        self.tokenizer, self.folder, self.parse_specials = tokenizer, folder, parse_specials
        self.lock = threading.Lock()
        vocabulary = tokenizer.get_vocab()
        self.bos_id, self.eos_id = vocabulary.get(self.bos), vocabulary.get(self.eos)
        steering = {
            str(name) for name in tokenizer.special_tokens_map.values() if isinstance(name, str) and name.strip()
        }
        added = [token for token in tokenizer.added_tokens_decoder.values() if steers(token.content, token.special)]
        steering |= {token.content for token in added}
        if not (folder / DESCRIBED).is_file() and (folder / MODEL).is_file():  # it may match them and not list them
            steering |= marks_of((folder / MODEL).read_bytes())
        if getattr(tokenizer, "split_special_tokens", False):  # special tokens are text, the template's too
            steering = {name for name in steering & vocabulary.keys() if vocabulary[name] in self.plain(name, False)}
        steering.add(str(getattr(tokenizer, "fill_token", "")))  # CodeLlama's class acts on it by itself
        self.steering = {name: int(vocabulary[name]) for name in steering & vocabulary.keys()}
        self.pattern = pattern_of(self.steering)
        unknown = {vocabulary.get(str(tokenizer.unk_token)), *self.plain(STRANGE, False)}
        self.counted = frozenset(self.steering.values()) - unknown
        self.aliases: dict[int, Aliased] = {}

    @cached_property
    def context(self) -> dict[str, str]:
        """What a chat template sees of the tokenizer: every named token that is set, by its name."""
        return {name: str(token) for name, token in self.tokenizer.special_tokens_map.items() if isinstance(token, str)}

    @property
    def bos(self) -> str:
        """Empty if there is none."""
        return str(self.tokenizer.bos_token or "")

    @property
    def eos(self) -> str:
        """Empty if there is none."""
        return str(self.tokenizer.eos_token or "")

    @property
    def backend(self) -> Any:
        """The tokenizers library's object; None for one written in Python."""
        return self.tokenizer.backend_tokenizer if self.tokenizer.is_fast else None

    def description(self) -> bytes:
        """The tokenizer as the tokenizers library writes it. Raises TokenizerError for one written in Python."""
        if self.backend is None:
            raise TokenizerError(f"{self.folder}: the class {type(self.tokenizer).__name__} is not read here")
        return str(self.backend.to_str()).encode()

    def encode_all(self, texts: Sequence[str], *, whole: bool, written: Sequence[Sequence[Span]]) -> list[list[int]]:
        """Return the ids of each text. whole: with what the tokenizer itself puts around a text (BOS, EOS).

        written: for each text the spans that a caller wrote; special tokens spelled there are text. Raises
        TokenizerError where the tokenizer cannot do so.
        """
        ids = self.plain_all(texts, whole)
        if self.parse_specials:
            return ids
        return [self.checked(*one, whole) for one in zip(texts, ids, written, strict=True)]

    def checked(self, text: str, ids: list[int], written: Sequence[Span], whole: bool) -> list[int]:
        """Return the ids of a text if no special token in them is the caller's; else new ids, in which none is."""
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
        with self.lock, told(UNUSABLE.format(self.folder)):
            found = self.tokenizer(text, add_special_tokens=whole, truncation=False, padding=False, verbose=False)
        return list(found["input_ids"])

    def plain_all(self, texts: Sequence[str], whole: bool) -> list[list[int]]:
        """Return `plain` of each text; a start that all of them share is tokenized once."""
        closing = self.closing if whole else 0
        if self.backend is None or closing is None:
            return [self.plain(text, whole) for text in texts]
        return ids_of_all(texts, self.plain, whole, closing, self.dividers, self.pattern)

    @cached_property
    def dividers(self) -> Dividers:
        added = self.backend.get_added_tokens_decoder().values()
        names = {token.content for token in added if not token.normalized} & self.steering.keys()
        longest = max((len(token.content) for token in added), default=0)
        return Dividers({name: self.steering[name] for name in names}, longest)

    def count(self, ids: Sequence[int]) -> int:
        """How many tokens that steer; the unknown token is made of text, too, and not counted."""
        return sum(i in self.counted for i in ids)

    @cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """Ids of a text alone, and with what the tokenizer itself puts around any text."""
        return self.plain("a", False), self.plain("a", True)

    @cached_property
    def closing(self) -> int | None:
        """How many ids the tokenizer itself puts behind a text; None if they cannot be told from the text's."""
        bare, full = self.around
        at = next((k for k in range(len(full)) if full[k : k + len(bare)] == bare), None)
        return None if at is None else len(full) - at - len(bare)

    def surrounded(self, ids: list[int]) -> list[int]:
        """Return the ids with what the tokenizer itself puts around a text. Raises TokenizerError."""
        bare, full = self.around
        if self.closing is None:
            raise TokenizerError(f"{self.folder}: what the tokenizer puts around a text cannot be told from the text")
        end = len(full) - self.closing
        return full[: end - len(bare)] + ids + full[end:]

    def guarded(self, text: str, kept: Sequence[Span]) -> list[int]:
        if self.backend is None:
            return self.apart(text, kept)
        with self.lock, told(UNUSABLE.format(self.folder)):
            kept = made_at(self.backend, text, kept, self.steering)
            alphabet = unused(text, len(self.steering))
            if alphabet not in self.aliases:  # of the rare ones the last is kept: a caller's text chooses them
                usual = {first: second for first, second in self.aliases.items() if first == PRIVATE.start}
                self.aliases = usual | {alphabet: aliased(self.backend, self.steering, alphabet)}
            return self.aliases[alphabet].encode(text, kept)

    def apart(self, text: str, kept: Sequence[Span]) -> list[int]:
        """For tokenizers written in Python: texts between the tokens that are meant, one by one."""
        ids, at = [], 0
        for start, end in [*kept, (len(text), len(text))]:
            if text[at:start]:
                with self.lock, told(UNUSABLE.format(self.folder)):
                    part = self.tokenizer(text[at:start], add_special_tokens=False, split_special_tokens=True)
                ids += part["input_ids"]
            if text[start:end]:
                ids.append(self.steering[text[start:end]])
            at = end
        return ids


def open_tokenizer(folder: Path, parse_specials: bool) -> CheckpointTokenizer:
    """Raises TokenizerError, or OwnCodeError where the class is code of the folder."""
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
    with told(UNUSABLE.format(folder)):
        return CheckpointTokenizer(found, folder, parse_specials)


def read(folder: Path) -> Any:
    with told(UNUSABLE.format(folder)):
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
    """The vocabulary file that cannot be read, to name it; None if each can be read by itself."""
    readers = (DESCRIBED, tokenizers.Tokenizer.from_file), (MODEL, sentencepiece.SentencePieceProcessor)
    for name, reader in readers:
        if (folder / name).is_file():
            try:
                with told(UNUSABLE.format(folder)):
                    reader(str(folder / name))
            except TokenizerError:
                return name
    return None


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """transformers prints what it makes of a config; nobody asked it to."""
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
