"""GPTQ files that lightrm writes: the same scores when read back, the format as auto-gptq has it, nothing half done.

That auto-gptq itself computes the same from them is proven by benchmarks/gptq_files.py, whose result is committed.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import lightrm
from lightrm import errors
from lightrm.cli import main
from lightrm.files import UNFINISHED
from lightrm.loading.gptq_export import export_gptq
from lightrm.loading.gptq_rounding import compensated_grouped, factored
from lightrm.loading.symmetric import Symmetric
from lightrm.schemes import grouped
from tests.conftest import DATA
from tests.zoo import Specimen, internlm2_names, normal, prefixed

WIDTH, FFN, VOCABULARY = 64, 96, 96
GROUP = 32  # the largest power of two that divides both widths
IDS = [[5, 9, 33, 71, 2], [1, 2], list(range(3, 90))]
PROMPT, ANSWERS = "怎样才能睡得更好？", ["每天在固定的时间睡觉和起床，睡前不看手机。", "长城是中国古代的军事防御工程。"]
CONFIG = {
    "architectures": ["LlamaForSequenceClassification"], "model_type": "llama", "vocab_size": VOCABULARY,
    "hidden_size": WIDTH, "intermediate_size": FFN, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "hidden_act": "silu",
}  # fmt: skip
HEAD = normal(1, WIDTH, seed=5000)


def body(fused: bool = False) -> dict[str, torch.Tensor]:
    weights = {"model.embed_tokens.weight": normal(VOCABULARY, WIDTH, seed=0, scale=1.0)}
    weights["model.norm.weight"] = 1 + normal(WIDTH, seed=1, scale=0.1)
    kv = WIDTH if fused else WIDTH // 2
    for i in range(2):
        stem = f"model.layers.{i}."
        shapes = {
            "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (kv, WIDTH), "self_attn.v_proj": (kv, WIDTH),
            "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (FFN, WIDTH), "mlp.up_proj": (FFN, WIDTH),
            "mlp.down_proj": (WIDTH, FFN),
        }  # fmt: skip
        for k, (name, shape) in enumerate(shapes.items()):
            weights[f"{stem}{name}.weight"] = normal(*shape, seed=100 * i + k, scale=0.15)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{stem}{name}.weight"] = 1 + normal(WIDTH, seed=7, scale=0.1)
        if fused:
            qkv = [weights.pop(f"{stem}self_attn.{part}_proj.weight") for part in "qkv"]
            weights[f"{stem}self_attn.W_pack.weight"] = torch.cat(qkv)
    return weights


def is_matrix(name: str) -> bool:
    return "_proj" in name or "W_pack" in name


def test_the_demo_model_survives_the_format(tmp_path: Path) -> None:
    target = tmp_path / "gptq"
    done = CliRunner().invoke(main, ["quantize", "demo", str(target), "--format", "gptq"])
    assert done.exit_code == 0, done.output
    assert "least SQNR" in done.output
    rm = lightrm.load(target)
    assert (rm.report.scheme.name, rm.checkpoint.layout.name) == ("w4a16", "ziya")
    texts = [answer[:cut] for answer in ANSWERS for cut in range(6, 20, 2)]
    found = lightrm.load(target, scheme="fp32").score(PROMPT, texts)
    true = lightrm.load("demo", scheme="fp32").score(PROMPT, texts)
    assert np.abs(found - true).max() < 0.5 * true.std()


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a16"])
def test_interleaved_rows_are_written_as_the_file_has_them(scheme: str, tmp_path: Path) -> None:
    """InternLM2's wqkv. Its twin is a LLaMA with the same weights: the rows are rounded alike and score alike."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    theirs = {**CONFIG, **heads, "model_type": "internlm2", "bias": False, "reward_token_id": 77}
    files = {"model.safetensors": internlm2_names(body(), 2, 16) | {"v_head.weight": HEAD}}
    source = Specimen(files, theirs).write(tmp_path / "source")
    twin = Specimen({"model.safetensors": body() | {"score.weight": HEAD}}, CONFIG | heads).write(tmp_path / "twin")
    found, expected = tmp_path / "found", tmp_path / "expected"
    for folder, target in ((source, found), (twin, expected)):
        export_gptq(folder, target, scheme=scheme)
    for kept in ("fp32", "w4a16"):  # widened, and as the file has them
        ours, its = (lightrm.load(folder, scheme=kept).score_ids(IDS) for folder in (found, expected))
        assert ours.tolist() == its.tolist()
    rows = load_file(found / "model.safetensors")["model.layers.1.attention.wqkv.scales"].T
    written = load_file(expected / "model.safetensors")
    qkv = (written[f"model.layers.1.self_attn.{part}_proj.scales"].T for part in "qkv")
    assert torch.equal(rows, torch.cat([part.unflatten(0, (2, -1, 16)) for part in qkv], 1).flatten(0, 2))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scheme", ["w4a16", "w4a16-g32", "w8a16"])
