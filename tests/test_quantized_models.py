"""Whole models in 8 and 4 bits: folding is exact, every layout loads, and the batch does not matter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import lightrm
from lightrm import errors
from lightrm.checkpoints.detect import open_checkpoint
from lightrm.engine.packing import pack
from lightrm.loading.folding import Folding
from lightrm.loading.loader import Loader
from lightrm.loading.placement import Placement
from lightrm.schemes.grammar import parse_scheme
from tests.zoo import LLAMA_CONFIG, WIDTH, Specimen, llama_weights, normal, specimens

IDS = [[5, 9, 33, 71, 2], [1, 2], list(range(3, 90)), [7] * 40]
FLOAT = parse_scheme("fp32", torch.device("cpu"))


def folded_in_float(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Scores in fp32 as they are, and with norms and rotations folded into the weights."""
    results = []
    for fold in (False, True):
        loader = Loader(open_checkpoint(folder), Placement(FLOAT, torch.device("cpu")))
        loader.folding = Folding(loader.architecture) if fold else None
        decoder, head, _ = loader.load()
        decoder.embedding_VD = decoder.embedding_VD if not fold else exact_embedding(loader)
        results.append(head(decoder.last_hidden(pack(IDS))).numpy())
    return results[0], results[1]


def exact_embedding(loader: Loader) -> torch.Tensor:
    assert loader.folding is not None
    return loader.folding.embedding(loader.checkpoint.read("embedding.weight").float())


