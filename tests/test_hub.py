"""Hub ids: the cache is used offline, only needed files are fetched, and no network is a clear error."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

import lightrm
from lightrm.checkpoints import hub
from tests.zoo import specimens

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_cached_snapshot_is_used_offline(cache: Path) -> None:
    repo = cache / "models--owner--name"
    folder = specimens()["ziya"].write(repo / "snapshots" / SHA)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(SHA)
    assert hub.resolve("owner/name") == folder
    assert hub.resolve("owner/name", revision=SHA) == folder
    assert lightrm.load("owner/name").score_ids([[1, 2]]) == lightrm.load(folder).score_ids([[1, 2]])
    with pytest.raises(lightrm.CheckpointError, match="owner/name at revision other"):
        hub.resolve("owner/name", revision="other")


def test_no_network_and_no_cache(cache: Path) -> None:
    with pytest.raises(
        lightrm.CheckpointError, match=r"owner/gone is not a folder here, is not in the cache.*check the name"
    ):
        lightrm.load("owner/gone")


@pytest.mark.parametrize("name", ["", "x" * 5000, "长" * 200, "~nobody-of-this-name/x", "a\0b", "owner/" + "x" * 300])
def test_names_that_no_folder_can_have(name: str, cache: Path) -> None:
    for find in (hub.resolve, hub.resolve_config):
        with pytest.raises(lightrm.CheckpointError):
            find(name)


def test_only_needed_files_are_wanted() -> None:
    both = [
        "config.json",
        "README.md",
        "model-00001-of-00002.safetensors",
        "pytorch_model-00001-of-00002.bin",
        "tokenizer.model",
    ]
    assert "model-00001-of-00002.safetensors" in hub.wanted(both)
    assert not any(name.endswith(".bin") for name in hub.wanted(both))
    pickles = ["pytorch_model.bin", "training_args.bin", "value_head.bin", "modeling_llama_rm.py", "onnx/model.bin"]
    assert "pytorch_model.bin" in hub.wanted(pickles)
    assert not {"training_args.bin", "modeling_llama_rm.py", "onnx/model.bin"} & set(hub.wanted(pickles))
    assert "value_head.*" in hub.wanted(pickles)
    assert {"tokenizer.model", "merges.txt", "vocab.json", "tiktoken.model"} <= set(hub.wanted(pickles))
