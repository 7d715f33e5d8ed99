"""Models and batches larger than the memory: streamed, halved, or refused with the numbers; never another score."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lightrm
from lightrm.architecture import Alibi, Architecture, Rope
from lightrm.checkpoints.config import read_architecture, read_config
from lightrm.engine.memory import PROCESS, Room, room_for
from lightrm.engine.residence import (
    LEAST_TOKENS,
    MOST_TOKENS,
    Residence,
    choose_residence,
    resident_bytes,
    streamed_bytes,
)
from lightrm.engine.streaming import StreamedLayers
from lightrm.loading import quantized_folder
from lightrm.model.decoder import Decoder, Flow, Layer
from lightrm.schemes.grammar import parse_scheme
from tests.conftest import DATA
from tests.test_scoring import write_model
from tests.zoo import HEAD_WEIGHT, LLAMA_CONFIG, WIDTH, Specimen, Weights, llama_weights, normal

pytestmark = pytest.mark.usefixtures("poisoned")
CPU, CARD = torch.device("cpu"), torch.device("cuda")
THIRTEEN = Architecture("baichuan", 40, 5120, 13696, 40, 40, 128, 64000, 1e-6, Alibi(), 4096)
SEVEN = Architecture("llama", 32, 4096, 11008, 32, 32, 128, 32000, 1e-6, Rope(), 4096)
IDS = [[5, 9, 33, 71, 2], [1, 2], list(range(3, 90)), [7] * 40, [7] * 30 + [4] * 9]


def given(memory: int, device: torch.device = CPU) -> Room:
    return room_for(device, memory, free=0)


@pytest.mark.parametrize(
    ("a", "scheme", "device", "memory", "streamed"),
    [
        (SEVEN, "w8a8", CPU, 16, False),
        (SEVEN, "w4a8", CPU, 8, False),
        (SEVEN, "bf16", CPU, 8, True),
        (THIRTEEN, "bf16", CPU, 16, True),
        (THIRTEEN, "fp16", CARD, 8, True),
        (THIRTEEN, "w4a8", CARD, 12, False),
    ],
)
def test_what_fits_is_resident(a: Architecture, scheme: str, device, memory: int, streamed: bool) -> None:
    found = choose_residence(a, parse_scheme(scheme, device), device, given(memory * 2**30, device))
    assert found.streamed == streamed
    assert found.bytes <= memory * 2**30
    assert (f"{memory}.0 GiB given" if found.tokens < MOST_TOKENS[device.type] else "the most that pays") in str(found)
    assert LEAST_TOKENS <= found.tokens <= MOST_TOKENS[device.type]
    if streamed:
        assert found.window >= 4096, "a layer is read once for thousands of tokens"


def test_too_little_memory_is_refused_with_the_numbers() -> None:
    scheme = parse_scheme("bf16", CPU)
    with pytest.raises(lightrm.SchemeError, match=r"resident and \d\.\d GiB streamed, and there are .* of 2\.0 GiB"):
        choose_residence(THIRTEEN, scheme, CPU, given(2**31))
    least = streamed_bytes(THIRTEEN, scheme, LEAST_TOKENS, LEAST_TOKENS)
    with pytest.raises(lightrm.SchemeError):
        choose_residence(THIRTEEN, scheme, CPU, given(least + PROCESS - 2**27), tokens=LEAST_TOKENS)
    assert choose_residence(THIRTEEN, scheme, CPU, given(least + PROCESS), tokens=LEAST_TOKENS).streamed


def test_free_memory_is_not_all_taken() -> None:
    room = room_for(CPU, None, 8 * 2**30)
    assert room.bytes < 8 * 2**30
    assert "8.0 GiB free" in str(choose_residence(SEVEN, parse_scheme("w8a8", CPU), CPU, room))


def deep(folder: Path, layers: int = 12, weights: Weights | None = None, **config: object) -> Path:
    """A tiny model with layers enough that two of them are few."""
    weights = weights or llama_weights()
    for i in range(2, layers):
        for name in [n for n in weights if n.startswith(f"model.layers.{i % 2}.")]:
            weights[name.replace(f"layers.{i % 2}.", f"layers.{i}.")] = weights[name] * 0.5
    weights |= {"value_head.weight": HEAD_WEIGHT}
    settings = {**LLAMA_CONFIG, "num_hidden_layers": layers, **config}
    return Specimen({"model.safetensors": weights}, settings).write(folder)


@pytest.fixture
def streaming(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every load streams, in windows of several packs."""

    def streamed(*_: object, **__: object) -> Residence:
        return Residence(tokens=50, window=130, room=2**30, bytes=0, reason="of the test")

    monkeypatch.setattr("lightrm.loading.sources.choose_residence", streamed)


