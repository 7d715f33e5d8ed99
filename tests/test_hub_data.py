"""Data sets on the hub, which a server on this machine plays: which files are fetched, and what is said otherwise."""

from __future__ import annotations

import gzip
import json
import re
import threading
import zlib
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants

import lightrm
from lightrm.cli import main
from lightrm.data.data_source import source_of
from lightrm.data.hub_data import hub_files
from lightrm.data.hub_splits import by_names, chosen_files, matching
from lightrm.errors import InputError
from tests.hub_server import HubAnswer
from tests.test_scoring import write_model

SHA, OLD, COPY = "0123456789abcdef" * 2 + "01234567", "a" * 40, "c" * 40
LISTED = re.compile(r"/api/datasets/([\w-]+/[\w-]+)(?:/revision/([^?]+))?(?:\?.*)?")
RESOLVED = re.compile(r"/datasets/([\w-]+/[\w-]+)/resolve/(refs/convert/parquet|[^/]+)/(.+)")
CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: data/test.jsonl.gz
- config_name: edits
  data_files: edits/*.csv
---
# A card
"""


class Hub(ThreadingHTTPServer):
    """held: files of each repository at each commit. names: what a revision stands for. fetched: paths, in order."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.held: dict[tuple[str, str], dict[str, bytes]] = {}
        self.names = {"main": SHA, "v1": OLD, "refs/convert/parquet": COPY, SHA: SHA, OLD: OLD, COPY: COPY}
        self.fetched: list[str] = []


class Answer(HubAnswer):
    """The requests that huggingface-hub makes: what a data set holds at a revision, a file's state, a file."""

    server: Hub

    def answer(self, body: bool) -> None:
        path = self.path.replace("%2F", "/")
        if about := LISTED.fullmatch(path):
            commit = self.server.names.get(about[2] or "main", "")
            files = self.server.held.get((about[1], commit))
            if files is None:
                code = "RevisionNotFound" if (about[1], SHA) in self.server.held else "RepoNotFound"
                self.send(404, b"", {"X-Error-Code": code}, body)
                return
            told = {"id": about[1], "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            self.send(200, json.dumps(told).encode(), {}, body)
            return
        found = RESOLVED.fullmatch(path.partition("?")[0])
        content = None
        if found:
            content = self.server.held.get((found[1], self.server.names.get(found[2], "")), {}).get(found[3])
        if found is None or content is None:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
            return
        if body:
            self.server.fetched.append(found[3])
        commit = self.server.names[found[2]]
        about_file = {"ETag": f'"{zlib.crc32(content):x}"', "X-Repo-Commit": commit}
        self.send(200, content, about_file, body)


def lines(*records: Any) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def pair(k: int) -> dict[str, str]:
    return {"prompt": f"prompt {k}", "chosen": "it is", "rejected": "no"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    server = Hub()
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([pair(8), pair(9)]), table)
    server.held = {
        ("owner/pairs", SHA): {
            "README.md": CARD.encode(), ".gitattributes": b"", "data/train-0.jsonl": lines(pair(0), pair(1)),
            "data/train-1.jsonl": lines(pair(2)), "data/test.jsonl.gz": gzip.compress(lines(pair(3))),
            "edits/a.csv": b"prompt,chosen,rejected\nx,it is,no\n", "script.py": b"raise SystemExit",
        },
        ("owner/pairs", OLD): {"data/train-0.jsonl": lines(pair(7))},
        ("owner/pairs", COPY): {"default/train/0000.parquet": table.getvalue()},
        ("owner/bare", SHA): {"questions_dev.json": lines(pair(4)), "questions_train.json": lines(pair(5))},
        ("owner/odd", SHA): {"train.csv": b"prompt,response\nx,y\n", "train.jsonl": lines(pair(6)), "setup.py": b""},
        ("owner/code", SHA): {"code.py": b"raise SystemExit", "dataset_infos.json": b"{}"},
    }  # fmt: skip
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def prompts(address: str, **options: Any) -> list[str]:
    return [row.record["prompt"] for row in source_of(address, **options).rows()]


PAIRS = "hf://datasets/owner/pairs"


def test_addresses(hub: Hub) -> None:
    assert prompts(f"{PAIRS}/data/train-1.jsonl") == ["prompt 2"]
    assert hub.fetched == ["data/train-1.jsonl"], "and nothing else"
    assert prompts(f"{PAIRS}/data/*.jsonl") == ["prompt 0", "prompt 1", "prompt 2"]
    assert prompts(f"{PAIRS}@v1/data/train-0.jsonl") == ["prompt 7"]
    assert prompts(f"{PAIRS}@{OLD}/**/*.jsonl") == ["prompt 7"]
    assert (
        prompts(f"{PAIRS}@~parquet")
        == prompts(f"{PAIRS}@refs/convert/parquet/default/train")
        == ["prompt 8", "prompt 9"]
    )
    assert prompts(f"{PAIRS}@refs%2Fconvert%2Fparquet/default/train/0000.parquet") == ["prompt 8", "prompt 9"]
    assert prompts(f"{PAIRS}/edits") == ["x"], "a folder"
    assert hub_files(f"{PAIRS}/edits/a.csv").commit == SHA
    for address in ("hf://owner/pairs", "hf://models/owner/pairs", "hf://datasets/", "hf://datasets/a b/c"):
        with pytest.raises(InputError, match="expected hf://datasets/owner/name"):
            hub_files(address)
    with pytest.raises(
        InputError, match=r"owner/pairs has no file 'gone.jsonl': it holds .gitattributes, README.md, data"
    ):
        hub_files(f"{PAIRS}/gone.jsonl")
    with pytest.raises(InputError, match="names its files: leave out config and split"):
        hub_files(f"{PAIRS}/edits/a.csv", split="train")


