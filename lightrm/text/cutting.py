"""How a text that is longer than the model's limit is shortened, in token ids."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from lightrm.errors import TooLongError


class TruncationWarning(UserWarning):
    """Some texts were longer than the model's limit and were cut."""


def warn_of_cuts(cuts: Sequence[int], limit: int, side: str, stacklevel: int) -> None:
    """Warn once if any text was cut. cuts: tokens that each lost; limit: of a text; side: where it was cut."""
    if any(cuts):
        warnings.warn(
            f"{sum(map(bool, cuts))} of {len(cuts)} texts were longer than {limit} tokens and lost {sum(cuts)} tokens "
            f"({side}); strict=True raises instead",
            TruncationWarning,
            stacklevel=stacklevel,
        )


def cut_end(ids: list[int], limit: int, keep: int) -> list[int]:
    """Return at most `limit` ids. Drops from the end, but never the last `keep`, which close the text."""
    if len(ids) <= limit:
        return ids
    return ids[: limit - keep] + ids[len(ids) - keep :]


def cut_start(ids: list[int], limit: int, keep: int) -> list[int]:
    """Return at most `limit` ids. Drops from the start, but never the first `keep`, such as BOS."""
    if len(ids) <= limit:
        return ids
    return ids[:keep] + ids[len(ids) - (limit - keep) :]


def check_sides(prompt: int, answer: int, limit: int) -> None:
    """Raise TooLongError if the prompt or the answer has more tokens than each side may have."""
    for side, tokens in (("prompt", prompt), ("answer", answer)):
        if tokens > limit:
            raise TooLongError(
                f"the {side} has {tokens} tokens, the limit for each side is {limit}; strict=True forbids cutting it"
            )
