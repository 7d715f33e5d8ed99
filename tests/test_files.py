"""Strangers' JSON, safetensors and pickles: read as every program reads them, or refused by the file's name."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import lightrm
from lightrm import errors
from lightrm.checkpoints.pickles import PickleFile
from lightrm.checkpoints.safe import SafeFile
from lightrm.checkpoints.source import TensorSource
from lightrm.files import UNFINISHED, Watched, read_json, write_json
from tests.zoo import HEAD_WEIGHT, LLAMA_CONFIG, Specimen, llama_weights, normal, sharded, write_weights

WEIGHTS = llama_weights() | {"value_head.weight": HEAD_WEIGHT}
LETTERS = {
    "a": normal(6, 4, seed=1),
    "b": normal(3, seed=2).half(),
    "none": torch.empty(0, 4),
    "one": torch.tensor(2.0),
}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"a": ' + b"[" * 100_000, "nested"),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "nested 101 deep"),
        (b'{"a": ' + b'{"b": ' * 3000 + b"1" + b"}" * 3001, "nested"),
        (b'{"a": 1' + b"0" * 400 + b"}", "401 digits"),
        (b'{"a": 1' + b"0" * 9000 + b"}", "9001 digits"),
        (b'{"a": 1e999}', "larger than a float"),
        (b'{"a": NaN}', "field 'a' holds NaN, which is not a number"),
        (b'{"a": {"b": [[1], [2, [3, NaN]]]}}', "field 'b' holds NaN"),
        (b'{"a": -Infinity}', "field 'a' holds -Infinity"),
        (b'{"a": 1, "b": 2, "a": 3}', "'a' stands in one object twice"),
        (b'{"a": "\\ud800"}', "surrogates"),
        (b'{"a": "\xff"}', "utf-8"),
        (b"[1]", "expected a JSON object, found list"),
        (b"", "cannot be read as JSON"),
    ],
)
def test_json_that_is_refused(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(errors.ConfigError, match=says) as caught:
        read_json(tmp_path / "x.json", errors.ConfigError)
    assert "x.json" in str(caught.value)


def test_json_that_people_publish(tmp_path: Path) -> None:
    value = {"model_max_length": 1000000000000000019884624838656, "eps": 1e-6, "text": "长城 😀", "deep": [[[{}]]]}
    for ascii_only in (True, False):
        (tmp_path / "x.json").write_text(json.dumps(value, ensure_ascii=ascii_only), encoding="utf-8")
        assert read_json(tmp_path / "x.json", errors.ConfigError) == value


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors.index.json", "tokenizer_config.json", "special_tokens_map.json",
     "added_tokens.json", "adapter_config.json", "quantize_config.json", "lightrm.json", "tokenizer.json"],
)  # fmt: skip
@pytest.mark.parametrize("content", [b'{"a": ' + b"[" * 50_000, b'{"vocab_size": 1' + b"0" * 400 + b"}", b'{"a": NaN}'])
def test_every_json_file_goes_through_one_reader(name: str, content: bytes, tmp_path: Path) -> None:
    weights = dict(WEIGHTS)
    if name == "quantize_config.json":
        weights |= {f"x.{part}": torch.ones(4, 8, dtype=torch.int32) for part in ("qweight", "qzeros", "scales")}
    folder = Specimen({"model.safetensors": weights}, LLAMA_CONFIG).write(tmp_path)
    if "token" in name:
        (folder / "tokenizer.model").write_bytes(b"x")
    (folder / name).write_bytes(content)
    with pytest.raises(lightrm.LightRMError, match=name.replace(".", r"\.")):
        lightrm.load(folder, template="ziya" if "token" in name else None)


def test_an_index_names_files_that_can_be(tmp_path: Path) -> None:
    files, index = sharded(WEIGHTS, "bin")
    for file in ("a\0b", "x" * 5000, 7, ["a"]):
        index["pytorch_model.bin.index.json"]["weight_map"]["model.norm.weight"] = file
        with pytest.raises(errors.CheckpointError, match=r"pytorch_model\.bin\.index\.json"):
            lightrm.load(Specimen(files, LLAMA_CONFIG, extra=index).write(tmp_path))


def test_two_files_with_one_name_must_agree(tmp_path: Path) -> None:
    write_weights(tmp_path / "a.bin", LETTERS)
    write_weights(tmp_path / "b.safetensors", {"a": LETTERS["a"]})
    TensorSource([tmp_path / "a.bin", tmp_path / "b.safetensors"])
    write_weights(tmp_path / "b.safetensors", {"a": LETTERS["a"] + 1})
    with pytest.raises(errors.TensorMismatchError, match=r"b\.safetensors and a\.bin both hold tensor 'a'"):
        TensorSource([tmp_path / "a.bin", tmp_path / "b.safetensors"])


def headed(path: Path, header: bytes, body: int = 8) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(body))
    return path


def entry(**changes: Any) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}).encode()


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (entry(shape=[3]), "has 12 bytes, its place 8"),
        (entry(shape=[-2]), "no shape"),
        (entry(shape=[True, 2]), "no shape"),
        (entry(shape=[2**62, 2**62]), "its place 8"),
        (entry(shape=[1] * 9 + [2]), "has the shape"),
        (entry(data_offsets=[8, 0]), "place"),
        (entry(data_offsets=[1, 9]), "does not begin at byte 0"),
        (entry(data_offsets=[0, 10**30]), "bytes, its place"),
        (entry(dtype=4), "no dtype"),
        (entry(dtype="F64", shape=[2], data_offsets=[0, 16]), "end at byte"),
        (entry()[:-1] + b', "b": ' + entry()[6:], "'b' does not begin at byte 8"),
        (entry()[:-1] + b", " + entry()[1:], "stands in one object twice"),
        (b'{"a": 1}', "no dtype"),
        (b"[]", "expected a JSON object"),
        (b'{"__metadata__": 3}', "__metadata__"),
        (b'{"a": ' + b"[" * 100_000, "nested"),
    ],
)
def test_safetensors_headers(header: bytes, says: str, tmp_path: Path) -> None:
    with pytest.raises(errors.CorruptFileError, match=says) as caught:
        SafeFile(headed(tmp_path / "x.safetensors", header))
    assert "x.safetensors" in str(caught.value)


def test_a_dtype_that_nothing_reads_is_named(tmp_path: Path) -> None:
    file = SafeFile(headed(tmp_path / "x.safetensors", entry(dtype="F4")))
    with pytest.raises(errors.UnsupportedModelError, match=r"x\.safetensors: tensor 'a' is of dtype F4"):
        file.read("a")


def test_both_kinds_of_files_give_what_was_saved(tmp_path: Path) -> None:
    base = normal(40, seed=3)
    odd = {"rows": base.view(10, 4)[2:5, 1:3], "turned": base.view(8, 5).T, "last": base[-1:], "parameter": base[:3]}
    odd["parameter"] = torch.nn.Parameter(odd["parameter"])
    torch.save(LETTERS | odd | {"step": 7}, tmp_path / "x.bin")
    torch.save(LETTERS | odd, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    write_weights(tmp_path / "x.safetensors", LETTERS)
    for name, expected in ("x.bin", LETTERS | odd), ("old.pt", LETTERS | odd), ("x.safetensors", LETTERS):
        source = TensorSource([tmp_path / name])
        assert source.names.keys() == expected.keys()
        for key, tensor in expected.items():
            found = source.read(key)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)
            assert source.shape(key) == tuple(tensor.shape)


def test_every_flipped_bit_of_a_zip_is_seen(tmp_path: Path) -> None:
    """In a tensor, in the pickle, in the list of records: read right, or refused by the file's name."""
    tensors = {"a": normal(5, 4, seed=1), "b": normal(7, seed=2)}
    torch.save(tensors, tmp_path / "x.bin")
    content = (tmp_path / "x.bin").read_bytes()
    with zipfile.ZipFile(tmp_path / "x.bin") as archive:
        start = next(i.header_offset for i in archive.infolist() if i.filename.endswith("data/0"))
    refused = 0
    for at in [*range(start, start + 150), *range(0, len(content), 11)]:
        (tmp_path / "x.bin").write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        try:
            file = PickleFile(tmp_path / "x.bin")
            found = {name: file.read(name) for name in file.tensors}
        except lightrm.CheckpointError as error:
            named = str(tmp_path / "x.bin") in str(error)
            refused += named
        else:
            named = found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in found)
        assert named, at
    assert refused > 100
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, tmp_path / "x.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(PickleFile(tmp_path / "x.bin").read("a"), tensors["a"]), "who left the CRCs out wrote no others"