def test_splits_and_configurations(hub: Hub) -> None:
    assert prompts(PAIRS, split="train") == ["prompt 0", "prompt 1", "prompt 2"], "shard after shard"
    assert prompts(PAIRS, config="default", split="test") == ["prompt 3"]
    assert prompts(PAIRS, config="edits") == ["x"], "one split only"
    assert source_of(PAIRS, split="train").name == "owner/pairs default/train"
    assert source_of(PAIRS, config="edits").name == "owner/pairs edits/train"
    assert prompts("hf://datasets/owner/bare", split="validation") == ["prompt 4"], "dev is another word for it"
    assert prompts("hf://datasets/owner/bare", split="dev") == ["prompt 4"]
    for options, says in (
        ({}, r"owner/pairs has the splits train, test: choose one with split= \(--split\)"),
        ({"config": "other"}, "owner/pairs has no config 'other': there are default, edits"),
        ({"split": "dev"}, "owner/pairs has no split 'dev': there are train, test"),
        ({"split": "train[:10]"}, "there are train, test; for some of the records, use --limit"),
    ):
        with pytest.raises(InputError, match=says):
            hub_files(PAIRS, **options)
    with pytest.raises(InputError, match=r"several kinds \(.csv, .jsonl\): name one, as hf://datasets/owner/odd/FILE"):
        hub_files("hf://datasets/owner/odd")
    with pytest.raises(InputError, match=r"owner/code holds no file that lightrm reads .*@~parquet"):
        hub_files("hf://datasets/owner/code")
    assert not {"script.py", "code.py", "setup.py"} & {*hub.fetched}, "no code is fetched"


def test_the_cache_serves_without_a_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = hub_files(PAIRS, split="train")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub_files(PAIRS, split="train") == first
    assert prompts(f"{PAIRS}/data/train-1.jsonl") == ["prompt 2"]
    with pytest.raises(InputError, match=r"has no file 'data/test\.jsonl\.gz'"):
        hub_files(f"{PAIRS}/data/test.jsonl.gz")
    with pytest.raises(
        InputError, match="owner/never is not in the cache and could not be fetched: OfflineModeIsEnabled"
    ):
        hub_files("hf://datasets/owner/never/x.csv")


def test_what_cannot_be_had(hub: Hub) -> None:
    for address, says in (
        (
            "hf://datasets/owner/gone",
            r"the data set owner/gone is not in the cache.*RepositoryNotFound.*check the name",
        ),
        (f"{PAIRS}@v9", r"owner/pairs at revision v9 is not.*RevisionNotFound"),
    ):
        with pytest.raises(InputError, match=says):
            hub_files(address)
    hub.held["owner/bare", SHA]["../../../../out_train.csv"] = b"prompt,response\n"
    with pytest.raises(InputError, match=r"out_train\.csv of the data set owner/bare could not be fetched: "):
        hub_files("hf://datasets/owner/bare/../../../../out_train.csv")
    hub.held["owner/pairs", SHA]["README.md"] = b"---\nconfigs: [unclosed\n---\n"
    with pytest.raises(InputError, match=r"the card of owner/pairs cannot be read: .*; name a file of it"):
        hub_files(PAIRS, split="train")


