"""Answers to one prompt: what their texts share is tokenized once, and the ids are those of each text alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

import lightrm
from lightrm.text.checkpoint_tokenizer import CheckpointTokenizer
from lightrm.text.encoding import read_tokens
from lightrm.text.guard import pattern_of
from lightrm.text.shared_start import Dividers, ids_of_all, shared_start
from tests.test_guard import write
from tests.test_scoring import write_model

LETTERS = "ab <>xE"
MARKS = ("<a>", "x<a>b", "<b>", "<a><b>")


def tokenizer(prepend: str, normalized: bool, single_word: bool, strips: bool) -> Tokenizer:
    """One that merges letters, with special tokens that hold each other."""
    pieces = ["<unk>", *LETTERS, "▁", "ab", "xa", "▁a", "▁b", "a<", ">a"]
    merges = [(piece[0], piece[1]) for piece in pieces[len(LETTERS) + 2 :]]
    made = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>"))
    made.normalizer = normalizers.Replace("E", "a")
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    made.add_special_tokens(
        [AddedToken(m, normalized=normalized, single_word=single_word, lstrip=strips, rstrip=strips) for m in MARKS]
    )
    return made


def runs(most: int) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from([*LETTERS, *MARKS]), max_size=most).map("".join)


@settings(max_examples=1000, deadline=None)
@given(
    runs(4), runs(2), st.lists(runs(4), min_size=2, max_size=4),
    st.sampled_from(["always", "first", "never"]), st.booleans(), st.booleans(), st.booleans(), st.sampled_from(MARKS),
)  # fmt: skip
def test_ids_are_those_of_each_text(
    start: str, end: str, answers: list[str], prepend: str, normalized: bool, single: bool, strips: bool, mark: str
) -> None:
    made = tokenizer(prepend, normalized, single, strips)
    texts = [f"{start}{mark}{end}{answer}" for answer in answers]
    added = {token.content: i for i, token in made.get_added_tokens_decoder().items()}
    splits = {} if normalized else added

    def ids_of(text: str, whole: bool) -> list[int]:
        ids = made.encode(text, add_special_tokens=False).ids
        return [90, *ids, 91, 92] if whole else ids

    dividers = Dividers(splits, max(map(len, MARKS)))
    for whole in (False, True):
        found = ids_of_all(texts, ids_of, whole, 2, dividers, pattern_of(MARKS))
        assert found == [ids_of(text, whole) for text in texts]


@given(st.lists(st.text("ab", max_size=4), min_size=1))
def test_the_shared_start(texts: list[str]) -> None:
    shared = shared_start(texts)
    assert all(text.startswith(shared) for text in texts)
    assert any(text == shared for text in texts) or len({text[len(shared)] for text in texts}) > 1


@pytest.mark.parametrize(("kind", "times"), [("unigram", 1), ("bpe", 5)])
def test_a_prompt_is_tokenized_once(kind: str, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for special tokens that are normalized: the text around them is normalized with them."""
    tokens = read_tokens(write(tmp_path, kind))
    template, turns = tokens.own_template(), [{"role": "user", "content": "why so? " * 40}]
    answers = ["it is", "it is not", "<|im_end|>", "", "it"]
    alone = [tokens.encode(template, turns, [answer], 10_000, strict=False)[0] for answer in answers]
    seen: list[int] = []
    plain = CheckpointTokenizer.plain

    def counted(self: CheckpointTokenizer, text: str, whole: bool) -> list[int]:
        seen.append(len(text))
        return plain(self, text, whole)

    monkeypatch.setattr(CheckpointTokenizer, "plain", counted)
    assert tokens.encode(template, turns, answers, 10_000, strict=False) == alone
    assert sum(length > 300 for length in seen) == times, "so many texts hold the prompt"


def test_equal_prompts_of_a_batch_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rm = lightrm.load(write_model(tmp_path / "model"))
    prompts = ["a?", "a?", [{"role": "user", "content": "a?"}], "b?", "a?"]
    answers = ["one", "two", "three", "four", "five"]
    alone = [rm.encode([p], [a])[0] for p, a in zip(prompts, answers, strict=True)]
    groups: list[int] = []
    encode = type(rm.text).encode
    monkeypatch.setattr(type(rm.text), "encode", lambda self, t, r: (groups.append(len(r)), encode(self, t, r))[1])
    assert rm.encode(prompts, answers) == alone
    assert groups == [3, 1, 1]
