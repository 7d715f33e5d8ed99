"""`lightrm score` with models that give several numbers: steps and attributes in every format, or one score of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner

import lightrm
from lightrm.cli import main
from lightrm.jobs.identity import identity
from tests.test_process_models import PROMPT, published
from tests.zoo import LLAMA_CONFIG, write_tokenizer

TEXTS = ["We need 6 * 7.\n\nIt is 42.", "41"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return several_numbers(tmp_path_factory.mktemp("models"))


def several_numbers(folder: Path) -> dict[str, Path]:
    """Write a model that scores steps, and one with two attributes."""
    steps, labels = folder / "steps", folder / "labels"
    published("qwen", steps)
    torch.manual_seed(3)
    sizes = {k: v for k, v in LLAMA_CONFIG.items() if k not in ("architectures", "model_type", "vocab_size")}
    config = transformers.LlamaConfig(**sizes, vocab_size=340, id2label={0: "kind", 1: "true"}, pad_token_id=0)
    transformers.LlamaForSequenceClassification(config).save_pretrained(labels)
    chat = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    write_tokenizer(labels, chat_template=chat)
    return {"steps": steps, "labels": labels}


def run(*words: object) -> Any:
    return CliRunner().invoke(main, [*map(str, words), "--quiet", "--scheme", "fp32"], catch_exceptions=False)


def cells(path: Path, field: str) -> Any:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()[0][field]
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        return json.loads(next(csv.DictReader(text.splitlines(keepends=True)))[field])
    return json.loads(text.splitlines()[0])[field]


@pytest.mark.parametrize("kind", ["steps", "labels"])
@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_every_number_is_written(kind: str, ending: str, models: dict[str, Path], tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / f"out.{ending}"
    source.write_text(json.dumps({"prompt": PROMPT, "responses": TEXTS, "steps": "mine"}) + "\n")
    result = run("score", source, "-m", models[kind], "-o", target)
    assert result.exit_code == 0, result.output
    rm = lightrm.load(models[kind], scheme="fp32")
    if kind == "steps":
        found = cells(target, "steps")
        right = [rm.score_steps(PROMPT, text.split("\n\n")) for text in TEXTS]
        assert [len(one) for one in found] == [2, 1]
        np.testing.assert_allclose(np.concatenate(found), np.concatenate(right), atol=1e-6)
        assert "source_steps" in target.read_bytes().decode("latin-1")
    else:
        found = cells(target, "attributes")
        assert [list(one) for one in found] == [["kind", "true"]] * 2
        right = rm.score_attributes(PROMPT, TEXTS)
        np.testing.assert_allclose([list(one.values()) for one in found], right, atol=1e-6)


@pytest.mark.parametrize(("kind", "option"), [("steps", ("--reduce", "min")), ("labels", ("--label", "true"))])
def test_one_score_if_the_caller_says_how(
    kind: str, option: tuple[str, str], models: dict[str, Path], tmp_path: Path
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"prompt": PROMPT, "responses": TEXTS}) + "\n")
    result = run("score", source, "-m", models[kind], *option)
    assert result.exit_code == 0, result.output
    written = json.loads(result.stdout)
    rm = lightrm.load(models[kind], scheme="fp32", **{option[0].removeprefix("--"): option[1]})
    np.testing.assert_allclose(written["scores"], rm.score(PROMPT, TEXTS), atol=1e-6)
    other = lightrm.load(models[kind], scheme="fp32")
    assert identity(rm, "m") != identity(other, "m"), "a job goes on only with the same choice"


def test_inspect_says_what_a_head_gives(models: dict[str, Path]) -> None:
    told = {kind: " ".join(run_inspect(folder).split()) for kind, folder in models.items()}
    assert "gives a probability for each step of an answer" in told["steps"]
    assert "gives 2 attributes: kind, true" in told["labels"]


def run_inspect(folder: Path) -> str:
    return CliRunner().invoke(main, ["inspect", str(folder)]).output


@pytest.mark.parametrize("kind", ["steps", "labels"])
def test_what_needs_one_score_says_so(kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    pairs = [{"prompt": PROMPT, "chosen": TEXTS[0], "rejected": TEXTS[1]}]
    rm = lightrm.load(models[kind], scheme="fp32")
    with pytest.raises(lightrm.LightRMError, match=r"score_steps|label=NAME"):
        lightrm.evaluate(rm, pairs)


def test_fidelity_of_one_attribute(models: dict[str, Path]) -> None:
    records = [{"prompt": PROMPT, "chosen": text, "rejected": "41 or so"} for text in (*TEXTS, "maybe", "42")]
    report = lightrm.measure_fidelity(models["labels"], records, schemes=["w8a8"], label="true", layers=True)
    assert report.row("w8a8").sqnr_db
    with pytest.raises(lightrm.InputError, match="label=NAME"):
        lightrm.measure_fidelity(models["labels"], records, schemes=["w8a8"])
