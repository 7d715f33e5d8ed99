"""lightrm's ids are transformers', token for token: drawn folders, settings, templates and conversations.

`benchmarks/text_differential.py` draws thousands where these tests draw hundreds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.chat_draws import conversations, texts
from tests.text_parity import Ours, Theirs, equal_ids, holds, kept_apart
from tests.tokenizer_draws import MAY_BE_REFUSED, Folder, folders

pytest.importorskip("transformers", minversion="5.0")
Write = Callable[[Folder], Path]
# The same draws in each run: a change is judged by its own faults, and the benchmark looks for new ones.
DRAWN = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=False)


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    return lambda folder: folder.write(tmp_path_factory.mktemp("drawn"))


def check(folder: Folder, found: str | None) -> None:
    if found is not None and found.startswith("refused") and folder.class_name in MAY_BE_REFUSED:
        return
    assert found is None, found


@settings(DRAWN, max_examples=150)
@given(st.data())
def test_parsed_specials_are_transformers(write: Write, data: st.DataObject) -> None:
    """parse_specials=True: whatever stands in the text, ids and text are transformers'."""
    folder = data.draw(folders())
    path = write(folder)
    ours, theirs = Ours(path, parse_specials=True), Theirs(path)
    for _ in range(2):
        messages = data.draw(conversations(folder.added))
        check(folder, equal_ids(ours.chat(messages), theirs.chat(messages), theirs.loaded))


@settings(DRAWN, max_examples=60)
@given(st.data())
def test_plain_text_is_transformers(write: Write, data: st.DataObject) -> None:
    """tokenizer(text): the post-processor's BOS and EOS, and nothing cut."""
    folder = data.draw(folders(templates=False))
    path = write(folder)
    ours, theirs = Ours(path, parse_specials=True), Theirs(path)
    for _ in range(3):
        text = data.draw(texts(folder.added))
        check(folder, equal_ids(ours.plain(text), theirs.plain(text), theirs.loaded))


@settings(DRAWN, max_examples=100)
@given(st.data())
def test_protection_sleeps_where_nothing_is_marked(write: Write, data: st.DataObject) -> None:
    """By default, too, the ids are transformers' where no user writes a control token."""
    folder = data.draw(folders())
    path = write(folder)
    theirs = Theirs(path)
    assume(theirs.loaded)
    controls, ours = theirs.controls(folder.controls), Ours(path, parse_specials=False)
    for _ in range(2):
        messages = data.draw(conversations())
        if not holds(controls, theirs, [message["content"] for message in messages]):
            check(folder, equal_ids(ours.chat(messages), theirs.chat(messages)))


@settings(DRAWN, max_examples=100)
@given(st.data())
def test_what_users_write_stays_text(write: Write, data: st.DataObject) -> None:
    """By default a spelling that a user wrote makes no control token, and changes nothing around it."""
    folder = data.draw(folders())
    path = write(folder)
    theirs = Theirs(path)
    assume(theirs.loaded)
    controls, ours = theirs.controls(folder.controls), Ours(path, parse_specials=False)
    for _ in range(2):
        messages = data.draw(conversations(tuple(controls.values()) or ("<s>",)))
        check(folder, kept_apart(ours.chat(messages), theirs, controls, messages))
