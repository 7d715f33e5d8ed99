"""A checkpoint's tokenizer and template, how long its texts may be, and calibration text as the ids that it gives."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import tee

from lightrm.architecture import Architecture
from lightrm.checkpoints.detect import Checkpoint, open_checkpoint
from lightrm.checkpoints.hub import resolve
from lightrm.checkpoints.score_position import Reading
from lightrm.engine.packing import ALONE, packs
from lightrm.errors import InputError, TemplateError, TokenizerError
from lightrm.model.packed_batch import PackedBatch
from lightrm.text.chat_template import ChatTemplate
from lightrm.text.conversation import Prompt, responses_of, turns_of
from lightrm.text.encoding import Tokens, read_tokens
from lightrm.text.templates import AnyTemplate, find_template
from lightrm.text.tokenizer_files import has_tokenizer

CALIBRATION_PACK = 2048  # tokens computed at once


class TokenizerWarning(UserWarning):
    """A model has a tokenizer that cannot be read: it scores token ids, and no text."""


def calibration_packs(
    tokens: Tokens | None,
    template: AnyTemplate | None,
    no_text: str,
    calibration: Sequence[tuple[Prompt, str]] | None,
    longest: int,
    reading: Reading,
) -> list[PackedBatch]:
    """Calibration text in the model's own template, cut and packed as scoring would cut and pack it."""
    if not calibration:
        return []
    ids = list(calibration_ids(tokens, template, no_text, calibration, longest, reading))
    return [batch for _, batch in packs(ids, CALIBRATION_PACK, ALONE)]


def calibration_ids(
    tokens: Tokens | None,
    template: AnyTemplate | None,
    no_text: str,
    calibration: Iterable[tuple[Prompt, str]],
    longest: int,
    reading: Reading,
) -> Iterator[list[int]]:
    """The ids of one text after the other. Raises TokenizerError for a model without text."""
    if tokens is None or template is None:
        raise TokenizerError(f"calibration needs text: {no_text}")
    for p, r in calibration:
        yield reading.cut(tokens.encode(template, turns_of(p), responses_of([r])[0], longest, False).token_ids)


def calibration_texts(
    path_or_id: str,
    texts: Iterable[tuple[Prompt, str]],
    most: int,
    template: str | None = None,
    max_length: int | None = None,
    revision: str | None = None,
) -> tuple[list[tuple[Prompt, str]], int]:
    """As many whole texts, from the first on, as have `most` of the model's tokens or fewer, and how many they have.

    Raises what `load` raises for the text side, and InputError where the first text alone has more.
    """
    checkpoint = open_checkpoint(resolve(path_or_id, revision))
    given, asked = tee(texts)
    taken: list[tuple[Prompt, str]] = []
    count = 0
    tokens, form, no_text = text_side(checkpoint, template, False)
    longest = length_limit(max_length, form, tokens, checkpoint.architecture)
    every = calibration_ids(tokens, form, no_text, asked, longest, checkpoint.reading)
    for text, ids in zip(given, every, strict=True):
        if count + len(ids) > most:
            break
        taken.append(text)
        count += len(ids)
    if not taken:
        raise InputError(f"there is no calibration text of {most} tokens or fewer")
    return taken, count


def text_side(
    checkpoint: Checkpoint, template: str | None, parse_specials: bool
) -> tuple[Tokens | None, AnyTemplate | None, str]:
    """Tokenizer and template, or None with the sentence that says what is missing."""
    try:
        tokens = read_tokens(
            checkpoint.tokenizer_folder(),
            parse_specials=parse_specials,
            reward_id=checkpoint.reward_id,
            ending=checkpoint.layout.ending,
        )
    except TokenizerError as error:
        if template is not None:
            raise
        if has_tokenizer(checkpoint.tokenizer_folder()):
            warnings.warn(f"only token ids can be scored: {error}", TokenizerWarning, stacklevel=3)
        return None, None, str(error)
    name = template or checkpoint.template
    if name is None or (name == "chat" and template is None and not tokens.files.chat_sources):
        return (
            tokens,
            None,
            f"layout {checkpoint.layout.name} does not say how its prompts look: pass template=... to load",
        )
    try:
        form: AnyTemplate = find_template(name) if name != "chat" else tokens.own_template()
        if isinstance(form, ChatTemplate):
            form = replace(form, whole=checkpoint.layout.whole)
        tokens.prepare(form)
        return tokens, form, ""
    except TemplateError as error:
        if template is not None:
            raise
        return tokens, None, str(error)  # nobody asked for it: `score_ids` works without


def check_length(asked: int | None, a: Architecture) -> None:
    """Raises InputError."""
    if asked is not None and not 8 <= asked <= a.max_positions:
        raise InputError(f"max_length must be between 8 and this model's {a.max_positions} positions, found {asked}")


def length_limit(asked: int | None, template: AnyTemplate | None, tokens: Tokens | None, a: Architecture) -> int:
    """Longest sequence in tokens: what was asked for, else the template's, else the tokenizer's; never more than the
    model has positions. Raises InputError."""
    check_length(asked, a)
    own = template.max_length if template is not None else None
    if own is None and tokens is not None:
        own = tokens.max_length
    return min(asked or own or a.max_positions, a.max_positions)
