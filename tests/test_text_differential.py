"""lightrm's ids are transformers', token for token: drawn folders, settings, templates and conversations.

`benchmarks/text_differential.py` draws thousands where these tests draw hundreds.
"""

from __future__ import annotations

import pytest
from hypothesis import strategies as st

from tests.text_parity import drawn, parsed_specials, protected
from tests.tokenizer_draws import Folder, folders

pytest.importorskip("transformers", minversion="5.0")


def test_parsed_specials_are_transformers(tmp_path_factory: pytest.TempPathFactory) -> None:
    """parse_specials=True: whatever stands in a chat or a text, ids and text are transformers'."""

    def one(data: st.DataObject) -> None:
        folder: Folder = data.draw(folders())
        for finding in parsed_specials(folder, folder.write(tmp_path_factory.mktemp("drawn")), data.draw):
            assert finding.fault is None, finding

    drawn(one, batches=range(15))


def test_protection_acts_on_what_users_mark_alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    """By default a spelling that a user wrote makes no control token; everything else is transformers'."""

    def one(data: st.DataObject) -> None:
        folder: Folder = data.draw(folders())
        for finding in protected(folder, folder.write(tmp_path_factory.mktemp("drawn")), data.draw):
            assert finding.fault is None, finding

    drawn(one, batches=range(15, 27))