def test_rules_of_names() -> None:
    files = ["data/train-00000-of-00002.parquet", "data/raw-00000-of-00001.parquet", "a/b/c.jsonl", "c.jsonl"]
    assert matching(["data/train-*"], files) == files[:1]
    assert matching(["**/*.jsonl"], files) == ["a/b/c.jsonl", "c.jsonl"]
    assert matching(["*"], files) == ["c.jsonl"]
    assert matching(["data/**", "data/raw*"], files) == files[:2], "each once"
    assert by_names(files[:2]) == {"train": files[:1], "raw": files[1:2]}
    assert by_names(["preference/train.jsonl", "preference/validation.jsonl"]).keys() == {"train", "validation"}
    assert by_names(["default/partial-train/0000.parquet"]) == {"train": ["default/partial-train/0000.parquet"]}
    assert by_names(["contest.jsonl", "latest.jsonl"]) == {"train": ["contest.jsonl", "latest.jsonl"]}, "words only"
    two = ["edit/train.jsonl", "preference/train.jsonl", "README.md"]
    assert chosen_files("o/n", two, {}, "edit", None).files == ("edit/train.jsonl",)
    with pytest.raises(InputError, match="has the configs edit, preference: choose one"):
        chosen_files("o/n", two, {}, None, "train")
    for data_files in ("*.jsonl", ["*.jsonl"], {"train": "*.jsonl"}, [{"split": "train", "path": ["*.jsonl"]}]):
        card = {"configs": [{"config_name": "x", "data_files": data_files, "data_dir": "edit"}]}
        assert chosen_files("o/n", two, card, None, "train").files == ("edit/train.jsonl",)
    with pytest.raises(InputError, match="split 'test' of o/n has no file here"):
        chosen_files("o/n", two, {"configs": [{"data_files": {"test": "gone*"}}]}, None, None)
    for odd in ({"configs": 3}, {"configs": [3]}, {"configs": [{"config_name": 3}]}):
        assert chosen_files("o/n", two[:1], odd, None, None).files == ("edit/train.jsonl",)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments, "--quiet"])


def test_commands(hub: Hub, tmp_path: Path) -> None:
    """Score, evaluate, fidelity and calibration by address and by --dataset; a job knows the commit."""
    folder = str(write_model(tmp_path / "model"))
    rm = lightrm.load(folder)
    wanted = rm.score("prompt 3", ["it is", "no"]).tolist()
    for where in (["hf://datasets/owner/pairs/data/test.jsonl.gz"], ["--dataset", "owner/pairs", "--split", "test"]):
        result = run("score", *where, "-m", folder)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["scores"] == pytest.approx(wanted, abs=1e-5)
        data = where if where[0] == "--dataset" else ["--data", *where]
        told = run("evaluate", folder, *data, "--json")
        assert told.exit_code == 0, told.output
        assert json.loads(told.stdout)["eval_accuracy"] == float(wanted[0] > wanted[1])
    found = run("evaluate", folder, "--dataset", "owner/pairs@v1")
    assert "1 pairs of 1 prompts of owner/pairs train" in " ".join(found.stdout.split()), found.output
    assert lightrm.evaluate(rm, f"{PAIRS}/data/train-0.jsonl").pairs == 2
    assert len(lightrm.read_questions(f"{PAIRS}/data/train-*")) == 3
    done = run("quantize", folder, str(tmp_path / "q"), "--calibrate", f"{PAIRS}/data/train-0.jsonl", "--device", "cpu")
    assert done.exit_code == 0, done.output
    for command in (["score", "-m", folder, "in.jsonl"], ["evaluate", folder, "--data", "in.jsonl"]):
        (tmp_path / "in.jsonl").write_bytes(lines(pair(0)))
        command[-1] = str(tmp_path / "in.jsonl")
        both = run(*command, "--dataset", "owner/pairs")
        assert both.exit_code == 2
        assert "or --dataset OWNER/NAME: found both" in both.stderr
        alone = run(*command, "--split", "test")
        assert "config and split are for a data set on the hub" in alone.stderr
    assert "pass --data (a file, or hf://datasets/...) or --dataset OWNER/NAME: found neither" in run(
        "evaluate", folder
    ).stderr  # fmt: skip


def test_a_job_goes_on_with_the_same_commit_only(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightrm.jobs.job_outputs import Output

    folder, target = str(write_model(tmp_path / "model")), tmp_path / "out.jsonl"
    arguments = ("score", "--dataset", "owner/pairs", "--split", "train", "-m", folder, "-o", str(target))
    with monkeypatch.context() as patch:
        patch.setattr(Output, "write", lambda *_: 1 / 0)
        assert run(*arguments).exit_code == 1
    held = hub.held["owner/pairs", SHA]
    hub.held["owner/pairs", OLD], hub.names["main"] = held, OLD
    moved = run(*arguments)
    assert (
        f"begun with data 'owner/pairs default/train at {SHA}', now 'owner/pairs default/train at {OLD}'"
        in moved.stderr
    )
    hub.names["main"] = SHA
    assert "3 records were scored by an earlier run" in run(*arguments).stderr
    assert [json.loads(line)["prompt"] for line in target.read_text().splitlines()] == [f"prompt {k}" for k in range(3)]