def test_files_hold_what_was_rounded(fused: bool, scheme: str, tmp_path: Path) -> None:
    """The folder scores as a checkpoint with the rounded weights; all tensors but the matrices are as they were."""
    weights, config, head = body(fused), CONFIG, {"score.weight": HEAD}
    if fused:
        config = {k: v for k, v in CONFIG.items() if k not in ("num_key_value_heads", "max_position_embeddings")}
        config |= {"model_type": "baichuan", "model_max_length": 256, "architectures": ["BaichuanForCausalLM"]}
        head = {"v_head.summary.weight": HEAD, "v_head.summary.bias": torch.tensor([0.5])}
    source = Specimen({"model.safetensors": weights | head}, config).write(tmp_path / "source")
    report, bits = export_gptq(source, tmp_path / "out", scheme=scheme), int(scheme[1])
    assert report.scheme.name == scheme
    assert all(db > {4: 17, 8: 40}[bits] for db in report.sqnr_db.values())
    rounded = {
        name: grouped.quantize(weight, GROUP, bits).rows(0, len(weight)).float() if is_matrix(name) else weight
        for name, weight in weights.items()
    }
    plain = Specimen({"model.safetensors": rounded | head}, config).write(tmp_path / "plain")
    exact, half = (lightrm.load(plain, scheme=scheme).score_ids(IDS) for scheme in ("fp32", "bf16"))
    np.testing.assert_allclose(
        lightrm.load(tmp_path / "out", scheme="fp32").score_ids(IDS), exact, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(lightrm.load(tmp_path / "out").score_ids(IDS), half)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in (weights | head).items() if not is_matrix(name))
    for name in filter(is_matrix, weights):
        assert name not in stored
        stem, (outputs, inputs) = name.removesuffix("weight"), weights[name].shape
        shapes = {part: tuple(stored[stem + part].shape) for part in ("qweight", "qzeros", "scales", "g_idx")}
        groups = inputs // GROUP
        assert shapes == {
            "qweight": (inputs * bits // 32, outputs), "qzeros": (groups, outputs * bits // 32),
            "scales": (groups, outputs), "g_idx": (inputs,),
        }  # fmt: skip
        assert stored[stem + "scales"].dtype == torch.float16
        word = {4: 0x77777777, 8: 0x7F7F7F7F}[bits]
        assert set(stored[stem + "qzeros"].flatten().tolist()) == {word}, "version 1: the middle, stored minus one"
    in_config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    beside = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert in_config == beside
    assert [beside[key] for key in ("bits", "group_size", "sym", "desc_act")] == [bits, GROUP, True, False]
    assert (beside["quant_method"], beside["checkpoint_format"]) == ("gptq", "gptq")


def test_a_head_file_stays_a_file_of_its_own(tmp_path: Path) -> None:
    summary = {"v_head.summary.weight": HEAD, "v_head.summary.bias": torch.tensor([0.5])}
    files = {"model.safetensors": body(), "value_head.bin": summary}
    source = Specimen(files, CONFIG | {"architectures": ["LlamaForCausalLM"]}).write(tmp_path / "source")
    export_gptq(source, tmp_path / "out")
    assert (tmp_path / "out" / "value_head.bin").read_bytes() == (source / "value_head.bin").read_bytes()
    assert "v_head.summary.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert lightrm.load(tmp_path / "out").checkpoint.layout.name == lightrm.load(source).checkpoint.layout.name


def test_an_adapter_is_merged(tmp_path: Path) -> None:
    """The exported folder stands alone: LoRA merged, the adapter's head under its plain name."""
    Specimen({"model.safetensors": body()}, CONFIG).write(tmp_path / "base")
    low, high = normal(4, WIDTH, seed=11), normal(WIDTH, 4, seed=12)
    name = "model.layers.1.self_attn.q_proj"
    lora = {f"{name}.lora_A.weight": low, f"{name}.lora_B.weight": high, "score.weight": HEAD}
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "base_model_name_or_path": str(tmp_path / "base")}
    files = {"adapter_model.safetensors": prefixed(lora, "base_model.model.")}
    adapter = Specimen(files, CONFIG, extra={"adapter_config.json": settings}).write(tmp_path / "adapter")
    export_gptq(adapter, tmp_path / "out")
    merged = body() | {"score.weight": HEAD}
    merged[f"{name}.weight"] = merged[f"{name}.weight"] + high @ low
    Specimen({"model.safetensors": merged}, CONFIG).write(tmp_path / "merged")
    export_gptq(tmp_path / "merged", tmp_path / "out of merged")
    one, two = (lightrm.load(tmp_path / folder).score_ids(IDS) for folder in ("out", "out of merged"))
    np.testing.assert_array_equal(one, two)
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_calibration_brings_a_layers_output_closer() -> None:
    """Under the second moment of correlated inputs, and on the same grid."""
    mixing = normal(24, 96, seed=1, scale=1.0)
    inputs, weight = normal(400, 24, seed=2, scale=1.0) @ mixing, normal(48, 96, seed=3)
    plain = grouped.quantize(weight, GROUP)
    better, _ = compensated_grouped(weight, factored(Symmetric.of(inputs.T @ inputs)), GROUP)
    loss = [float((inputs @ (made.rows(0, 48).float() - weight).T).norm()) for made in (plain, better)]
    assert loss[1] < 0.7 * loss[0]
    white = compensated_grouped(weight, factored(Symmetric.of(torch.eye(96))), GROUP)[0]
    assert torch.equal(white.packed, plain.packed), "uncorrelated inputs leave nothing to compensate"
    assert torch.equal(white.scale_GO, plain.scale_GO)


