"""A tokenizer that is damaged, or that asks for more than a text can bear, is refused before a library does it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lightrm
from lightrm.errors import TokenizerError
from lightrm.loading.text_side import TokenizerWarning
from lightrm.text.tokenizer_limits import MOST_GROWTH, check_description, growth_of
from tests.zoo import specimens, write_tokenizer

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
BETWEEN = {"type": "Replace", "pattern": {"Regex": "a*"}, "content": "x" * 5000}
LLAMA = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
ALBERT = [
    {"type": "Replace", "pattern": {"String": "``"}, "content": '"'}, {"type": "NFKD"}, {"type": "StripAccents"},
    {"type": "Lowercase"}, {"type": "Precompiled", "precompiled_charsmap": ""},
    {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
]  # fmt: skip


def sequence(inner: str, *steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", inner: list(steps)}


def nested(depth: int) -> dict[str, Any]:
    made = BYTES
    for _ in range(depth):
        made = sequence("pretokenizers", made)
    return made


def around(count: int) -> dict[str, Any]:
    known = {"x": {"id": "x", "ids": [0] * count, "tokens": ["x"] * count}}
    return {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x"}}], "special_tokens": known}


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("pre_tokenizer", sequence("pretokenizers", *[BYTES] * 5000), "its pre_tokenizer has 5000 steps"),
        ("pre_tokenizer", sequence("pretokenizers", *[BYTES] * 9), "2.62e.05 times as long"),
        ("pre_tokenizer", nested(40), "nested"),
        ("normalizer", sequence("normalizers", *[DOUBLE] * 60), "1.15e.18 times as long"),
        (
            "normalizer",
            sequence("normalizers", sequence("normalizers", DOUBLE, DOUBLE), *[DOUBLE] * 20),
            "times as long",
        ),
        ("normalizer", BETWEEN, "5e.03 times as long"),
        ("post_processor", around(1000), "its post_processor adds 1000 tokens"),
        ("model", {"type": "BPE", "dropout": 0.1}, "dropout is 0.1"),
    ],
)
def test_what_asks_too_much(field: str, value: Any, says: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({field: value}))
    with pytest.raises(TokenizerError, match=says) as caught:
        check_description(path)
    assert str(path) in str(caught.value)


def test_what_people_publish_passes(shared: Path, tmp_path: Path) -> None:
    published = list((shared / "cases").rglob("tokenizer.json"))
    assert published
    for path in published:
        check_description(path)
    for steps in (LLAMA, ALBERT):
        (tmp_path / "tokenizer.json").write_text(json.dumps({"normalizer": sequence("normalizers", *steps)}))
        check_description(tmp_path / "tokenizer.json")


def replaced(kind: str, pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


STEPS = st.one_of(
    st.sampled_from(["NFC", "NFD", "NFKC", "NFKD", "Lowercase", "ByteLevel", "StripAccents", "Nmt", "Strip"]).map(
        lambda kind: {"type": kind} | ({"strip_left": True, "strip_right": True} if kind == "Strip" else {})
    ),
    st.fixed_dictionaries({"type": st.just("BertNormalizer"), "clean_text": st.booleans(), "lowercase": st.booleans(),
                           "handle_chinese_chars": st.just(True), "strip_accents": st.none()}),
    st.builds(lambda a, b: replaced("String", a, b), st.text("ab ", max_size=3), st.text("ab", max_size=9)),
    st.builds(lambda a, b: replaced("Regex", a, b), st.sampled_from(["a", "a*", "[ab]+", "", r"\b"]), st.text("ab")),
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(step=STEPS, text=st.text("ab ﷺİẞ長ΰ\u0344", min_size=20, max_size=60))
def test_a_step_grows_a_text_by_no_more_than_its_bound(step: dict[str, Any], text: str) -> None:
    """What `growth_of` says, against what the library does."""
    import tokenizers

    model = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    made = tokenizers.Tokenizer.from_str(
        json.dumps({"version": "1.0", "added_tokens": [], "normalizer": step, "model": model})
    )
    assert len(made.normalizer.normalize_str(text)) <= growth_of(step) * len(text) + len(step.get("content", "")) + 1
    assert growth_of(step) <= MOST_GROWTH


def test_a_damaged_tokenizer_is_told_once_and_a_missing_one_is_not(tmp_path: Path) -> None:
    folder = specimens()["ziya"].write(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lightrm.load(folder).text.tokens is None
    write_tokenizer(folder)
    content = (folder / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(content[: len(content) // 2])
    with pytest.warns(TokenizerWarning, match=r"only token ids can be scored: .*tokenizer\.model"):
        rm = lightrm.load(folder)
    assert rm.score_ids([[1, 2, 3]]).shape == (1,)
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        rm.score("a", ["b"])
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        lightrm.load(folder, template="ziya")


def test_ids_beyond_the_embedding(tmp_path: Path) -> None:
    """The zoo's embedding has 96 rows, the tokenizer some 340 pieces: a text may use only those that are there."""
    folder = specimens()["ziya"].write(tmp_path)
    write_tokenizer(folder)
    rm = lightrm.load(folder)
    with pytest.raises(TokenizerError, match=r"gives id \d+, the embedding has rows 0 to 95"):
        rm.score("what is the weather", ["it is sunny"])
