"""Progress bars: a total, a share and the time that is left, where the size is known; and only where asked for."""

from __future__ import annotations

import inspect
import io
from pathlib import Path
from typing import Any

import pytest
import transformers
from rich.console import Console

import lightrm
from lightrm.display import progress
from tests.test_process_models import published
from tests.test_scoring import write_model
from tests.zoo import LLAMA_CONFIG, write_tokenizer


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


INSTANT = {
    "attributes", "device", "template", "max_length", "token_budget", "checkpoint", "engine", "report", "text",
    "num_labels", "model_card_data",
}  # fmt: skip
CALLS: dict[str, tuple[Any, ...]] = {
    "score": ("what?", ["it is"]), "score_batch": (["what?"], ["it is"]), "score_text": (["what? it is"],),
    "score_ids": ([[1, 2, 3]],), "stream": (["what?"], ["it is"]), "rank": ("what?", ["it is", "no"]),
    "rank_batch": (["what?"], [["it is", "no"]]), "explain": ("what?", "it is"), "encode": (["what?"], ["it is"]),
    "predict": ([("what?", "it is")],),
}  # fmt: skip
ELSEWHERE = {"save", "score_steps", "score_steps_batch", "score_attributes"}  # of models of other kinds


def test_every_call_that_may_take_long_has_a_bar(shown: io.StringIO, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    rm = lightrm.load(folder, scheme="w8a8")
    public = {name for name in dir(rm) if not name.startswith("_")}
    assert public - INSTANT == CALLS.keys() | ELSEWHERE
    for name in public - INSTANT:
        assert inspect.signature(getattr(rm, name)).parameters["progress"].default is False, name
    for name, arguments in CALLS.items():
        for asked in (False, True):
            result = getattr(rm, name)(*arguments, progress=asked)
            list(result) if name == "stream" else None
            assert ("100%" in shown.getvalue()) == asked, name
            shown.seek(0)
            shown.truncate()
    rm.save(tmp_path / "q", progress=True)
    assert "tensors written and checked" in shown.getvalue()
    for function in (lightrm.load, lightrm.evaluate, lightrm.measure_fidelity):
        assert inspect.signature(function).parameters["progress"].default is False


def test_bars_of_attributes_and_steps(shown: io.StringIO, tmp_path: Path) -> None:
    sizes = {k: v for k, v in LLAMA_CONFIG.items() if k not in ("architectures", "model_type", "vocab_size")}
    config = transformers.LlamaConfig(**sizes, vocab_size=340, num_labels=2, pad_token_id=0)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    rm = lightrm.load(tmp_path / "model", template="ziya")
    rm.score_attributes("what?", ["it is"], progress=True)
    assert "100%" in shown.getvalue()
    made = tmp_path / "steps"
    made.mkdir()
    rm = lightrm.load(published("skywork", made).folder)
    for name, arguments in (("score_steps", ("x", ["a"])), ("score_steps_batch", (["x"], [["a"]]))):
        shown.seek(0)
        shown.truncate()
        getattr(rm, name)(*arguments, progress=True)
        assert "100%" in shown.getvalue()