class Coloured(torch.Tensor):
    pass


def odd_tensors() -> dict[str, Any]:
    quantized = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)
    return {
        "sparse": torch.eye(3).to_sparse(), "meta": torch.empty(3, device="meta"), "dtype torch.q": quantized,
        "dtype torch.complex64": torch.ones(2, dtype=torch.complex64), "more numbers": torch.ones(1).expand(10**9),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sparse", "meta", "dtype torch.q", "dtype torch.complex64", "more numbers"])
def test_tensors_that_are_not_plain_are_named(kind: str, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "strange": odd_tensors()[kind]}, tmp_path / "x.bin")
    with pytest.raises(errors.CheckpointError, match=r"x\.bin") as caught:
        PickleFile(tmp_path / "x.bin")
    assert kind in str(caught.value) or "plain tensors" in str(caught.value)


def test_keys_that_are_no_names(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), 7: torch.ones(2)}, tmp_path / "x.bin")
    with pytest.raises(errors.CorruptFileError, match=r"x\.bin: expected tensors under names, found one under 7"):
        PickleFile(tmp_path / "x.bin")


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    """Cut or written to: refused. Replaced by another of its name: read as it was."""
    for suffix in (".safetensors", ".bin"):
        path = tmp_path / f"x{suffix}"
        write_weights(path, {"a": LETTERS["a"]})
        source = TensorSource([path])
        write_weights(tmp_path / f"new{suffix}", {"a": LETTERS["a"] + 1})
        os.replace(tmp_path / f"new{suffix}", path)
        assert torch.equal(source.read("a"), LETTERS["a"])
        source = TensorSource([path])
        path.write_bytes(path.read_bytes()[:-5])
        with pytest.raises(errors.CorruptFileError, match=rf"x{suffix} was changed while its model is in use"):
            source.read("a")


def test_a_write_in_place_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345678")
    watched = Watched(path)
    watched.check()
    os.utime(path, ns=(1, 1))
    with pytest.raises(errors.CorruptFileError, match=r"x was changed .*\(it was written to\)"):
        watched.check()


def test_json_is_written_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": "长城"})
    assert read_json(tmp_path / "x.json", errors.ConfigError) == {"a": "长城"}
    assert not (tmp_path / f"x.json{UNFINISHED}").exists()