@pytest.mark.parametrize("name", sorted(specimens()))
def test_folding_changes_nothing(name: str, tmp_path: Path) -> None:
    """In float32 the rotated model gives the scores of the original, in every layout."""
    plain, folded = folded_in_float(specimens()[name].write(tmp_path))
    np.testing.assert_allclose(folded, plain, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("family", ["qwen2", "llama with all biases", "baichuan"])
def test_folding_carries_biases_and_alibi(family: str, tmp_path: Path) -> None:
    weights, config = llama_weights() | {"score.weight": normal(1, WIDTH, seed=1)}, dict(LLAMA_CONFIG)
    if family == "baichuan":  # 13B: W_pack and ALiBi
        config = {k: v for k, v in config.items() if k not in ("num_key_value_heads", "max_position_embeddings")}
        config |= {"model_type": "baichuan", "model_max_length": 256}
        weights = {
            n: w for n, w in weights.items() if not n.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
        }
        for i in range(2):
            weights[f"model.layers.{i}.self_attn.W_pack.weight"] = normal(3 * WIDTH, WIDTH, seed=40 + i)
    else:
        config |= {"model_type": "qwen2"} if family == "qwen2" else {"attention_bias": True}
        parts = ("q_proj", "k_proj", "v_proj") + (("o_proj",) if family != "qwen2" else ())
        for i in range(2):
            for k, part in enumerate(parts):
                rows = len(weights[f"model.layers.{i}.self_attn.{part}.weight"])
                weights[f"model.layers.{i}.self_attn.{part}.bias"] = normal(rows, seed=60 + 4 * i + k)
    folder = Specimen({"model.safetensors": weights}, config).write(tmp_path)
    plain, folded = folded_in_float(folder)
    np.testing.assert_allclose(folded, plain, atol=2e-5, rtol=2e-5)
    exact = lightrm.load(folder, scheme="fp32").score_ids(IDS)
    rough = lightrm.load(folder, scheme="w8a8").score_ids(IDS)  # 32 channels of noise: int8 shows, a lost bias more so
    assert np.abs(rough - exact).max() < 0.3 * exact.std()


@pytest.mark.parametrize("name", sorted(specimens()))
def test_every_layout_in_8_and_4_bits(name: str, tmp_path: Path) -> None:
    """Tiny random models are the hardest there are; 8 bits stay close, 4 bits stay related."""
    folder = specimens()[name].write(tmp_path)
    exact = lightrm.load(folder, scheme="fp32").score_ids(IDS)
    for scheme, most in (("w8a8", 0.1), ("w4a8", 1.0), ("w4a16", 1.0)):
        rm = lightrm.load(folder, scheme=scheme)
        assert np.abs(rm.score_ids(IDS) - exact).max() < most, scheme


def test_report() -> None:
    report = lightrm.load("demo", scheme="w8a8").report
    assert {name.rpartition(".")[2] for name in report.sqnr_db} == {"embedding", "qkv", "output", "gate_up", "down"}
    assert len(report.sqnr_db) == 5 * 4 + 1
    assert report.worst is not None
    assert report.worst[1] > 40
    assert "least SQNR 4" in str(report)
    assert "int8 products" in str(report)
    exact = lightrm.load("demo", scheme="fp32").report
    assert exact.worst is None
    four = lightrm.load("demo", scheme="w4a8").report
    assert four.bytes < 0.75 * report.bytes
    assert 19 < min(db for name, db in four.sqnr_db.items() if name != "embedding") < 21


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_the_batch_does_not_matter_bit_for_bit(scheme: str) -> None:
    """Alone, together, reversed, and under other budgets."""
    rm = lightrm.load("demo", scheme=scheme)
    generator = np.random.default_rng(0)
    lengths = [1, 2, 3, 17, 64, 65, 127, 128, 200, 5, 5, 40]
    sequences = [generator.integers(3, 6000, n).tolist() for n in lengths]
    alone = np.array([rm.score_ids([ids])[0] for ids in sequences])
    for budget in (64, 4096):
        rm.token_budget = budget
        assert np.array_equal(rm.score_ids(sequences), alone), budget
        assert np.array_equal(rm.score_ids(sequences[::-1])[::-1], alone), budget


def test_threads_do_not_matter() -> None:
    rm, before, found = lightrm.load("demo", scheme="w4a8"), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(rm.score_ids([list(range(3, 300)), [5] * 70]))
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(*found)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "fp32"])
def test_overflow_names_the_layer(scheme: str, tmp_path: Path) -> None:
    weights = llama_weights()
    for name in ("gate_proj", "up_proj", "down_proj"):
        weights[f"model.layers.1.mlp.{name}.weight"] *= 1e25
    folder = Specimen({"model.safetensors": weights | {"score.weight": normal(1, WIDTH, seed=1)}}, LLAMA_CONFIG).write(
        tmp_path
    )
    with pytest.raises(errors.NumericsError, match=r"activations overflow in layers\.1\.mlp under " + scheme):
        lightrm.load(folder, scheme=scheme).score_ids([[5, 6, 7]])


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_bad_weights_name_the_tensor(scheme: str, tmp_path: Path) -> None:
    weights = llama_weights() | {"score.weight": normal(1, WIDTH, seed=1)}
    weights["model.layers.1.self_attn.k_proj.weight"][3, 4] = float("nan")
    folder = Specimen({"model.safetensors": weights}, LLAMA_CONFIG).write(tmp_path)
    with pytest.raises(errors.NumericsError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight holds 1 NaN"):
        lightrm.load(folder, scheme=scheme)


def test_a_model_without_power_of_two_groups_says_so(tmp_path: Path) -> None:
    config = {**LLAMA_CONFIG, "intermediate_size": 50}
    weights = llama_weights() | {"score.weight": normal(1, WIDTH, seed=1)}
    for i in range(2):
        for name, shape in (("gate_proj", (50, WIDTH)), ("up_proj", (50, WIDTH)), ("down_proj", (WIDTH, 50))):
            weights[f"model.layers.{i}.mlp.{name}.weight"] = normal(*shape, seed=i)
    folder = Specimen({"model.safetensors": weights}, config).write(tmp_path)
    with pytest.raises(errors.SchemeError, match="none divides 50: use w8a8"):
        lightrm.load(folder, scheme="w4a8")
    assert np.isfinite(lightrm.load(folder, scheme="w8a8").score_ids([[1, 2]])).all()


MEASURE = """
import json, sys
import torch, lightrm
from lightrm.schemes.int8 import quantize_rows
lightrm.load(sys.argv[3], scheme=sys.argv[2])           # everything that is imported or compiled once
def peak():  # of this process alone: ru_maxrss would start at what the parent had in memory
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
rm = lightrm.load(sys.argv[1], scheme=sys.argv[2])
print(json.dumps([peak() - before, rm.report.bytes]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize(  # each pair of file, dtype and scheme once
    ("file", "dtype", "scheme"),
    [
        ("model.safetensors", torch.float32, "w8a8"),
        ("model.safetensors", torch.float16, "w4a8"),
        ("pytorch_model.bin", torch.float32, "w4a8"),
        ("pytorch_model.bin", torch.float16, "w8a8"),
    ],
)
def test_loading_never_holds_the_whole_model(file: str, dtype: torch.dtype, scheme: str, tmp_path: Path) -> None:
    """Peak memory of the process grows by at most the packed model and 1.5 x the largest tensor of the file."""
    width, ffn, layers = 1024, 2816, 4
    config = {**LLAMA_CONFIG, "hidden_size": width, "intermediate_size": ffn, "num_hidden_layers": layers}
    config |= {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 2000}
    shapes = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (width, width)}
    shapes |= {"self_attn.v_proj": (width, width), "self_attn.o_proj": (width, width)}
    shapes |= {"mlp.gate_proj": (ffn, width), "mlp.up_proj": (ffn, width), "mlp.down_proj": (width, ffn)}
    weights = {"model.embed_tokens.weight": torch.randn(2000, width), "model.norm.weight": torch.ones(width)}
    weights["score.weight"] = torch.randn(1, width)
    for i in range(layers):
        prefix = f"model.layers.{i}."
        weights |= {f"{prefix}{name}.weight": 0.02 * torch.randn(shape) for name, shape in shapes.items()}
        weights |= {f"{prefix}{n}.weight": torch.ones(width) for n in ("input_layernorm", "post_attention_layernorm")}
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    big = Specimen({file: weights}, config).write(tmp_path / "big")
    small = Specimen({file: llama_weights() | {"score.weight": normal(1, WIDTH, seed=1)}}, LLAMA_CONFIG).write(
        tmp_path / "small"
    )
    largest = max(tensor.nbytes for tensor in weights.values())
    whole = sum(tensor.nbytes for tensor in weights.values())
    program = [sys.executable, "-c", MEASURE, str(big), scheme, str(small)]
    # glibc keeps freed blocks of up to 32 MiB for itself; here they go back at once, so that what is held can be seen.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    grown, held = json.loads(done.stdout)
    slack = 24 * 2**20  # allocator and thread buffers, which do not grow with the model
    assert held + 1.5 * largest + slack < 0.9 * (held + whole), "the bound would not notice a loader that keeps all"
    assert grown <= held + 1.5 * largest + slack, f"{grown >> 20} MiB for {held >> 20} + 1.5 x {largest >> 20} MiB"