def test_calibrated_export_of_the_demo_model(tmp_path: Path) -> None:
    texts = [answer[cut:] + answer[:cut] for answer in ANSWERS for cut in range(12)]
    pairs, out = tmp_path / "pairs.jsonl", tmp_path / "out"
    pairs.write_text(json.dumps({"prompt": PROMPT, "responses": texts}))
    options = ["--format", "gptq", "--scheme", "w4a16-g32", "--calibrate", str(pairs)]
    done = CliRunner().invoke(main, ["quantize", "demo", str(out), *options])
    assert done.exit_code == 0, done.output
    export_gptq("demo", tmp_path / "plain", scheme="w4a16-g32")
    exact = lightrm.load("demo", scheme="fp32").score(PROMPT, texts)
    lost = [np.std(lightrm.load(folder).score(PROMPT, texts) - exact) for folder in (out, tmp_path / "plain")]
    assert lost[0] < lost[1]


def test_words_are_packed_as_the_reader_unpacks_them() -> None:
    q = torch.randint(-8, 8, (16, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    made = grouped.pack(q, torch.full((16, 2), 0.5, dtype=torch.float16))
    assert torch.equal(made.rows(0, 16).float(), 0.5 * q)
    two = grouped.joined([grouped.columns(made, 0, 8), grouped.columns(made, 8, 16)])
    assert torch.equal(two.packed, made.packed)
    assert not grouped.quantize(torch.zeros(8, 32), 32).rows(0, 8).any()


def test_what_cannot_be_exported_says_so(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("x")
    with pytest.raises(lightrm.CheckpointError, match="not empty"):
        export_gptq("demo", taken)
    with pytest.raises(lightrm.SchemeError, match=r"ask for w4a16\[-gN\] or w8a16\[-gN\], not w8a8"):
        export_gptq("demo", tmp_path / "a", scheme="w8a8")
    with pytest.raises(lightrm.CheckpointError, match=r"quantized already \(w4a16\)"):
        export_gptq(DATA / "gptq-4bit-g32-asym", tmp_path / "a")
    weights = {n: t[:40] if "gate" in n or "up_" in n else t[:, :40] if "down" in n else t for n, t in body().items()}
    files = {"model.safetensors": weights | {"score.weight": HEAD}}
    source = Specimen(files, CONFIG | {"intermediate_size": 40}).write(tmp_path / "narrow")
    with pytest.raises(lightrm.SchemeError, match="multiples of 32"):
        export_gptq(source, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_draft_is_never_a_model(tmp_path: Path) -> None:
    export_gptq("demo", tmp_path / "out")
    draft = (tmp_path / "out").rename(tmp_path / f"out{UNFINISHED}")
    with pytest.raises(errors.CorruptFileError, match="did not finish"):
        lightrm.load(draft)
