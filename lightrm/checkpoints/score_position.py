"""Where in a sequence the score is read: part of the layout, as in the model's own code.

Attention is causal, so tokens behind that position cannot change the score. Reading there is therefore the same as
cutting the sequence behind it before it is run, and that is what is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightrm.errors import InputError

Rule = Literal["last", "last but pad", "before pad", "last of kind", "no pad", "own"]


@dataclass(frozen=True, slots=True)
class Reading:
    """The position, by a rule over the token ids of a sequence.

        last          the last token
        last but pad  the last one that is not `token`; the first, if all are (transformers' *ForSequenceClassification)
        before pad    the one before the first `token`; the last, if there is none or if it is the first
        last of kind  the last `token`, which the layout appends
        no pad        the last token, of a sequence that must not hold `token`
        own           the class that runs the model reads it; nothing is cut

    why: whose code does so.
    """

    rule: Rule
    why: str
    token: int | None = None

    def end(self, ids: Sequence[int]) -> int:
        """Return the number of ids up to the one that is read. Raises InputError if there is none to read."""
        count = len(ids)
        if self.rule == "last but pad":
            while count and ids[count - 1] == self.token:
                count -= 1
            return max(count, 1)
        if self.rule == "before pad":
            return next((k for k, i in enumerate(ids) if i == self.token), 0) or count
        if self.rule == "last of kind":
            while count and ids[count - 1] != self.token:
                count -= 1
            if not count:
                raise InputError(f"this model is read at its token {self.token}, which the sequence does not hold")
        if self.rule == "no pad" and self.token in ids:
            raise InputError(
                f"the text holds this model's pad token {self.token}: where its own code then reads is not known"
            )
        return count

    def cut(self, ids: Sequence[int]) -> list[int]:
        """Return the ids up to the one that is read. A second cut changes nothing."""
        return list(ids[: self.end(ids)])

    def __str__(self) -> str:
        if self.rule == "own":
            return self.why
        where = {
            "last": "the last token",
            "last but pad": f"the last token that is not pad ({self.token})",
            "before pad": f"the token before the first pad ({self.token})",
            "last of kind": f"the appended token {self.token}",
            "no pad": f"the last token, where no token is pad ({self.token})",
        }
        return f"{where[self.rule]}, {self.why}"


def reads_last(why: str) -> Reading:
    return Reading("last", why)
