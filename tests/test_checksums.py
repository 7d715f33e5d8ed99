"""lightrm's own folders hold every byte under a checksum: any change, any other order, any file more or less shows."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

import lightrm
from lightrm import errors
from lightrm.checkpoints.stored import write_safetensors
from lightrm.checksums import SEAL, file_sum, sealed, tensor_sum
from lightrm.loading import quantized_folder
from tests.zoo import specimens, write_tokenizer

IDS = [[5, 9, 33, 71, 2], [1, 2], list(range(3, 90))]


def test_sums_see_every_byte_and_every_order() -> None:
    for count in (0, 1, 8, 15, 64):
        tensor = torch.arange(count, dtype=torch.uint8)
        for at in range(count):
            changed = tensor.clone()
            changed[at] += 1
            assert tensor_sum(changed) != tensor_sum(tensor)
    words = torch.arange(32, dtype=torch.int64)
    for turned in (words.roll(1), words.flip(0), words.view(4, 8).T, torch.cat([words[16:], words[:16]])):
        assert tensor_sum(turned) != tensor_sum(words)


def small(target: Path, scheme: str = "w8a8") -> Path:
    """A tiny model with a tokenizer and a chat template, in our own format."""
    source = specimens()["sequence classification"].write(target / "source")
    write_tokenizer(source)
    (source / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}{{ messages[1].content }}")
    rm = lightrm.load(source, scheme=scheme)
    rm.save(target / "own")
    return target / "own"


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_every_file_is_under_a_checksum(scheme: str, tmp_path: Path) -> None:
    """Any byte of any file: the folder is refused, and the file is named."""
    folder = small(tmp_path, scheme)
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        "chat_template.jinja", "config.json", quantized_folder.MANIFEST, quantized_folder.WEIGHTS,
        "special_tokens_map.json", "tokenizer.model", "tokenizer_config.json",
    ]  # fmt: skip
    for name in names:
        content = (folder / name).read_bytes()
        for at in {0, 7, 8, 9, len(content) - 1, *range(0, len(content), len(content) // 15 + 1)}:
            (folder / name).write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
            with pytest.raises(errors.CorruptFileError) as caught:
                lightrm.load(folder)
            assert str(caught.value).startswith(str(folder / name)), (name, at, caught.value)
        (folder / name).write_bytes(content)
    assert lightrm.load(folder).score_ids(IDS).shape == (3,)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("config.json", "num_hidden_layers", 1),
        ("config.json", "num_attention_heads", 2),
        ("config.json", "intermediate_size", 40),
        ("config.json", "rms_norm_eps", 1e-5),
        ("tokenizer_config.json", "chat_template", "{{ messages[0].content }}"),
        (quantized_folder.MANIFEST, "template", "ziya"),
        (quantized_folder.MANIFEST, "head", {"mean": 0.0, "std": 1.0, "negate": True}),
        (quantized_folder.MANIFEST, "bytes", 5),
        (quantized_folder.MANIFEST, "format", 3),
        (quantized_folder.MANIFEST, SEAL, None),
    ],
)
def test_an_edit_of_a_folder_is_refused(name: str, field: str, value: object, tmp_path: Path) -> None:
    folder = small(tmp_path)
    raw = json.loads((folder / name).read_text())
    if name == quantized_folder.MANIFEST:
        (folder / name).write_text(json.dumps(raw, indent=2))
        lightrm.load(folder)  # how it is written does not matter, what it says does
    (folder / name).write_text(json.dumps(raw | {field: value}))
    with pytest.raises(errors.CorruptFileError, match=rf"{name} was altered"):
        lightrm.load(folder)


def test_a_file_more_or_less_is_refused(tmp_path: Path) -> None:
    folder = small(tmp_path)
    (folder / "README.md").write_text("a card")
    lightrm.load(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(errors.CorruptFileError, match=r"tokenizer\.json is not a file of this folder"):
        lightrm.load(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(errors.CorruptFileError, match=r"chat_template\.jinja is missing"):
        lightrm.load(folder)


def test_swapped_and_turned_tensors_are_seen(tmp_path: Path) -> None:
    """What a sum of words lets pass: halves of a matrix swapped, two matrices swapped, another dtype."""
    folder = small(tmp_path)
    path = folder / quantized_folder.WEIGHTS
    tensors = load(path.read_bytes())
    first, second = "layers.0.qkv.values", "layers.1.qkv.values"
    for change in (
        {first: tensors[first].roll(8, 1)},
        {first: tensors[second], second: tensors[first]},
        {first: tensors[first].view(torch.uint8)},
        {"head.0.weight": tensors["head.0.weight"].roll(2, 1)},
    ):
        write_safetensors(path, tensors | change)
        with pytest.raises(errors.CorruptFileError, match=r"lightrm\.safetensors: .* was altered"):
            lightrm.load(folder)
    write_safetensors(path, tensors)
    lightrm.load(folder)


def resealed(folder: Path, **changes: object) -> Path:
    """The folder with other fields in its config.json, and checksums that fit, as a stranger could make it."""
    config, manifest = folder / "config.json", folder / quantized_folder.MANIFEST
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    raw = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(sealed(raw | {"files": raw["files"] | {"config.json": file_sum(config)}})))
    return folder


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
@pytest.mark.parametrize(
    "changes",
    [{"num_hidden_layers": 1}, {"num_key_value_heads": 4}, {"intermediate_size": 40}, {"hidden_size": 64}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_config_of_another_model_under_checksums_that_fit(
    scheme: str, changes: dict[str, int], tmp_path: Path
) -> None:
    folder = small(tmp_path, scheme)
    lightrm.load(resealed(folder))
    with pytest.raises(errors.CorruptFileError, match=r"is not of the model in config\.json"):
        lightrm.load(resealed(folder, **changes))


def test_a_folder_of_an_older_format(tmp_path: Path) -> None:
    folder = small(tmp_path)
    raw = json.loads((folder / quantized_folder.MANIFEST).read_text())
    del raw[SEAL]
    (folder / quantized_folder.MANIFEST).write_text(json.dumps(raw | {"format": 3}))
    with pytest.raises(errors.CorruptFileError, match="in format 3, this version reads format 4: quantize its source"):
        lightrm.load(folder)


def test_a_file_cut_while_its_model_is_in_use(tmp_path: Path) -> None:
    """A mapped file that loses its end would end the process at the first look at it."""
    folder = small(tmp_path)
    rm = lightrm.load(folder)
    beside = lightrm.load(folder, beside=rm)
    fresh = lightrm.load(tmp_path / "source", scheme="w8a8", beside=rm)
    assert fresh.report.shared
    rm.score_ids(IDS)
    size = (folder / quantized_folder.WEIGHTS).stat().st_size
    os.truncate(folder / quantized_folder.WEIGHTS, 4096)
    for model in (rm, beside, fresh):
        with pytest.raises(errors.CorruptFileError, match=rf"it had {size} bytes and has 4096\): load the model again"):
            model.score_ids(IDS)
