"""A calibration that is stopped goes on where it was, with the same bits, and never from what is not its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from lightrm import errors
from lightrm.cli import main
from lightrm.loading import calibrated_loader
from lightrm.loading.calibration_draft import EXACT, QUANTIZED, Draft, KeptStreams, draft_of
from tests.test_schemes import normal

STOPS = """
import os, sys
from lightrm.cli import main
from lightrm.loading.calibration_draft import Draft, KeptStreams
place, left = sys.argv[1], int(sys.argv[2])
owner, name = {"layer": (Draft, "keep"), "stream": (KeptStreams, "put"), "record": (KeptStreams, "advance")}[place]
real = getattr(owner, name)
def counted(*arguments):
    global left
    left -= 1
    if left < 0:
        os._exit(9)  # as SIGKILL: nothing is flushed, no handler runs
    return real(*arguments)
setattr(owner, name, counted)
main(sys.argv[3:])
"""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "pairs.jsonl"
    rows = [{"prompt": f"What is {k} and {k}?", "responses": [f"It is {2 * k}, I think. " * 12]} for k in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options(target: Path, pairs: Path, *more: str) -> list[str]:
    return ["quantize", "demo", str(target), "--calibrate", str(pairs), "--device", "cpu", "--quiet", *more]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("form", "stop"),
    [
        (("--scheme", "w8a8"), ("layer", "1")),
        (("--scheme", "w4a8"), ("stream", "7")),
        (("--scheme", "w4a8"), ("record", "2")),
        (("--format", "gptq"), ("layer", "0")),
    ],
    ids=str,
)
def test_a_killed_run_goes_on_bit_for_bit(
    form: tuple[str, str], stop: tuple[str, str], pairs: Path, tmp_path: Path
) -> None:
    """Killed before a layer is kept, in the middle of its streams, or between its record and the end of its keeping;
    and then killed again."""
    done = CliRunner().invoke(main, options(tmp_path / "whole", pairs, *form))
    assert done.exit_code == 0, done.output
    assert not draft_of(tmp_path / "whole").exists()
    target = tmp_path / "stopped"
    for place in (stop, ("layer", "1")):
        command = [sys.executable, "-c", STOPS, *place, *options(target, pairs, *form)]
        assert subprocess.run(command, check=False, capture_output=True).returncode == 9
        assert not target.exists()
        with pytest.raises(errors.CheckpointError):
            calibrated(draft_of(target))
    assert (draft_of(target) / "layer-00000.json").exists()
    kept = CliRunner().invoke(main, options(target, pairs, *form))
    assert kept.exit_code == 0, kept.output
    assert files(target) == files(tmp_path / "whole")
    assert not draft_of(target).exists()


def calibrated(folder: Path) -> None:
    """Load what is no model."""
    import lightrm

    lightrm.load(folder)


def test_what_is_finished_is_not_rounded_again(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = calibrated_loader.CompensatingLoader.passed, list[int]()

    def counted(self, decoder, i, streams):  # type: ignore[no-untyped-def]
        seen.append(i)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(self, decoder, i, streams)

    monkeypatch.setattr(calibrated_loader.CompensatingLoader, "passed", counted)
    for _ in range(2):
        CliRunner().invoke(main, options(tmp_path / "out", pairs))
    assert seen[:3] == [0, 1, 2]
    assert seen[3:] == list(range(2, seen[-1] + 1))
    assert (tmp_path / "out").is_dir()


@pytest.fixture(scope="module")
def killed(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The draft of a run that was killed in its third layer."""
    target = tmp_path_factory.mktemp("killed") / "out"
    command = [sys.executable, "-c", STOPS, "layer", "2", *options(target, pairs)]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 9
    return draft_of(target)


@pytest.fixture
def draft(killed: Path, tmp_path: Path) -> Path:
    shutil.copytree(killed, draft_of(tmp_path / "out"))
    return draft_of(tmp_path / "out")