@pytest.mark.parametrize("scheme", ["fp32", "bf16", "w8a8", "w4a8", "w4a16", "nf4"])
def test_streamed_is_the_same_model(scheme: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if scheme == "nf4":
        pytest.importorskip("bitsandbytes")
    folder = deep(tmp_path / "model")
    whole = lightrm.load(folder, scheme=scheme, token_budget=50)
    expected = whole.score_ids(IDS)
    request.getfixturevalue("streaming")
    rm = lightrm.load(folder, scheme=scheme)
    assert "layers streamed, 130 tokens at a time in packs of 50, because of the test" in repr(rm)
    assert rm.report.bytes < whole.report.bytes / 2
    for _ in range(2):  # the second pass trusts what the first has checked
        assert np.array_equal(rm.score_ids(IDS), expected)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_own_folders_stream(scheme: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source = lightrm.load(deep(tmp_path / "model"), scheme=scheme)
    source.save(tmp_path / "own")
    expected = source.score_ids(IDS)
    request.getfixturevalue("streaming")
    rm = lightrm.load(tmp_path / "own")
    assert np.array_equal(rm.score_ids(IDS), expected)
    path = tmp_path / "own" / quantized_folder.WEIGHTS
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(lightrm.CheckpointError, match="was altered"):
        lightrm.load(tmp_path / "own").score_ids(IDS)


def test_other_peoples_files_stream(request: pytest.FixtureRequest) -> None:
    for name in ("gptq-4bit-g32-asym", "baichuan-13b-value-head"):
        if not (DATA / name).is_dir():
            continue
        rm = lightrm.load(DATA / name, token_budget=50)
        ids = [[i % 200 + 3 for i in range(k, k + 20)] for k in range(9)]
        expected = rm.score_ids(ids)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "lightrm.loading.sources.choose_residence", lambda *_, **__: Residence(50, 130, 2**30, 0, "so")
            )
            assert np.array_equal(lightrm.load(DATA / name).score_ids(ids), expected), name


def test_a_bad_layer_is_named_when_it_is_reached(tmp_path: Path, streaming: None) -> None:
    weights = llama_weights()
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    rm = lightrm.load(deep(tmp_path, weights=weights), scheme="w8a8")
    for _ in range(2):
        with pytest.raises(lightrm.NumericsError, match=r"layers.1.mlp.up_proj.weight holds 1 NaN"):
            rm.score_ids(IDS)


def test_memory_chooses(tmp_path: Path) -> None:
    folder = deep(tmp_path, 40)
    a, scheme = read_architecture(read_config(folder)), parse_scheme("fp32", CPU)
    expected = lightrm.load(folder, scheme="fp32").score_ids(IDS)
    for memory, streamed in ((resident_bytes(a, scheme, 90), False), (streamed_bytes(a, scheme, 90, 200), True)):
        rm = lightrm.load(folder, scheme="fp32", memory=memory + PROCESS, token_budget=90)
        assert rm.engine.residence.streamed == streamed
        assert rm.engine.residence.bytes <= memory + PROCESS
        np.testing.assert_allclose(rm.score_ids(IDS), expected, atol=1e-5)
    with pytest.raises(lightrm.SchemeError, match=r"of 512.0 MiB given"):
        lightrm.load(folder, scheme="fp32", memory="512MiB")
    with pytest.raises(lightrm.SchemeError, match="'a lot' is not a size"):
        lightrm.load(folder, memory="a lot")


def test_at_most_two_layers_are_in_memory() -> None:
    """Also when a pass was left in the middle, and when reading fails."""
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most, fails = 0, {5}

    def make(i: int):
        nonlocal most
        if i in fails:
            raise OSError("the disk is gone")
        layer = torch.full((3,), float(i))
        alive.add(layer)
        most = max(most, len(alive))
        return layer

    layers = StreamedLayers(8, make, CPU)

    def one_pass(until: int) -> list[float]:
        found = []
        for i in range(until):
            layer = layers[i]
            found.append(float(layer[0]))
            del layer
        return found

    assert one_pass(3) == [0, 1, 2]
    with pytest.raises(OSError, match="disk"):
        one_pass(8)
    fails.clear()
    assert one_pass(8) == one_pass(len(layers)) == list(range(8))
    gc.collect()
    assert most <= 2
    with pytest.raises(IndexError):
        _ = layers[8]


@pytest.fixture
def demo() -> lightrm.RewardModel:
    return lightrm.load("demo", scheme="w8a8")


def limited(monkeypatch: pytest.MonkeyPatch, most: int, error: BaseException) -> list[int]:
    """A device that has memory for `most` tokens at once; the packs that were tried."""
    tried: list[int] = []
    real = Decoder.mlp

    def mlp(self: Decoder, layer: Layer, flow: Flow) -> None:
        rows = len(flow.residual.x_TD)
        tried.append(rows)
        if rows > most:
            raise error
        real(self, layer, flow)

    monkeypatch.setattr(Decoder, "mlp", mlp)
    return tried


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=["card", "python", "allocator"],
)
def test_packs_are_halved_where_memory_ends(demo: lightrm.RewardModel, monkeypatch, error: BaseException) -> None:
    sequences = [[k % 50 + 3] * (20 + k) for k in range(60)]
    expected = demo.score_ids(sequences)
    tried = limited(monkeypatch, 700, error)
    with pytest.warns(lightrm.MemoryWarning, match=r"ran out of memory at \d+ tokens at once") as told:
        found = demo.score_ids(sequences)
    assert len(told) == 1, "once"
    assert np.array_equal(found, expected)
    assert demo.token_budget <= 700
    tried.clear()
    assert np.array_equal(demo.score_ids(sequences), expected)
    assert max(tried) <= 700, "the lower budget stays"


