"""lightrm's own folders: the same scores bit for bit, written whole or not at all, and every damage noticed."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open

import lightrm
from lightrm import errors
from lightrm.checkpoints.stored import write_safetensors
from lightrm.checksums import sealed
from lightrm.cli import main
from lightrm.files import UNFINISHED
from lightrm.loading import quantized_folder
from tests.zoo import specimens

IDS = [[5, 9, 33, 71, 2], [1, 2], list(range(3, 90))]
TEXTS = ("怎样才能睡得更好？", ["每天在固定的时间睡觉和起床，睡前不看手机。", "长城是中国古代的军事防御工程。"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in w4a8, as the command line writes it."""
    target = tmp_path_factory.mktemp("native") / "demo-w4a8"
    done = CliRunner().invoke(main, ["quantize", "demo", str(target), "--scheme", "w4a8"])
    assert done.exit_code == 0, done.output
    assert "least SQNR" in done.output
    return target


def copy(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_same_scores_from_text(folder: Path) -> None:
    fresh, stored = lightrm.load("demo", scheme="w4a8"), lightrm.load(folder)
    assert np.array_equal(fresh.score(*TEXTS), stored.score(*TEXTS))
    assert stored.template is not None
    assert stored.template.name == "ziya"
    assert stored.report.sqnr_db == fresh.report.sqnr_db
    assert "the folder holds w4a8" in repr(stored)
    assert not folder.with_name(folder.name + UNFINISHED).exists()
    manifest = json.loads((folder / quantized_folder.MANIFEST).read_text())
    assert set(manifest["sources"]) == {f"pytorch_model-0000{k}-of-00002.bin" for k in (1, 2)}
    assert all(len(digest) == 64 for digest in manifest["sources"].values())


@pytest.mark.parametrize("name", ["beaver", "internlm2", "trl 1: value_head.bin", "openrlhf new"])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a16"])
def test_every_head_and_scheme(name: str, scheme: str, tmp_path: Path) -> None:
    source = specimens()[name].write(tmp_path / "source")
    fresh = lightrm.load(source, scheme=scheme)
    fresh.save(tmp_path / "out")
    stored = lightrm.load(tmp_path / "out")
    assert np.array_equal(fresh.score_ids(IDS), stored.score_ids(IDS))
    assert stored.report.scheme.name == scheme
    assert stored.report.bytes == fresh.report.bytes


def test_inspect(folder: Path) -> None:
    told = CliRunner().invoke(main, ["inspect", str(folder)])
    assert told.exit_code == 0, told.output
    assert "w4a8, by lightrm" in told.output
    assert "ziya" in told.output


def test_a_taken_destination_is_refused_before_the_work(folder: Path) -> None:
    done = CliRunner().invoke(main, ["quantize", "no/such-model", str(folder)])
    assert done.exit_code == 1
    assert "exists and is not empty" in done.output


def test_schemes_of_a_folder(folder: Path) -> None:
    assert lightrm.load(folder, scheme="w4a8").report.scheme.integer
    sixteen = lightrm.load(folder, scheme="w4a16")
    assert not sixteen.report.scheme.integer
    close = lightrm.load(folder).score(*TEXTS)
    assert np.abs(sixteen.score(*TEXTS) - close).max() < 0.3
    with pytest.raises(errors.SchemeError, match="holds w4a8, which cannot become w8a8: load its source"):
        lightrm.load(folder, scheme="w8a8")
    with pytest.raises(errors.SchemeError, match="cannot become w4a8-g32"):
        lightrm.load(folder, scheme="w4a8-g32")


def test_damage_is_noticed(folder: Path, tmp_path: Path) -> None:
    weights = (folder / quantized_folder.WEIGHTS).read_bytes()

    def damaged(name: str) -> Path:
        return copy(folder, tmp_path / name)

    cut = damaged("cut")
    (cut / quantized_folder.WEIGHTS).write_bytes(weights[:-1])
    empty = damaged("empty")
    (empty / quantized_folder.WEIGHTS).write_bytes(b"")
    gone = damaged("gone")
    (gone / quantized_folder.WEIGHTS).unlink()
    for bad in (cut, empty, gone):
        with pytest.raises(errors.CorruptFileError, match=r"lightrm\.safetensors has \d+ bytes, its manifest says"):
            lightrm.load(bad)
    for at in (len(weights) - 1, len(weights) // 2, len(weights) // 3):
        altered = damaged(f"altered {at}")
        (altered / quantized_folder.WEIGHTS).write_bytes(weights[:at] + bytes([weights[at] ^ 1]) + weights[at + 1 :])
        with pytest.raises(errors.CorruptFileError, match="was altered"):
            lightrm.load(altered)
    half = damaged("half")
    (half / quantized_folder.MANIFEST).unlink()
    with pytest.raises(errors.CorruptFileError, match=r"but no lightrm\.json: a copy is incomplete"):
        lightrm.load(half)
    for content in (b"", b"[]", b'{"format": 2}', b"\xff"):
        (half / quantized_folder.MANIFEST).write_bytes(content)
        with pytest.raises(errors.CorruptFileError, match=r"lightrm\.json"):
            lightrm.load(half)
    newer = damaged("newer")
    manifest = json.loads((newer / quantized_folder.MANIFEST).read_text()) | {"format": 9, "lightrm": "9.0"}
    (newer / quantized_folder.MANIFEST).write_text(json.dumps(sealed(manifest)))
    with pytest.raises(errors.CorruptFileError, match=r"written by lightrm 9\.0 in format 9.*update lightrm"):
        lightrm.load(newer)
    (newer / quantized_folder.MANIFEST).write_text(json.dumps(manifest | {"format": 3}))
    with pytest.raises(errors.CorruptFileError, match=r"lightrm\.json was altered"):
        lightrm.load(newer)


def test_a_stopped_run_leaves_nothing_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"

    def stop(*arguments: object, **settings: object) -> None:
        raise KeyboardInterrupt

    rm = lightrm.load("demo", scheme="w8a8")
    with monkeypatch.context() as patch:
        patch.setattr(quantized_folder, "tensor_sum", stop)
        with pytest.raises(KeyboardInterrupt):
            rm.save(target)
    assert not target.exists()
    draft = target.with_name(target.name + UNFINISHED)
    assert draft.exists()
    with pytest.raises(errors.CheckpointError):
        lightrm.load(draft)
    rm.save(target)
    assert not draft.exists(), "the next run clears it away"
    with pytest.raises(errors.CheckpointError, match="exists and is not empty"):
        rm.save(target)
    (tmp_path / "file").write_text("x")
    with pytest.raises(errors.CheckpointError, match="exists and is not empty"):
        rm.save(tmp_path / "file")
    plain = lightrm.load("demo", scheme="fp32")
    with pytest.raises(errors.SchemeError, match="fp32 is not a scheme of lightrm's own folders"):
        plain.save(tmp_path / "x")


def test_our_safetensors_are_everyones(tmp_path: Path) -> None:
    tensors = {
        "bytes": torch.arange(7, dtype=torch.uint8),
        "half": torch.randn(3, 5).half(),
        "wide": torch.randn(2, 3).T,
        "none": torch.empty(0, 4),
        "one": torch.tensor(3.5),
    }
    write_safetensors(tmp_path / "x.safetensors", tensors)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)


def test_calibration_comes_closer(tmp_path: Path) -> None:
    """Compensated rounding moves scores less than plain rounding; the texts are the demo's own."""
    from lightrm.cli.demo_texts import EXAMPLES

    file = tmp_path / "texts.jsonl"
    rows = [{"prompt": p, "responses": [text for _, text in answers]} for p, answers in EXAMPLES]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    target = tmp_path / "out"
    started = time.perf_counter()
    done = CliRunner().invoke(main, ["quantize", "demo", str(target), "--scheme", "w4a8", "--calibrate", str(file)])
    assert done.exit_code == 0, done.output
    assert time.perf_counter() - started < 300
    exact, plain, better = (lightrm.load("demo", scheme=s) for s in ("fp32", "w4a8", "fp32"))
    better = lightrm.load(target)
    off = {
        name: np.mean(
            [np.abs(rm.score(p, [t for _, t in a]) - exact.score(p, [t for _, t in a])).mean() for p, a in EXAMPLES]
        )
        for name, rm in (("plain", plain), ("better", better))
    }
    assert off["better"] < 0.8 * off["plain"], off
    with pytest.raises(errors.InputError, match="is quantized already"):
        lightrm.load(target, calibration=[("a", "b")])
    with pytest.raises(errors.SchemeError, match="bf16 has nothing to calibrate"):
        lightrm.load("demo", scheme="bf16", calibration=[("a", "b")])


def test_plan_and_doctor(tmp_path: Path) -> None:
    config = json.loads((Path(lightrm.__file__).parent / "demo_model" / "config.json").read_text())
    config |= {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    seven = CliRunner().invoke(main, ["plan", str(tmp_path), "--vram", "8GiB"])
    assert seven.exit_code == 0, seven.output
    assert "auto takes w8a8" in seven.output
    assert "auto takes w4a8" in CliRunner().invoke(main, ["plan", str(tmp_path), "--vram", "5 GB"]).output
    small = CliRunner().invoke(main, ["plan", str(tmp_path), "--vram", "1g"])
    assert "auto takes bf16: " in small.output
    assert "w8a8 (6." in small.output, "after fp32 and bf16, where a CPU has no quick int8 product"
    assert "would not fit into 1.0 GiB given" in small.output
    three = CliRunner().invoke(main, ["plan", str(tmp_path), "--memory", "3GiB"])
    assert "streamed, " in three.output
    assert "is not a size" in CliRunner().invoke(main, ["plan", str(tmp_path), "--vram", "much"]).output
    told = CliRunner().invoke(main, ["doctor"])
    assert told.exit_code == 0, told.output
    assert "int8 products" in " ".join(told.output.split())


@pytest.mark.parametrize("scheme", ["fp32", "bf16", "w8a8", "w4a8", "w4a8-g32", "w4a16"])
def test_planned_weights_are_the_loaded_ones(scheme: str) -> None:
    from lightrm.engine.memory import weight_bytes

    report = lightrm.load("demo", scheme=scheme).report
    planned = weight_bytes(lightrm.load("demo").engine.decoder.architecture, report.scheme)
    assert planned == report.bytes
