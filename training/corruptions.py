"""What a bad answer is: a proper one, spoilt in a way that the Ziya card says a reward model must notice.

`repeated` stutters on a span, `cut` stops in mid-sentence. The third kind, another prompt's answer, needs no
function. Each returns None where the answer cannot be spoilt that way: too short, or not properly ended.
"""

from __future__ import annotations

import random
import re

SENTENCE_END = set(".。!！?？…\"”’')）]】`;；:：\n")
SHORTEST = 20  # characters; below this a cut or a stutter is not visible for sure


def units(answer: str) -> list[str]:
    """Words with their trailing space, and single Chinese characters: joined, they are the answer again."""
    return re.findall(r"[\u3400-\u9fff]|[^\s\u3400-\u9fff]+\s*|\s+", answer)


def repeated(answer: str, rng: random.Random) -> str | None:
    """Say one span of 2..12 units 3..8 times; the rest of the answer follows or is replaced by the stutter."""
    parts = units(answer)
    if len(answer) < SHORTEST or len(parts) < 6:
        return None
    width = rng.randint(2, min(12, len(parts) // 2))
    start = rng.randrange(len(parts) - width + 1)
    span = parts[start : start + width]
    if not span[-1][-1:].isspace() and span[-1].isascii():
        span = [*span[:-1], span[-1] + " "]
    stutter = span * rng.randint(3, 8)
    if rng.random() < 0.5:
        return "".join(parts[:start] + stutter + parts[start + width :]).strip()
    # Stop inside or after the stutter, so that length and ending do not give it away.
    end = answer[-1] if rng.random() < 0.5 and answer[-1] in SENTENCE_END else ""
    return "".join(parts[:start] + stutter).strip() + end


def cut(answer: str, rng: random.Random) -> str | None:
    """Stop between 20 % and 95 % of the way, never at the end of a sentence or of a line."""
    if len(answer) < SHORTEST or answer[-1] not in SENTENCE_END:
        return None
    parts = units(answer)
    places = [
        i
        for i in range(max(1, len(parts) // 5), max(2, len(parts) * 19 // 20))
        if not set(parts[i - 1].rstrip(" ")[-1:] + parts[i - 1][-1:]) & SENTENCE_END
        and not set(parts[i][:1]) & SENTENCE_END
    ]
    if not places:
        return None
    stump = "".join(parts[: rng.choice(places)]).rstrip()
    return stump or None