def test_one_sequence_that_never_fits_is_refused(demo: lightrm.RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 100, torch.OutOfMemoryError("CUDA out of memory"))
    with (
        pytest.raises(lightrm.MemoryLimitError, match="no memory for a sequence of 150 tokens alone"),
        pytest.warns(lightrm.MemoryWarning),
    ):
        demo.score_ids([[5] * 150, [6] * 90])
    assert np.isfinite(demo.score_ids([[6] * 90])).all()


def test_other_errors_are_not_taken_for_memory(demo: lightrm.RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 10, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        demo.score_ids([[5] * 20])


def test_longer_than_the_budget(demo: lightrm.RewardModel) -> None:
    """Alone where there is room, else refused before the system ends the process."""
    expected = demo.score_ids([[5] * 300, [6] * 20])
    demo.token_budget = 64
    assert np.array_equal(demo.score_ids([[5] * 300, [6] * 20]), expected)
    demo.engine.residence = replace(demo.engine.residence, tokens=64, room=10000)
    with pytest.raises(
        lightrm.MemoryLimitError, match=r"300 tokens at once take \d+\.\d MiB .* and there are 0\.0 MiB"
    ):
        demo.score_ids([[5] * 300, [6] * 20])


@pytest.mark.parametrize("streamed", [False, True])
def test_an_interrupted_model_goes_on(streamed: bool, tmp_path: Path, monkeypatch, request) -> None:
    if streamed:
        request.getfixturevalue("streaming")
    rm = lightrm.load(deep(tmp_path), scheme="w8a8")
    expected = rm.score_ids(IDS)
    with monkeypatch.context() as patch:
        limited(patch, 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            rm.score_ids(IDS)
    assert np.array_equal(rm.score_ids(IDS), expected)


@pytest.mark.parametrize("streamed", [False, True])
def test_two_threads(streamed: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if streamed:
        request.getfixturevalue("streaming")
    rm = lightrm.load(deep(tmp_path), scheme="w8a8")
    work = [IDS[:3], IDS[2:], IDS[::-1], IDS]
    expected = [rm.score_ids(ids) for ids in work]
    wrong: list[int] = []

    def score(which: int) -> None:
        for _ in range(5):
            if not np.array_equal(rm.score_ids(work[which]), expected[which]):
                wrong.append(which)

    threads = [threading.Thread(target=score, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_results_stream_out(demo: lightrm.RewardModel) -> None:
    prompts = [f"Tell me about the number {k % 3}, please." for k in range(12)]
    answers = [f"It is {k}." * (k + 1) for k in range(12)]
    expected = demo.score_batch(prompts, answers)
    demo.token_budget = 100
    results = demo.stream(prompts, answers)
    first = next(results)
    assert expected[first[0]] == np.float32(first[1])
    assert {first[0], *(position for position, _ in results)} == set(range(12))


def baichuan(folder: Path, seed: int) -> Path:
    """The real layout: W_pack, ALiBi, a head beside the weights. Only W_pack and head follow the seed."""
    parts = ("q_proj", "k_proj", "v_proj")
    weights = {n: w for n, w in llama_weights().items() if n.split(".")[-2] not in parts}
    for i in range(2):
        weights[f"model.layers.{i}.self_attn.W_pack.weight"] = normal(3 * WIDTH, WIDTH, seed=seed + i)
    weights["v_head.summary.weight"] = normal(1, WIDTH, seed=seed + 9)
    weights["v_head.summary.bias"] = torch.zeros(1)
    config = {k: v for k, v in LLAMA_CONFIG.items() if k not in ("num_key_value_heads", "max_position_embeddings")}
    return Specimen({"model.safetensors": weights}, config | {"model_type": "baichuan", "model_max_length": 256}).write(
        folder
    )


@pytest.mark.parametrize("scheme", ["fp32", "bf16", "w8a8", "w4a8"])
@pytest.mark.parametrize("own", [False, True])
def test_two_models_of_one_base_hold_it_once(scheme: str, own: bool, tmp_path: Path) -> None:
    """The second costs its W_pack and its head; both give the scores that they give alone."""
    folders = [baichuan(tmp_path / str(seed), seed) for seed in (40, 50)]
    if own and scheme in ("w8a8", "w4a8"):
        for k, folder in enumerate(folders):
            rm = lightrm.load(folder, scheme=scheme)
            rm.save(tmp_path / f"own{k}")
            folders[k] = tmp_path / f"own{k}"
    alone = [lightrm.load(folder, scheme=scheme).score_ids(IDS) for folder in folders]
    helpful = lightrm.load(folders[0], scheme=scheme)
    safe = lightrm.load(folders[1], beside=helpful)
    assert safe.report.scheme.name == scheme, "the same, if none is asked for"
    packs = sum(safe.engine.decoder.layers[i].qkv.bytes for i in range(2))
    scales = 4 * 3 * WIDTH * 2 if scheme in ("w8a8", "w4a8") else 0
    assert safe.report.bytes - packs <= safe.report.shared <= safe.report.bytes - packs + scales
    assert "of it shared" in repr(safe)
    for i in range(2):
        mine, other = safe.engine.decoder.layers[i], helpful.engine.decoder.layers[i]
        assert mine.down is not other.down
        assert pointers(mine.down.weight) == pointers(other.down.weight)
        assert not set(pointers(mine.qkv.weight)) & set(pointers(other.qkv.weight))
    assert pointers(safe.engine.decoder.embedding_VD) == pointers(helpful.engine.decoder.embedding_VD)
    assert np.array_equal(helpful.score_ids(IDS), alone[0])
    assert np.array_equal(safe.score_ids(IDS), alone[1])


def test_the_streams_of_a_window_leave_no_holes() -> None:
    """A copy of each pack's rows in the table's own dtype, freed at once, used to cost half as much memory again."""
    made: list[int] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend([out.untyped_storage().nbytes()] if isinstance(out, torch.Tensor) else [])
            return out

    decoder = Decoder(SEVEN, normal(64, SEVEN.width, seed=1).bfloat16(), [], None, torch.float32)
    ids = torch.arange(1, 601) % 64
    with Watching():
        x_TD = decoder.embed(ids)
    assert torch.equal(x_TD, decoder.embedding_VD[ids].float())
    assert max(set(made) - {x_TD.nbytes}) <= x_TD.nbytes / 8, "only the stream itself is large"


def pointers(part: object) -> list[int]:
    if isinstance(part, torch.Tensor):
        return [part.data_ptr()]
    slots = getattr(part, "__slots__", ())
    return [p for name in slots for p in pointers(getattr(part, name))]


def test_a_stranger_beside_shares_nothing_and_is_not_counted_on(tmp_path: Path) -> None:
    """Equal shape and scheme promise nothing: where a model only fits if it shares, one that does not is refused."""
    folders = [deep(tmp_path / str(k), 40, llama_weights(seed)) for k, seed in enumerate((0, 90))]
    scheme = parse_scheme("fp32", CPU)
    a = read_architecture(read_config(folders[0]))
    small = resident_bytes(a, scheme, 90) // 3 + PROCESS  # for the activations and a copy of some of the weights
    first = lightrm.load(folders[0], scheme="fp32")
    alone = lightrm.load(folders[1], scheme="fp32").score_ids(IDS)
    with pytest.raises(lightrm.SchemeError, match=r"beside= shares .* load it without beside="):
        lightrm.load(folders[1], beside=first, memory=small, token_budget=90)
    other = lightrm.load(folders[1], beside=first)
    assert other.report.shared < other.report.bytes / 100
    assert np.array_equal(other.score_ids(IDS), alone)
    same = lightrm.load(folders[0], beside=first, memory=small, token_budget=90)
    assert same.report.shared > 0.9 * same.report.bytes
    assert not same.engine.residence.streamed


def test_calibrated_beside_another(tmp_path: Path) -> None:
    """beside= holds with calibration= too: what is equal after rounding is held once."""
    folder = write_model(tmp_path / "model")
    text = [("what?", "it is"), ("and now?", "a b c")]
    first = lightrm.load(folder, scheme="w4a8", calibration=text)
    second = lightrm.load(folder, scheme="w4a8", calibration=text, beside=first)
    assert second.report.shared == second.report.bytes
    assert np.array_equal(second.score_ids(IDS[:2]), first.score_ids(IDS[:2]))
    other = lightrm.load(folder, scheme="w4a8", calibration=text[:1], beside=first)
    expected = lightrm.load(folder, scheme="w4a8", calibration=text[:1]).score_ids(IDS[:2])
    assert 0 < other.report.shared < other.report.bytes
    assert np.array_equal(other.score_ids(IDS[:2]), expected)


def test_options_are_checked_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration text is cut at the model's positions; a bad max_length is refused before anything is rounded."""
    folder = write_model(tmp_path / "model")
    seen: list[int] = []
    monkeypatch.setattr("lightrm.loading.sources.loader_for", lambda *a: seen.extend(map(len, a[2])) or 1 / 0)
    for wrong in (4, 10**6, -1):
        with pytest.raises(lightrm.InputError, match="max_length must be between 8 and this model's"):
            lightrm.load(folder, scheme="w4a8", calibration=[("what?", "it is")], max_length=wrong)
    assert not seen
    with pytest.raises(ZeroDivisionError):
        lightrm.load(folder, scheme="w4a8", calibration=[("what?", "it is " * 3000)])
    longest = read_architecture(read_config(folder)).max_positions
    assert seen == [longest]
