"""Limits for a stranger's tokenizer.json: the tokenizers library does whatever the file says.

A text grows on its way: a normalizer that doubles it sixty times takes all memory, and so do several byte-level steps
in a row. So the growth that each step can cause is bounded, and the product of all steps by what the largest published
tokenizers need.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightrm.errors import TokenizerError
from lightrm.files import read_json

MOST_STEPS = 64  # of a normalizer, or of a pre-tokenizer; published ones have up to eight
MOST_GROWTH = 4096  # characters made from one; ALBERT's normalizer has 1296 by these rules
MOST_AROUND = 64  # tokens put around a text; published ones have up to four
# How many characters a step can make from one, at most.
GROWTH = {"NFKC": 18, "NFKD": 18, "NFC": 3, "NFD": 4, "Precompiled": 18, "Lowercase": 2, "BertNormalizer": 4,
          "ByteLevel": 4}  # fmt: skip
KINDS = (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers"))


def check_description(path: Path) -> None:
    """Raise TokenizerError, which names file and field, for a tokenizer.json that is damaged or exceeds a limit."""
    description = read_json(path, TokenizerError)
    growth = 1.0
    for field, inner in KINDS:
        steps = list(steps_of(description.get(field), inner))
        if len(steps) > MOST_STEPS:
            raise TokenizerError(f"{path}: its {field} has {len(steps)} steps, expected at most {MOST_STEPS}")
        for step in steps:
            growth *= growth_of(step)
    if growth > MOST_GROWTH:
        raise TokenizerError(
            f"{path}: its normalizer and pre_tokenizer may make a text {growth:.3g} times as long, expected at most "
            f"{MOST_GROWTH} times: scoring one would take all memory"
        )
    around = sum(ids_of(step) for step in steps_of(description.get("post_processor"), "processors"))
    if around > MOST_AROUND:
        raise TokenizerError(
            f"{path}: its post_processor adds {around} tokens to a text, at most {MOST_AROUND} are sane"
        )
    model = description.get("model")
    if isinstance(model, dict) and model.get("dropout"):
        raise TokenizerError(
            f"{path}: model.dropout is {model['dropout']!r}: the ids of a text would be drawn by chance; set it to null"
        )


@contextmanager
def as_tokenizer_errors(what: str) -> Iterator[None]:
    """Turn whatever the library raises into a TokenizerError: bare Exceptions, and Rust's panics, which are not
    Exceptions."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(error, TokenizerError | MemoryError):
            raise
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise TokenizerError(f"{what}: {said[:300]}") from error


def steps_of(step: Any, inner: str) -> Iterator[dict[str, Any]]:
    """Yield the steps of a component; those of nested sequences one after the other."""
    if isinstance(step, dict):
        parts = step.get(inner)
        if step.get("type") == "Sequence" and isinstance(parts, list):
            for part in parts:
                yield from steps_of(part, inner)
        else:
            yield step


def growth_of(step: dict[str, Any]) -> float:
    kind = step.get("type")
    if kind == "Prepend":
        return float(1 + len(str(step.get("prepend", ""))) // 64)  # added once per text: only a long one matters
    if kind != "Replace":
        return float(GROWTH.get(str(kind), 1))
    content, pattern = len(str(step.get("content", ""))), step.get("pattern")
    literal = pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(literal, str) and literal:
        return max(1.0, content / len(literal))
    return 1.0 + content  # a pattern may match between any two characters


def ids_of(step: dict[str, Any]) -> int:
    """Return how many tokens a step of a post-processor adds to a text."""
    single, known = step.get("single"), step.get("special_tokens")
    if not isinstance(single, list) or not isinstance(known, dict):
        return 0
    names = [part["SpecialToken"].get("id") for part in single if isinstance(part, dict)
             and isinstance(part.get("SpecialToken"), dict)]  # fmt: skip
    found = (known.get(name) for name in names if isinstance(name, str))
    return sum(len(entry["ids"]) for entry in found if isinstance(entry, dict) and isinstance(entry.get("ids"), list))
