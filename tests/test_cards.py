"""Model cards as checks: what the real ones say is read, none of their code runs, and a model is held against it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import lightrm
from lightrm.cli import main
from lightrm.errors import InputError
from lightrm.measure.model_card import find_card, read_card
from tests.test_scoring import write_model

BLOCK = """# A card

```python
import os
os.mkdir("{trap}")
query = "what?"
response = ["it is", "天气很好"]
print(model(query, response))  # reward: {scores}
```
"""


def test_ziyas_card(shared: Path) -> None:
    card = read_card(shared / "cards" / "ziya-llama-7b-reward.md")
    assert [example.scores for example in card.examples] == [
        (0.76,), (0.76, -1.36, -2.99, -1.82), (2.76, 1.21, -0.2, -2.19),
    ]  # fmt: skip
    golden = [json.loads(line) for line in (shared / "golden" / "ziya_card.jsonl").read_text().splitlines()]
    assert {(e.prompt, r) for e in card.examples for r in e.responses} == {
        (case["prompt"], text) for case in golden for text in case["responses"]
    }
    assert card.results == {}


def test_baichuans_card(shared: Path) -> None:
    card = read_card(shared / "cards" / "baichuan-13b-rw-helpful-rw-safe.md")
    assert card.examples == ()
    assert set(card.results) == {"rw_safe_13b_wpack", "rw_helpful_13b_wpack"}
    assert card.results["rw_safe_13b_wpack"]["eval_accuracy"] == 0.8876339025592757
    assert card.results["rw_helpful_13b_wpack"]["eval_samples_per_second"] == 17.248


def test_a_model_is_held_against_its_card(tmp_path: Path) -> None:
    folder, trap = write_model(tmp_path / "model"), tmp_path / "trap"
    scores = lightrm.load(folder).score("what?", ["it is", "天气很好"]).round(2).tolist()
    (folder / "README.md").write_text(BLOCK.format(trap=trap, scores=scores), encoding="utf-8")
    good = CliRunner().invoke(main, ["verify-card", str(folder)])
    assert good.exit_code == 0, good.output
    assert "2 of 2 scores" in good.output
    assert not trap.exists(), "a card's code is not run"
    scores[1] += 1
    (folder / "README.md").write_text(BLOCK.format(trap=trap, scores=scores), encoding="utf-8")
    bad = CliRunner().invoke(main, ["verify-card", str(folder)])
    assert bad.exit_code == 1
    assert "1 of 2 scores" in bad.output


def test_the_bundled_models_card_is_right() -> None:
    found = CliRunner().invoke(main, ["verify-card", "demo", "--tolerance", "0.01"])
    assert found.exit_code == 0, found.output
    assert "MODEL_CARD.md" in found.output
    assert "4 of 4 scores" in found.output


def test_evaluations_stand_beside_the_users_own(tmp_path: Path, shared: Path) -> None:
    folder, data = write_model(tmp_path / "model"), tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": "x", "chosen": "it is", "rejected": "no"}))
    card = shared / "cards" / "baichuan-13b-rw-helpful-rw-safe.md"
    found = CliRunner().invoke(main, ["verify-card", str(folder), "--card", str(card), "--data", str(data)])
    assert found.exit_code == 0, found.output
    for text in ("0.8876", "0.6388", "eval_loss"):
        assert text in found.output


def test_cards_that_say_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has a README\.md or MODEL_CARD\.md: pass the card's file"):
        find_card(tmp_path / "a" / "b")
    card = tmp_path / "README.md"
    deep = "(" * 20_000 + ")" * 20_000
    hostile = ("[10**400]", "[null]", "['a']", deep, "[1e999]", "[True]")
    cards = [f'```\nquery = "x"\nresponse = ["a"]\n# reward: {scores}\n```' for scores in hostile]
    cards += [
        f'```\nquery = {deep}\nresponse = ["a"]\n# reward: 1\n```',
        '# m\n{"eval_accuracy": 1' + "0" * 400 + "}\n",
    ]
    for text in (
        *cards,
        "hello",
        "```python\nquery = (\n```",
        '```\nquery = "x"\nresponse = ["a"]\n# reward: [1, 2]\n```',
    ):
        card.write_text(text)
        with pytest.raises(InputError, match=r"README\.md publishes no number to compare with: neither an example"):
            read_card(card)
    (tmp_path / "model").mkdir()
    assert find_card(tmp_path / "model") == card
    (tmp_path / "model" / "MODEL_CARD.md").write_text("x")
    assert find_card(tmp_path / "model").name == "MODEL_CARD.md"
