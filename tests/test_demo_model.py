"""The bundled model: its files, its scores by two programs, and what its card claims."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import lightrm
from benchmarks.bundled_model import CARD, KINDS, LANGUAGES, comparisons, prompt_of, table
from benchmarks.record import ROOT, read_result, with_table
from lightrm.cli.demo_texts import EXAMPLES, GOOD
from training.records import read_jsonl

FOLDER = CARD.parent
FLOORS = {"repeated": 0.95, "cut": 0.90, "foreign": 0.85}  # what the bundled model must reach, in both languages

# The first example of the model card of IDEA-CCNL/Ziya-LLaMA-7B-Reward (licence: gpl), the proper answer first.
AIR_POLLUTION = "列举一种空气污染。"
AIR_POLLUTION_ANSWERS = [
    "一种常见的空气污染源是化石燃料的燃烧产生的尾气排放，包括来自汽车、卡车、飞机、火车和工业厂房的废气排放。这会导致大气中的二氧化硫、氮氧化物、"
    "一氧化碳、臭氧和颗粒物（例如灰尘和烟雾）等污染物含量增加，对人类健康和环境造成不利影响。",
    "一种常见的空气污染源是化石燃料的燃烧产生的尾气排放，包括来自汽车、卡车、飞机、火车和工业厂房的废气排放。这会导致大气中的二氧化硫、二氧化硫、"
    "二氧化硫、二氧化硫、氮氧化物、一氧化碳、臭氧和颗粒物（例如灰尘和烟雾）等污染物含量增加，对人类健康和环境造成不利影响。",
    "一种水污染是氮氧化物污染，它是由于氮和硝化物的排放，以及由氮、硝化物和磷细菌共同作用在水体中，导致水体变成浊褐色而造成的。氮氧化物污染会影响水体中"
    "所有生物，包括鱼类和其他水生生物，影响它们的健康和生长。",
    "一种常见的空气污染源是化石燃料的燃烧产生的尾气排放，包括来自汽车、卡车、飞机、火车和工业厂房的废气排放。这会导致大气中的二氧化硫、",
]


@pytest.fixture(scope="module")
def rm() -> lightrm.RewardModel:
    return lightrm.load("demo")


def test_it_is_small_and_in_ziyas_layout(rm: lightrm.RewardModel) -> None:
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sum(files.values()) <= 12_000_000
    assert {"config.json", "pytorch_model.bin.index.json", "tokenizer.model", "special_tokens_map.json"} <= files.keys()
    assert json.loads((FOLDER / "config.json").read_text())["architectures"] == ["LlamaRewardModel"]
    assert "ziya" in repr(rm)


def test_air_pollution_ranks_the_proper_answer_first(rm: lightrm.RewardModel) -> None:
    assert rm.rank(AIR_POLLUTION, AIR_POLLUTION_ANSWERS)[0].index == 0


def test_the_demo_shows_what_it_says(rm: lightrm.RewardModel) -> None:
    for prompt, answers in EXAMPLES:
        best = rm.rank(prompt, [text for _, text in answers])[0]
        assert answers[best.index][0] == GOOD


def test_scores_equal_transformers(rm: lightrm.RewardModel) -> None:
    """The same weights in transformers' LLaMA, with the head applied by hand: fp32, 1e-4."""
    from transformers import LlamaConfig, LlamaModel

    index = json.loads((FOLDER / "pytorch_model.bin.index.json").read_text())["weight_map"]
    state = {}
    for shard in set(index.values()):
        state |= torch.load(FOLDER / shard, weights_only=True)
    state = {name: tensor.float() for name, tensor in state.items()}
    config = json.loads((FOLDER / "config.json").read_text())
    keep = ("architectures", "auto_map", "model_type", "torch_dtype")
    model = LlamaModel(LlamaConfig(**{k: v for k, v in config.items() if k not in keep})).eval()
    model.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
    for answer, score in zip(AIR_POLLUTION_ANSWERS, rm.score(AIR_POLLUTION, AIR_POLLUTION_ANSWERS), strict=True):
        ids = torch.tensor([rm.explain(AIR_POLLUTION, answer).token_ids])
        with torch.inference_mode():
            last = model(input_ids=ids).last_hidden_state[:, -1]
        expected = float(last @ state["value_head.weight"].T + state["value_head.bias"])
        assert score == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_recorded_figures_reach_the_floors() -> None:
    result = read_result("bundled_model")
    for lang in LANGUAGES:
        for kind, floor in FLOORS.items():
            row = result["corrupted"][f"{lang} {kind}"]
            assert row["n"] >= 100
            assert row["share"] >= floor, f"{lang} {kind}"


@pytest.mark.parametrize("path", [CARD, ROOT / "docs" / "bundled-model.md"], ids=["card", "docs"])
def test_documents_quote_the_result_file(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert with_table(text, "bundled_model", table(read_result("bundled_model"))) == text


def test_figures_hold_on_held_out_prompts(rm: lightrm.RewardModel, shared: Path) -> None:
    """The first comparisons of the benchmark, scored here and now: near what the result file says."""
    drawn = comparisons(read_jsonl(shared / "data" / "pairs_dev.jsonl.gz"))
    for lang in LANGUAGES:
        for kind in KINDS:
            some = [c for c in drawn if c.record["lang"] == lang and c.kind == kind and c.proper]
            some = [c for c in some if len(c.record["prompt"]) + max(len(c.good), len(c.bad)) < 700][:40]
            assert len(some) == 40
            prompts = [prompt_of(c.record) for c in some]
            wins = rm.score_batch(prompts, [c.good for c in some]) > rm.score_batch(prompts, [c.bad for c in some])
            assert np.mean(wins) >= FLOORS[kind] - 0.15, f"{lang} {kind}"
