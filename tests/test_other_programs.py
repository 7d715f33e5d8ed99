"""Other programs' rows in a fidelity report are the scores that those programs give for the same ids."""

from __future__ import annotations

import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import lightrm
from lightrm import errors
from lightrm.cli import main
from lightrm.engine import class_memory
from lightrm.loading.gptq_export import export_gptq
from lightrm.measure import measurement
from tests.class_zoo import one_by_one, reference, with_chat, written
from tests.zoo import specimens

pytestmark = pytest.mark.usefixtures("few_draws")
IDS = [[5, 9, 33, 71, 2], [3, 2], list(range(3, 60)), [9, 1, 1], [7]]
QWEN3 = {"head_dim": 32, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 1}
LLAMA = {"num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 1, "intermediate_size": 128}
MODELS = {"llama": ("LlamaForSequenceClassification", LLAMA), "qwen3": ("Qwen3ForSequenceClassification", QWEN3)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: with_chat(written(kind, root / name, **more)) for name, (kind, more) in MODELS.items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    words = ["it", "is", "the", "weather", "sunny", "warm", "and", "cold", "a", "day"]
    draw = np.random.default_rng(5)
    texts = [" ".join(draw.choice(words, n)) for n in draw.integers(1, 20, 75)]
    rows = [{"prompt": a, "chosen": b, "rejected": c} for a, b, c in zip(*[iter(texts)] * 3, strict=True)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_rows_are_what_the_class_gives(folders: dict[str, Path], data: Path) -> None:
    """hf:fp32 is transformers' own score of each sequence alone, and agrees with lightrm's own decoder to 1e-4."""
    pytest.importorskip("bitsandbytes")
    folder, schemes = folders["llama"], ("w8a8", "hf:fp32", "hf:bf16", "hf:nf4", "hf:int8")
    report = lightrm.measure_fidelity(folder, data, schemes=schemes)
    assert [row.scheme for row in report.rows] == [*schemes]
    rm = lightrm.load(folder, scheme="fp32")
    questions = lightrm.read_questions(data)
    ids = rm.encode([q.prompt for q in questions for _ in q.responses], [r for q in questions for r in q.responses])
    own = one_by_one(reference(folder), ids)
    np.testing.assert_allclose(report.scores["hf:fp32"], own, atol=1e-5)
    np.testing.assert_allclose(report.scores["fp32"], own, atol=1e-4)
    for row, scheme in (("hf:bf16", "bf16"), ("hf:nf4", "nf4"), ("hf:int8", "bnb-int8")):
        theirs = lightrm.load(folder, scheme=scheme, engine="transformers")
        np.testing.assert_allclose(report.scores[row], theirs.score_ids(ids), atol=1e-5)
        assert report.row(row).bytes == theirs.report.bytes
    assert report.row("hf:fp32").agreement.tau.value == pytest.approx(1)
    assert report.row("hf:fp32").agreement.mean_error.value < 1e-4 < report.row("hf:bf16").agreement.mean_error.value
    assert all(row.tokens_per_second > 0 for row in report.rows)
    assert report.about["other programs"] == ", ".join(f"{p} {version(p)}" for p in ("transformers", "bitsandbytes"))
    assert "hf:nf4" in str(report)


def test_the_command_shows_them_in_its_table(folders: dict[str, Path], data: Path) -> None:
    for model, code, says in (
        (folders["llama"], 0, "against fp32, 5 prompts"),
        ("demo", 1, "SchemeError: hf:fp32 runs"),
    ):
        options = ["--data", str(data), "--schemes", "hf:fp32", "--limit", "5", "--quiet"]
        done = CliRunner().invoke(main, ["fidelity", str(model), *options])
        assert done.exit_code == code, done.output
        assert says in " ".join(done.output.split())
        assert "hf:fp32" in done.output


def test_kept_scores_are_of_their_program(
    folders: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[str] = []
    measured = measurement.measured

    def counted(rm: lightrm.RewardModel, scheme: str, *rest: Any) -> Any:
        scored.append(scheme)
        return measured(rm, scheme, *rest)

    monkeypatch.setattr(measurement, "measured", counted)

    def run(*schemes: str) -> list[str]:
        scored.clear()
        lightrm.measure_fidelity(folders["llama"], data, schemes=schemes, keep=tmp_path)
        return [*scored]

    assert run("fp32", "hf:bf16") == ["fp32", "bf16", "hf:bf16"], "the reference's scores are those of fp32"
    assert run("hf:bf16") == []
    monkeypatch.setattr(measurement, "programs", lambda schemes: "transformers 6")
    assert run("hf:bf16") == ["hf:bf16"], "another version's scores are others"


def test_a_quantized_folder_stands_beside_the_others(folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    lightrm.load(folders["llama"], scheme="w8a8").save(tmp_path / "own")
    report = lightrm.measure_fidelity(
        tmp_path / "own", data, schemes=["w4a8", "hf:bf16"], reference_model=folders["llama"]
    )
    assert [row.scheme for row in report.rows] == ["w8a8", "hf:bf16"]


def test_a_gptq_folder_is_measured_against_its_source(folders: dict[str, Path], data: Path, tmp_path: Path) -> None:
    source = folders["llama"]
    export_gptq(source, tmp_path / "gptq")
    found = [
        lightrm.measure_fidelity(
            tmp_path / "gptq", data, schemes=["w4a16", "hf:fp32"], reference_model=reference, keep=tmp_path / "kept"
        )
        for reference in (source, source)
    ]
    assert found[0].to_json() == found[1].to_json()
    assert found[0].row("w4a16").agreement.mean_error.value > 0.05, "rounding to 4 bits shows"
    assert found[0].row("hf:fp32").agreement.mean_error.value < 1e-4, "made of the full-precision weights"
    alone = lightrm.measure_fidelity(tmp_path / "gptq", data, schemes=["w4a16"])
    assert alone.row("w4a16").agreement.mean_error.value < 0.05, "without it, of the file's own values"


def test_the_system_turn_is_in_the_texts(folders: dict[str, Path], data: Path) -> None:
    plain, longer = (
        lightrm.measure_fidelity(folders["llama"], data, schemes=["hf:fp32"], system=system)
        for system in (None, "it is cold")
    )
    assert longer.tokens > plain.tokens
    np.testing.assert_allclose(longer.scores["hf:fp32"], longer.scores["fp32"], atol=1e-4)


def refused(model: str | Path, data: Path, scheme: str, **more: Any) -> str:
    said: list[str] = []
    with pytest.raises(errors.SchemeError) as raised:
        lightrm.measure_fidelity(model, data, schemes=["fp32", scheme], tell=said.append, **more)
    assert said == [], "before anything is scored"
    return str(raised.value)


def test_refused_before_anything_is_scored(
    folders: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refused("demo", data, "hf:fp32")
    assert "no code of a checkpoint's own" in said
    assert "LlamaRewardModel of model_type 'llama' is no class of transformers" in said
    internlm2 = specimens()["internlm2"].write(tmp_path / "internlm2")
    assert "model_type 'internlm2' is no class of transformers" in refused(internlm2, data, "hf:bf16")
    assert "no scheme 'hf:x'; of other programs there are hf:fp32, hf:bf16" in refused(folders["llama"], data, "hf:x")
    odd = written("LlamaForSequenceClassification", tmp_path / "odd", **{**LLAMA, "intermediate_size": 96})
    assert "inputs are a multiple of 64, and LlamaForSequenceClassification has one of 96" in refused(
        odd, data, "hf:nf4"
    )
    assert "is no GPTQ folder" in refused(folders["llama"], data, "hf:gptq")
    with pytest.raises(errors.SchemeError, match="engine='transformers'"):
        lightrm.load(folders["llama"], scheme="hf:bf16")
    export_gptq(folders["llama"], tmp_path / "gptq")
    assert "holds GPTQ's values, which transformers runs as they are" in refused(tmp_path / "gptq", data, "hf:bf16")
    monkeypatch.setattr(class_memory, "find_spec", lambda name: None)
    said = refused(tmp_path / "gptq", data, "hf:gptq")
    assert "optimum and GPTQModel cannot be imported: pip install 'lightrm[interop]'" in said
    planned = ["plan", str(tmp_path / "gptq"), "--engine", "transformers"]
    assert "pip install 'lightrm[interop]'" in CliRunner().invoke(main, planned).output
    monkeypatch.setattr(class_memory, "find_spec", lambda name: object())
    assert "auto takes gptq: the file's own values" in CliRunner().invoke(main, planned).output
    monkeypatch.setattr(class_memory, "find_spec", lambda name: None)
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    del config["quantization_config"]  # only the file beside it says so, which transformers does not read
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(config))
    assert "quantized by 'gptq'" in refused(tmp_path / "gptq", data, "hf:gptq")


def dequantized(folder: Path, target: Path) -> Path:
    """Write a GPTQ folder as a plain one, the way an outside reader of the format would: bit by bit, in numpy."""
    config = json.loads((folder / "config.json").read_text())
    bits = config.pop("quantization_config")["bits"]
    stored = load_file(folder / "model.safetensors")
    plain = {name: t for name, t in stored.items() if name.split(".")[-1] in ("weight", "bias")}

    def values(words: np.ndarray) -> np.ndarray:
        """Each word's values, the lowest bits first, along a new last axis."""
        shifts = np.arange(0, 32, bits, dtype=np.uint32)
        return (words.view(np.uint32)[..., None] >> shifts) & np.uint32(2**bits - 1)

    for stem in (name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")):
        q, z, scales, group = (stored[f"{stem}.{part}"].numpy() for part in ("qweight", "qzeros", "scales", "g_idx"))
        q_OI = values(q.T).reshape(q.shape[1], -1).astype(np.int64)
        zero_GO = values(z).reshape(len(z), -1).astype(np.int64) + 1
        weight_OI = scales.T[:, group] * (q_OI - zero_GO.T[:, group])
        plain[f"{stem}.weight"] = torch.from_numpy(weight_OI.astype(np.float16)).float()
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in plain.items()}, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a16-g32"])
@pytest.mark.parametrize("name", MODELS)
def test_transformers_scores_what_the_exported_files_say(
    name: str, scheme: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """With GPTQModel itself where it is installed; benchmarks/gptq_files.py is committed with its result."""
    export_gptq(folders[name], tmp_path / "gptq", scheme=scheme)
    ours = lightrm.load(tmp_path / "gptq", scheme="fp32").score_ids(IDS)
    plain = dequantized(tmp_path / "gptq", tmp_path / "plain")
    np.testing.assert_allclose(
        lightrm.load(plain, scheme="fp32", engine="transformers").score_ids(IDS), ours, atol=1e-4
    )
    exact = lightrm.load(folders[name], scheme="fp32").score_ids(IDS)
    assert np.abs(ours - exact).max() > 1e-3, "rounding shows"
    if find_spec("gptqmodel") is not None and find_spec("optimum") is not None:
        theirs = lightrm.load(tmp_path / "gptq", engine="transformers").score_ids(IDS)
        half = lightrm.load(tmp_path / "gptq").score_ids(IDS)
        assert np.abs(theirs - ours).max() <= 3 * np.abs(half - ours).max()
