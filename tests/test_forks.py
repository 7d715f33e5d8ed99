"""Processes forked off one with a model score, by one thread, where OpenMP would wait for its threads for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.test_scoring import write_model

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")

PROGRAM = """
import json, multiprocessing, os, sys, threading, warnings
import numpy as np, torch
import lightrm
from lightrm.engine.residence import Residence

warnings.simplefilter("ignore")  # Python's own, of forks and threads
IDS = [[1, *range(3, 3 + n)] for n in (5, 90, 40)]
folder = sys.argv[1]

def model(scheme):
    return lightrm.load(folder, scheme=scheme, token_budget=50)

def scores(rm):
    return rm.score_ids(IDS).tolist()

def in_fork(work):
    # What work() returns in a forked child, or how the child ended.
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            said = json.dumps(work())
        except BaseException as error:
            said = json.dumps(repr(error))
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        said = pipe.read()
    status = os.waitpid(child, 0)[1]
    return json.loads(said) if said else f"ended with status {status}"

def large():  # PyTorch's own threads
    return float((torch.ones(600, 600) @ torch.ones(600, 600)).sum() + torch.ones(3000, 3000).sum())

models = {scheme: model(scheme) for scheme in ("w8a8", "w4a8", "fp32")}
before = {scheme: scores(rm) for scheme, rm in models.items()}
large()
rm = models["w8a8"]

def busy(stop):
    while not stop.is_set():
        rm.score_ids(IDS)

def while_another_scores():
    # Locks stand as the other thread holds them.
    stop = threading.Event()
    other = threading.Thread(target=busy, args=(stop,))
    other.start()
    found = [in_fork(lambda: scores(rm)) for _ in range(2)]
    stop.set()
    other.join()
    return found

class Answers(torch.utils.data.Dataset):
    def __len__(self):
        return len(IDS)
    def __getitem__(self, k):
        return float(rm.score_ids([IDS[k]])[0])

def one(ids):
    return float(rm.score_ids([ids])[0])

def with_workers():
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(one, IDS)

def from_loader():
    loader = torch.utils.data.DataLoader(Answers(), num_workers=2, batch_size=None, multiprocessing_context="fork")
    return list(loader)

def streamed():
    from lightrm.loading import sources
    sources.choose_residence = lambda *a, **k: Residence(tokens=50, window=130, room=2**30, bytes=0, reason="so")
    rm = model("w8a8")
    return [scores(rm), in_fork(lambda: scores(rm))]

print(json.dumps({
    "before": before,
    "threads": [torch.get_num_threads(), in_fork(torch.get_num_threads)],
    "child": {scheme: in_fork(lambda rm=rm: scores(rm)) for scheme, rm in models.items()},
    "child of a child": in_fork(lambda: in_fork(lambda: scores(rm))),
    "loads": in_fork(lambda: scores(model("w8a8"))),
    "reference": in_fork(lambda: [r.index for r in rm.rank("what?", ["a", "b c"], exact=True, bound=1e9)]),
    "pytorch": [large(), in_fork(large)],
    "busy": while_another_scores(),
    "pool": with_workers(),
    "loader": from_loader(),
    "streamed": streamed(),
    "after": {scheme: scores(rm) for scheme, rm in models.items()},
}))
"""


def test_forked_processes_score(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    environment = os.environ | {"OMP_NUM_THREADS": "2", "NUMBA_NUM_THREADS": "2"}
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    before = found["before"]
    assert found["after"] == before, "the parent is none the worse"
    assert found["threads"] == [2, 1]
    for scheme in ("w8a8", "w4a8"):
        assert found["child"][scheme] == before[scheme], "whole numbers do not depend on threads"
    np.testing.assert_allclose(found["child"]["fp32"], before["fp32"], atol=1e-5)
    assert found["child of a child"] == found["loads"] == before["w8a8"]
    assert sorted(found["reference"]) == [0, 1]
    assert found["pytorch"][0] == found["pytorch"][1]
    assert found["busy"] == [before["w8a8"]] * 2
    assert found["pool"] == found["loader"] == before["w8a8"]
    assert found["streamed"] == [before["w8a8"]] * 2