def test_a_draft_of_something_else_is_refused(draft: Path, pairs: Path, tmp_path: Path) -> None:
    """By name of what differs: the scheme, the text, the form; and it is left as it is."""
    before = files(draft)
    other = tmp_path / "other.jsonl"
    other.write_text(pairs.read_text().replace("think", "guess"))
    for asked, differs in (
        (options(tmp_path / "out", pairs, "--scheme", "w8a8"), "scheme 'w4a8', now 'w8a8'"),
        (options(tmp_path / "out", other), "texts '12, "),
        (options(tmp_path / "out", pairs, "--tokens", "999"), "texts '12, "),
        (options(tmp_path / "out", pairs, "--format", "gptq"), "form 'CompensatingLoader', now 'GptqLoader'"),
    ):
        done = CliRunner().invoke(main, asked)
        assert done.exit_code != 0
        said = f"{done.output}{done.exception}"
        assert f"{draft.name} was begun with" in said
        assert differs in said
    assert files(draft) == before


@pytest.mark.parametrize("name", ["draft.json", "layer-00001.json", "layer-00000.safetensors", "streams-00002.bin"])
@pytest.mark.parametrize("how", ["altered", "cut", "missing"])
def test_a_damaged_draft_is_refused(name: str, how: str, draft: Path, pairs: Path, tmp_path: Path) -> None:
    path = draft / name
    whole = path.read_bytes()
    if how == "missing":
        if path.suffix == ".json":
            pytest.skip("a record that is not there is of a layer that is not finished")
        path.unlink()
    else:
        middle = len(whole) // 2
        rest = bytes([whole[middle] ^ 1]) + whole[middle + 1 :] if how == "altered" else b""
        path.write_bytes(whole[:middle] + rest)
    done = CliRunner().invoke(main, options(tmp_path / "out", pairs))
    assert done.exit_code != 0
    assert name in f"{done.output}{done.exception}"
    assert not (tmp_path / "out").exists()


def test_two_runs_never_share_a_draft(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    first = Draft(tmp_path / "draft", {"scheme": "w8a8"})
    with pytest.raises(errors.InputError, match="written by another run"):
        Draft(tmp_path / "draft", {"scheme": "w8a8"})
    first.close()
    Draft(tmp_path / "draft", {"scheme": "w8a8"}).close()


def test_streams_in_files_are_what_was_put_there(tmp_path: Path) -> None:
    """Before the layer is finished, what it reads stays as it was on the disk."""
    sizes = (3, 1, 7)
    kept = KeptStreams(tmp_path, -1, sizes, 5, torch.bfloat16)
    rows = [normal(n, 5, seed=n) for n in sizes]
    for k, x in enumerate(rows):
        kept.put(QUANTIZED, k, x.bfloat16())
        kept.put(EXACT, k, x)
    kept.advance()
    before = kept.path(0).read_bytes()
    kept.put(EXACT, 1, 2 * rows[1])
    assert kept.path(0).read_bytes() == before
    assert torch.equal(kept.get(EXACT, 1), 2 * rows[1])
    assert torch.equal(kept.get(EXACT, 2), rows[2])
    assert torch.equal(kept.get(QUANTIZED, 1), rows[1].bfloat16())
    kept.path(0).write_bytes(before[:20])
    with pytest.raises(errors.CorruptFileError, match="cut short"):
        kept.get(EXACT, 2)


@pytest.mark.parametrize("form", [("--scheme", "w8a8"), ("--scheme", "w4a8"), ("--format", "gptq")], ids=str)
def test_outputs_are_rounded_a_few_at_a_time(
    form: tuple[str, str], pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same numbers as all at once, but where the last bits of a product decide."""
    found = []
    for name, most in (("whole", calibrated_loader.ROUNDED_AT_ONCE), ("slices", 3000)):
        monkeypatch.setattr(calibrated_loader, "ROUNDED_AT_ONCE", most)
        CliRunner().invoke(main, options(tmp_path / name, pairs, *form), catch_exceptions=False)
        checkpoint = tmp_path / name / "model.safetensors"
        found.append(load_file(checkpoint if checkpoint.is_file() else next((tmp_path / name).glob("*.safetensors"))))
    assert found[0].keys() == found[1].keys()
    whole = [name for name, tensor in found[0].items() if not tensor.is_floating_point() and ".0." in name]
    assert len(whole) >= 4
    for name in whole:
        one, other = (tensors[name].contiguous().view(torch.uint8) for tensors in found)
        assert one.shape == other.shape
        assert (one == other).float().mean() > 0.97, name
