"""`lightrm inspect HUB_ID`: a hub on this machine serves the files, and counts what is read of the weights."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from huggingface_hub import constants
from safetensors.torch import load_file

from lightrm.cli import main
from tests.hub_server import HubAnswer
from tests.test_chat import LLAMA3
from tests.test_templated import write_model
from tests.zoo import write_weights

SHA = "0123456789abcdef0123456789abcdef01234567"
LISTED = re.compile(r"/api/models/([\w-]+/[\w-]+)(/tree)?")
RESOLVED = re.compile(r"/(\w+/[\w-]+)/resolve/\w+/(.+)")


class Hub(ThreadingHTTPServer):
    """folders: of each repository. served: bytes sent of each file."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folders: dict[str, Path] = {}
        self.served: Counter[str] = Counter()


class Answer(HubAnswer):
    """The three requests that huggingface-hub makes: what a repository holds, a file's state, a file or a range of
    it."""

    server: Hub

    def answer(self, body: bool) -> None:
        about = LISTED.match(self.path)
        if about and about[1] in self.server.folders:
            folder = self.server.folders[about[1]]
            files = [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in folder.rglob("*.*")]
            told: Any = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in files]
            if not about[2]:
                told = {"id": about[1], "sha": SHA, "siblings": [{"rfilename": name, "size": n} for name, n in files]}
            self.send(200, json.dumps(told).encode(), {}, body)
            return
        match = RESOLVED.fullmatch(self.path.partition("?")[0])
        path = self.server.folders[match[1]] / match[2] if match and match[1] in self.server.folders else None
        if path is None or not path.is_file():
            self.send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
            return
        content = path.read_bytes()
        status, part = 200, content
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            status, part = 206, content[int(wanted[1]) : int(wanted[2]) + 1]
        self.server.served[path.name] += len(part) * body
        self.send(status, part, {"ETag": f'"{path.name}"', "X-Repo-Commit": SHA}, body)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def told(*command: str) -> dict[str, str]:
    result = inspect(*command)
    assert result.exit_code == 0, result.output
    pairs = (re.split(r" {2,}", line.strip(" │"), maxsplit=1) for line in result.output.splitlines())
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def inspect(*command: str) -> Result:
    return CliRunner().invoke(main, ["inspect", *command], env={"COLUMNS": "4000"})


def sharded(folder: Path, ending: str) -> Path:
    """The same model in two shards with an index."""
    whole = next(path for path in folder.iterdir() if path.name.startswith(("model.", "pytorch_model.")))
    weights = load_file(whole)
    whole.unlink()
    stem = "model" if ending == "safetensors" else "pytorch_model"
    places = {name: f"{stem}-0000{1 + k % 2}-of-00002.{ending}" for k, name in enumerate(sorted(weights))}
    for file in {*places.values()}:
        write_weights(folder / file, {name: weights[name] for name in places if places[name] == file})
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def test_shapes_come_from_headers(hub: Hub, tmp_path: Path) -> None:
    """In shards with another copy of the weights beside them: all lines are those of the folder itself."""
    folder = sharded(write_model(tmp_path / "model", LLAMA3), "safetensors")
    (folder / "consolidated.safetensors").write_bytes(b"never asked for")
    (folder / "model-00001-of-00002.safetensors").open("ab").close()
    hub.folders["owner/name"] = folder
    found, here = told("owner/name"), told(str(folder))
    assert found.pop("fetched") == "owner/name at 0123456: config, tokenizer and headers, no weights"
    assert here.pop("folder") == str(folder)
    assert found == here
    assert found["head"] == "score.weight (1, 32)"
    assert found["template"] == "chat"
    assert found["models"].startswith("Skywork-Reward, ")
    assert not hub.served["consolidated.safetensors"]
    assert not [*(tmp_path / "cache").rglob("*.safetensors")]


def test_no_more_than_the_header_is_read(hub: Hub, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", LLAMA3)
    weights = {"model.embed_tokens.weight": torch.zeros(40_000, 32)}
    (path,) = folder.glob("model.safetensors")
    write_weights(path, load_file(path) | weights)
    hub.folders["owner/large"] = folder
    assert told("owner/large")["in memory"] == told(str(folder))["in memory"], "the rows that the file has"
    assert 0 < hub.served[path.name] < 110_000 < path.stat().st_size


def test_pickles_give_names_without_shapes(hub: Hub, tmp_path: Path) -> None:
    folder = sharded(write_model(tmp_path / "model", LLAMA3), "bin")
    hub.folders["owner/pickles"] = folder
    found = told("owner/pickles")
    assert found["head"] == "score.weight of unknown shape"
    assert {name: found[name] for name in ("layout", "read at", "on disk")} == {
        name: value for name, value in told(str(folder)).items() if name in ("layout", "read at", "on disk")
    }
    assert not [name for name in hub.served if name.endswith("2.bin")]


def test_one_pickle_without_an_index(hub: Hub, tmp_path: Path) -> None:
    """Its names stand in the weights; --weights fetches them."""
    folder = write_model(tmp_path / "model", LLAMA3)
    write_weights(folder / "pytorch_model.bin", load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    hub.folders["owner/one"] = folder
    refused = inspect("owner/one")
    assert refused.exit_code == 1
    assert "holds pytorch_model.bin and no index" in " ".join(refused.output.split())
    assert told("owner/one", "--weights")["head"] == "score.weight (1, 32)"


def test_an_adapter_and_its_base(hub: Hub, tmp_path: Path) -> None:
    hub.folders["owner/base"] = sharded(write_model(tmp_path / "base", LLAMA3), "safetensors")
    hub.folders["owner/adapter"] = folder = tmp_path / "adapter"
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "owner/base", "revision": None}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    halves = {f"{stem}.lora_A.weight": torch.zeros(4, 32), f"{stem}.lora_B.weight": torch.zeros(32, 4)}
    write_weights(folder / "adapter_model.safetensors", halves)
    found = told("owner/adapter")
    assert found["adapter"].startswith("LoRA on ")
    assert found["adapter"] == "LoRA on 1 weights of owner/base"
    assert found["head"] == "score.weight (1, 32)"
    assert found["template"] == "chat"


def test_what_is_not_on_the_hub(hub: Hub) -> None:
    refused = inspect("owner/gone")
    assert refused.exit_code == 1
    assert "owner/gone is not a folder here, is not in the cache" in " ".join(refused.output.split())
