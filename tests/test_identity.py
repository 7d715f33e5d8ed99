"""A job and a measurement go on only with the same: each byte that a score depends on is part of what they go by."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lightrm
from lightrm.checkpoints import contents
from lightrm.checksums import sealed
from lightrm.jobs import job
from lightrm.jobs.identity import identity, summary
from lightrm.jobs.job_outputs import Output
from lightrm.measure import measurement
from tests.test_chat import CHATML, write_json_tokenizer
from tests.zoo import HEAD_WEIGHT, LLAMA_CONFIG, Specimen, llama_weights


def write(folder: Path) -> Path:
    weights = llama_weights() | {"value_head.weight": HEAD_WEIGHT}
    weights["model.embed_tokens.weight"] = torch.randn(800, 32, generator=torch.Generator().manual_seed(2))
    write_json_tokenizer(folder, "bytes", CHATML)
    return Specimen({"model.safetensors": weights}, LLAMA_CONFIG).write(folder)


def opened(folder: Path, **options: object) -> lightrm.RewardModel:
    return lightrm.load(folder, scheme="fp32", template="chat", **options)  # type: ignore[arg-type]


def other_weights(folder: Path) -> None:
    """Another backbone of the same shapes and with the same head, by one bit of one weight."""
    tensors = load_file(folder / "model.safetensors")
    values = tensors["model.layers.1.mlp.up_proj.weight"].view(torch.int32)
    values[7, 3] ^= 1
    save_file(tensors, folder / "model.safetensors")


def changed(name: str, change: Callable[[dict], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        held = json.loads((folder / name).read_text(encoding="utf-8"))
        change(held)
        (folder / name).write_text(json.dumps(held), encoding="utf-8")

    return edit


def other_template(folder: Path) -> None:
    """BOS added."""
    path = next(folder.glob("*.jinja"), None)
    if path is not None:
        path.write_text("{{ bos_token }}" + path.read_text(encoding="utf-8"), encoding="utf-8")
    else:
        add = changed("tokenizer_config.json", lambda held: held.update(chat_template="{{ bos_token }}" + CHATML))
        add(folder)


CHANGES: dict[str, Callable[[Path], None]] = {
    "weights": other_weights,
    "config": changed("config.json", lambda held: held.update(rms_norm_eps=1e-5)),
    "tokenizer": changed("tokenizer.json", lambda held: held["model"]["merges"].pop()),
    "chat template": other_template,
}


def test_each_part_is_told_apart_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"prompt": "x", "responses": ["it is"]}))
    folder = write(tmp_path / "model")
    rm = opened(folder)
    by = identity(rm, "m")
    with monkeypatch.context() as patch:
        patch.setattr(Output, "write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            job.score_file(rm, "m", source, target, print)
    assert by == identity(opened(write(tmp_path / "copy")), "m"), "the same bytes elsewhere are the same model"
    for part, change in CHANGES.items():
        other = write(tmp_path / part)
        change(other)
        model = opened(other)
        found = identity(model, "m")
        assert {name for name in by if by[name] != found[name]} == {part}
        assert summary(found)["fingerprint"] != summary(by)["fingerprint"]
        with pytest.raises(lightrm.InputError, match=f"was begun with {part} '"):
            job.score_file(model, "m", source, target, print)
    for options in ({"parse_specials": True}, {"strict": True}, {"max_length": 99}):
        with pytest.raises(lightrm.InputError, match="was begun with"):
            job.score_file(opened(folder, **options), "m", source, target, print)
    assert job.score_file(rm, "m", source, target, print).resumed == 1


def test_a_measurement_keeps_no_scores_of_other_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "model")
    data = [{"prompt": "what?", "chosen": "it is", "rejected": "no"}]
    monkeypatch.setattr(measurement, "build", lambda *_: 1 / 0)  # the report itself is not what this is about

    def kept() -> dict:
        with pytest.raises(ZeroDivisionError):
            lightrm.measure_fidelity(folder, data, schemes=[], reference="fp32", keep=tmp_path / "kept")
        return json.loads((tmp_path / "kept" / "scores-fp32.json").read_text())

    monkeypatch.setattr(measurement, "floor_of", lambda *_: "")
    first = kept()
    assert kept() == first, "not measured again: seconds and all are the same"
    other_weights(folder)
    again = kept()
    assert again["key"] != first["key"], "measured again"
    assert again["scored"]["tokens_per_second"] != first["scored"]["tokens_per_second"]


def test_a_folder_of_lightrms_own_is_known_by_its_bytes(tmp_path: Path) -> None:
    from lightrm.loading import quantized_folder

    def quantized(name: str, change: Callable[[Path], None] | None = None) -> Path:
        source = write(tmp_path / f"{name} source")
        if change is not None:
            change(source)
        rm = lightrm.load(source, scheme="w8a8")
        rm.save(tmp_path / name)
        return tmp_path / name

    one, same, other = quantized("one"), quantized("same"), quantized("other", other_weights)
    parts = [contents.parts(lightrm.load(folder).checkpoint) for folder in (one, same, other)]
    assert parts[0] == parts[1]
    assert parts[0]["weights"] != parts[2]["weights"] or parts[0]["config"] != parts[2]["config"]
    changed("lightrm.json", lambda held: held["head"].update(mean=0.5))(same)
    path = same / "lightrm.json"
    path.write_text(json.dumps(sealed(json.loads(path.read_text()))))
    assert contents.parts(lightrm.load(one).checkpoint) != contents.parts(quantized_folder.open_native(same)[1])


def test_a_checksum_is_kept_until_the_file_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.safetensors"
    path.write_bytes(bytes(3 * 1024))
    read = []
    real = contents.file_sum
    monkeypatch.setattr(contents, "file_sum", lambda *given: (read.append(1), real(*given))[1])
    monkeypatch.setattr(contents, "LARGE", 1024)
    monkeypatch.setenv("LIGHTRM_CACHE", str(tmp_path / "cache"))
    first = contents.content(path)
    assert contents.content(path) == first
    assert len(read) == 2, "changed a moment ago: a second change would not show in its times"
    monkeypatch.setattr(contents, "YOUNG", -1e9)
    assert [contents.content(path) for _ in range(3)] == [first] * 3
    assert len(read) == 3
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(2047)
        file.write(b"\1")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = contents.content(path)
    assert second != first, "one byte, with the old size and time"
    (kept,) = [k for k in (tmp_path / "cache" / "checksums").iterdir() if second in k.read_text()]
    kept.write_text(kept.read_text()[:-1])
    assert contents.content(path) == second, "a damaged note is not believed"
    blocks = bytes(1000) + b"\2" + bytes(999)
    path.write_bytes(blocks)
    third = contents.content(path)
    path.write_bytes(blocks[1000:] + blocks[:1000])
    assert contents.content(path) != third, "order counts"
    monkeypatch.setenv("LIGHTRM_CACHE", str(path))  # no folder can be made there
    assert contents.content(path)
