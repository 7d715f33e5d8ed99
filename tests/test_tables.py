"""What the commands print: no cell is cut, no figure broken, and nothing that a user named is read as markup."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from lightrm.cli import main
from lightrm.data.preferences import Question
from lightrm.display.tables import Column, Sheet, plain_text
from lightrm.judge.evaluation import evaluate_scores
from lightrm.judge.fidelity import Asked, Measured, Sensitivity, build
from tests.test_scoring import write_model

FIGURE = re.compile(r"\d[\d.,]*")
WIDTHS = (60, 80)


def figures(shown: str) -> list[str]:
    return sorted(FIGURE.findall(shown))


def fits(shown: str, width: int) -> bool:
    return "…" not in shown and max(map(len, shown.splitlines())) <= width


@pytest.mark.usefixtures("few_draws")
def test_every_report_fits_and_is_whole() -> None:
    rng = np.random.default_rng(3)
    prompt = np.repeat(np.arange(12), 3)  # too few for slices, so that few draws are made
    exact = rng.normal(0, 1000, 36)
    report = build(
        "IDEA-CCNL/Ziya-LLaMA-7B-Reward",
        Asked("held-out-pairs-and-lists.jsonl", prompt, np.full(36, 300), ["en"] * 36, rng.normal(size=36)),
        Measured("fp32", exact, 28 * 2**30, 123456.0),
        [Measured("w4a8-g32+cal", exact + rng.normal(0, 400, 36), 7 * 2**30, 98765.4)],
        Measured("bf16", exact + rng.normal(0, 9, 36), 14 * 2**30, 234567.8),
        {},
    )
    questions = [
        Question(f"{k}", ("a", "b"), (1.0, 0.0), "zh" if k % 2 else "en", "a kind with a long name", "s")
        for k in range(30)
    ]
    evaluation = evaluate_scores(questions, rng.normal(size=60), 12345.6789, "m" * 90, "d.jsonl", "w8a8")
    sensitivity = Sensitivity("w8a8", tuple(rng.random(40).tolist()), 0.5, 90, 8192)
    for shown in (report.table(), evaluation, sensitivity.table()):
        whole = figures(plain_text(shown, 400))
        for width in WIDTHS:
            text = plain_text(shown, width)
            assert fits(text, width), text
            assert set(figures(text)) >= set(whole), width
    assert "tokens/s: tokens of all texts" in str(report)


def test_a_narrow_terminal_gets_parts() -> None:
    """Each has the first column; every cell is there once; a word that is longer than the line is folded."""
    sheet = Sheet(
        (Column("name", words=True), *(Column(f"column {k}") for k in range(9))),
        tuple((f"row {r}", *(f"{r}.{k}000000" for k in range(9))) for r in range(3)),
    )
    for width in (24, 40, 60, 80, 200):
        text = plain_text(sheet, width)
        assert fits(text, width)
        assert text.count("row 1") == len(sheet.parts(width))
        assert all(text.count(f"{r}.{k}000000") == 1 for r in range(3) for k in range(9))
    path = "/" + "a" * 150
    text = plain_text(Sheet((Column("", words=True), Column("", words=True)), (("folder", path),)), 60)
    assert fits(text, 60)
    assert text.count("a") == 150
    assert plain_text(Sheet((Column("x"),), ()), 60).split() == ["x", "─"]


NAME = "[red]:smile:"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data and a card whose names and texts look like rich's markup."""
    place = tmp_path_factory.mktemp("place")
    folder = write_model(place / f"{NAME}model")
    answers = ["it is [/red] sunny :smile: [bold]", "no [link=x]"]
    pairs = [
        {"prompt": f"[/b] {k}?", "chosen": answers[0], "rejected": answers[1], "kind": f"[{k % 2}]"} for k in range(4)
    ]
    (place / f"{NAME}pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    card = f"```python\nquery = '[/b] 0?'\nresponse = {answers}\n# reward: [1.25, 2.5]\n```\n"
    card += '\n# blue\n{"eval_accuracy": 0.1234, "eval_loss": 0.5}\n'
    (folder / "MODEL_CARD.md").write_text(card)
    return place


COMMANDS = {
    "inspect": (["inspect", "MODEL"], ["folder"]),
    "plan": (["plan", "MODEL"], ["resident"]),
    "fidelity": (["fidelity", "MODEL", "--data", "DATA", "--schemes", "w8a8", "--layers"], [f"{NAME}pairs.jsonl"]),
    "evaluate": (["evaluate", "MODEL", "--data", "DATA"], [f"{NAME}pairs.jsonl", "[0]", "[1]"]),
    "verify-card": (
        ["verify-card", "MODEL", "--data", "DATA"],
        ["[/b] 0?", "[/red] sunny", ":smile: [bold]", "0.1234"],
    ),
    "quantize": (["quantize", "MODEL", "OUT"], []),
    "score": (["score", "SOURCE", "-m", "MODEL"], []),
}


@pytest.mark.usefixtures("few_draws")
@pytest.mark.parametrize("name", COMMANDS)
def test_names_are_not_markup_and_nothing_is_cut(name: str, place: Path) -> None:
    (place / "answers.jsonl").write_text(json.dumps({"prompt": "[/b]", "responses": ["[red]x[/red]"]}))
    words, wanted = COMMANDS[name]
    of = {
        "MODEL": f"{NAME}model", "DATA": f"{NAME}pairs.jsonl", "OUT": f"{NAME}out", "SOURCE": "answers.jsonl",
    }  # fmt: skip
    arguments = [of.get(word, word) for word in words]
    for width in WIDTHS if name in ("inspect", "plan", "verify-card") else (60,):
        with pytest.MonkeyPatch.context() as patched:
            patched.chdir(place)
            found = CliRunner(env={"COLUMNS": str(width)}).invoke(main, arguments)
        assert found.exit_code == (name == "verify-card"), f"{found.output} {found.exception!r}"
        text = "".join(found.output.split())
        for part in [*wanted, *([] if name in ("score", "plan") else [NAME])]:
            assert "".join(part.split()) in text, f"{part} in {found.output}"
        if name not in ("score", "quantize"):
            assert fits(found.stdout.partition("\nauto takes ")[0], width), found.stdout
