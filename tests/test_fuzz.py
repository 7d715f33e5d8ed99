"""Any change to any file of a model's folder gives the same scores, or a LightRMError; finite ones where none can tell.

A folder of ours and the records of a `.bin` file are under checksums: there, other scores are a failure too.
"""

from __future__ import annotations

import json
import random
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lightrm
from lightrm.cli import main
from tests import mutations

LONGEST = 30  # seconds; most take a twentieth of one
OURS = ("w8a8", "w4a8")


class HangError(BaseException):
    """No except clause of the library takes it."""


@contextmanager
def bounded() -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, LONGEST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[mutations.Files, np.ndarray]]]:
    """Of each kind: its files and its scores."""
    target = tmp_path_factory.mktemp("sound")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTRM_CACHE", str(target / "cache"))  # where the tokenizers of GGUF files are written
        yield {kind: (mutations.read(path), scores(path)) for kind, path in mutations.folders(target).items()}


def scores(folder: Path) -> np.ndarray:
    """Of ids, and of text where there is some."""
    rm = lightrm.load(folder)
    found = rm.score_ids(mutations.IDS)
    return found if rm.template is None else np.concatenate([found, rm.score(*mutations.TEXT)])


def outcome(folder: Path, kind: str, name: str, expected: np.ndarray) -> str:
    """What became of a folder with one file changed; "" where nothing may be said against it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with bounded():
                found = scores(folder)
        except lightrm.LightRMError as error:
            named = kind not in OURS or str(error).startswith(str(folder / name))
            return "" if named else f"{type(error).__name__} names another file: {error}"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            return f"{type(error).__name__}: {error}"
    if not np.isfinite(found).all():
        return f"scores {found}"
    checked = kind in OURS or name.endswith(".bin")
    return f"scores {found}, not {expected}" if checked and not np.array_equal(found, expected) else ""


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(draw=st.randoms(use_true_random=False), data=st.data())
def test_one_change(
    draw: random.Random,
    data: st.DataObject,
    sound: dict[str, tuple[mutations.Files, np.ndarray]],
    tmp_path_factory: pytest.TempPathFactory,
    capfd: pytest.CaptureFixture[str],
) -> None:
    kind = data.draw(st.sampled_from(sorted(sound)))
    files, expected = sound[kind]
    changed, name, way = mutations.mutated(files, draw)
    folder = tmp_path_factory.mktemp("changed")
    mutations.write(folder, changed)
    assert outcome(folder, kind, name, expected) == "", (kind, name, way)
    assert "code of a checkpoint ran" not in capfd.readouterr().out


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(draw=st.randoms(use_true_random=False), data=st.data())
def test_the_command_line_says_it_in_a_sentence(
    draw: random.Random,
    data: st.DataObject,
    sound: dict[str, tuple[mutations.Files, np.ndarray]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    kind = data.draw(st.sampled_from(sorted(sound)))
    folder = tmp_path_factory.mktemp("changed")
    changed, name, way = mutations.mutated(sound[kind][0], draw)
    mutations.write(folder, changed)
    records = folder.parent / "records.jsonl"
    records.write_text(json.dumps({"prompt": mutations.TEXT[0], "responses": mutations.TEXT[1]}) + "\n")
    command = data.draw(
        st.sampled_from((["inspect"], ["plan", "--memory", "1GiB"], ["score", str(records), "--quiet", "--model"]))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with bounded():
            done = CliRunner().invoke(main, [*command, str(folder)])
    assert done.exit_code in (0, 1), (kind, name, way, done.output, done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit), (kind, name, way, done.exc_info)
    assert "Traceback" not in done.output
