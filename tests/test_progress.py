"""Progress bars: a total, a share and the time that is left, where the size is known; and only where asked for."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

import lightrm
from lightrm.display import progress
from tests.test_scoring import write_model


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal 100 columns wide is sent."""
    sent = io.StringIO()
    monkeypatch.setattr(progress, "console", lambda: Console(file=sent, force_terminal=True, width=100))
    return sent


def test_a_bar_over_tokens_says_how_far_it_is(shown: io.StringIO) -> None:
    with progress.token_progress(4000, True) as advance:
        advance(1000)
    for part in ("1,000 of 4,000 tokens", "25%", "tokens/s"):
        assert part in shown.getvalue()
    shown.truncate(0)
    with progress.token_progress(None, True) as advance:
        advance(1000)
    assert "1,000 tokens" in shown.getvalue()
    assert "%" not in shown.getvalue()
    shown.truncate(0)
    with progress.token_progress(4000, False) as advance:
        advance(1000)
    assert not shown.getvalue().strip("\0")


def test_loading_shows_its_layers_where_it_is_asked_to(shown: io.StringIO, tmp_path: Path) -> None:

    folder = write_model(tmp_path / "model")
    rm = lightrm.load(folder, scheme="w8a8")
    rm.save(tmp_path / "q")
    lightrm.load(tmp_path / "q")
    assert not shown.getvalue()
    text = [("what?", "it is the weather and it is sunny")] * 3
    for path, calibration, what in (
        (folder, None, "layers loaded"),
        (tmp_path / "q", None, "layers mapped"),
        (folder, text, "layers rounded"),
    ):
        lightrm.load(path, scheme="w8a8", calibration=calibration, progress=True)
        for part in (what, "2/2", "100%"):
            assert part in shown.getvalue()
        shown.truncate(0)


def test_what_a_bar_is_about_is_not_markup(shown: io.StringIO) -> None:
    with progress.item_progress(2, "[red] things [/b]") as advance:
        advance(1)
    assert "[red] things [/b]" in shown.getvalue()
    assert "1/2" in shown.getvalue()
