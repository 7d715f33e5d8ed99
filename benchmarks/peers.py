"""One scorer in a process of its own, for `benchmarks.scoring`: load, say what it is, then score when told to.

    python -m benchmarks.peers NAME FOLDER THREADS

Reads one JSON line a run: {"groups": [[prompt tokens, [answer tokens, ...]], ...], "seed": n}; token ids follow from
both, and the answers of a group begin with its prompt. Answers with the seconds that
scoring took, the scores, and the peak memory of the process so far. All peers get the same checkpoint, the same ids,
length-sorted batches, and return head(last hidden state) in input order.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

Score = Callable[[list[np.ndarray]], np.ndarray]
Load = Callable[[Path], tuple[Score, str]]
LastStates = Callable[[np.ndarray, np.ndarray], np.ndarray]
PADDED_TOKENS = 2048  # of one padded batch, as many as lightrm packs


def sequences(groups: list[tuple[int, list[int]]], seed: int, vocabulary: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    found = []
    for prompt_length, answers in groups:
        prompt = generator.integers(3, vocabulary, prompt_length)
        found += [np.concatenate([prompt, generator.integers(3, vocabulary, length)]) for length in answers]
    return found


def ours(scheme: str, shares: bool = True) -> Load:
    def load(folder: Path) -> tuple[Score, str]:
        import lightrm
        from lightrm.engine import engine
        from lightrm.engine.packing import SHARE_NOTHING, packs

        rm = lightrm.load(folder, scheme=scheme, device="cpu")
        if not shares:
            engine.packs = partial(packs, least_shared=SHARE_NOTHING)  # type: ignore[attr-defined]
        return rm.score_ids, rm.report.kernels.name

    return load


def hugging_face(dtype: torch.dtype, change: Callable | None = None, kernel: str = "PyTorch") -> Load:
    def load(folder: Path) -> tuple[Score, str]:
        import transformers

        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa"
        ).eval()
        head = model.score.weight.float()
        body = model.model if change is None else change(model.model).to("cpu")  # bitsandbytes rounds as it is moved
        return padded_scorer(body, head, "cpu", PADDED_TOKENS), kernel

    return load


def padded_scorer(body: torch.nn.Module, head_1D: torch.Tensor, device: str, padded_tokens: int) -> Score:
    """How one scores with transformers: batches of similar lengths, padded on the right, the last token of each."""

    @torch.inference_mode()
    def score(texts: list[np.ndarray]) -> np.ndarray:
        scores = np.empty(len(texts), np.float32)
        for group, padded_ids, last in padded(texts, padded_tokens):
            ids = torch.from_numpy(padded_ids)
            mask = (torch.arange(ids.shape[1]) <= torch.from_numpy(last)[:, None]).long()
            shown = mask.to(device) if int(mask.min()) == 0 else None
            states = body(ids.to(device), attention_mask=shown, use_cache=False).last_hidden_state
            ends = states[torch.arange(len(group)), torch.from_numpy(last)]
            scores[group] = (ends.float() @ head_1D.T)[:, 0].cpu().numpy()
        return scores

    return score


def padded(texts: list[np.ndarray], padded_tokens: int) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Batches, long ones first: which texts, their ids (B, L), and where each ends (B,)."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    while order:
        size = max(1, padded_tokens // len(texts[order[0]]))
        group, order = order[:size], order[size:]
        ids = np.zeros((len(group), len(texts[group[0]])), np.int64)
        for row, i in enumerate(group):
            ids[row, : len(texts[i])] = texts[i]
        yield group, ids, np.array([len(texts[i]) - 1 for i in group])


def bitsandbytes_4bit(model: torch.nn.Module) -> torch.nn.Module:
    import bitsandbytes as bnb

    def make(linear: torch.nn.Linear) -> torch.nn.Module:
        new = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        new.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        return new

    return replaced(model, make)


def bitsandbytes_8bit(model: torch.nn.Module) -> torch.nn.Module:
    import bitsandbytes as bnb

    def make(linear: torch.nn.Linear) -> torch.nn.Module:
        new = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        return new

    return replaced(model, make)


def replaced(model: torch.nn.Module, make: Callable[[torch.nn.Linear], torch.nn.Module]) -> torch.nn.Module:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear:
                setattr(parent, name, make(child))
    return model


def torchao_int8(model: torch.nn.Module) -> torch.nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def torchao_compiled(model: torch.nn.Module) -> torch.nn.Module:
    """Compiled while it warms up, for shapes that vary from the second on; needs a C++ compiler."""
    torch._inductor.config.compile_threads = 1  # no workers that outlive the compilation
    torch._dynamo.config.recompile_limit = 64  # past it, what is left runs uncompiled
    return torch.compile(torchao_int8(model))


def torch_dynamic(model: torch.nn.Module) -> torch.nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


def llama_cpp(kind: str, keeps: bool = False) -> Load:
    def load(folder: Path) -> tuple[Score, str]:
        from benchmarks.llama import LlamaScorer

        scorer = LlamaScorer(folder, kind, torch.get_num_threads(), keeps)
        return scorer.score, scorer.kernel

    return load


def converted(last_states: Callable[[Path], LastStates], kernel: str) -> Load:
    """A runtime of its own file format: a function of padded ids and where each sequence ends, to its last states."""

    def load(folder: Path) -> tuple[Score, str]:
        run = last_states(folder)
        with safe_open(folder / "model.safetensors", "numpy") as stored:
            head = stored.get_tensor("score.weight").astype(np.float32)[0]

        def score(texts: list[np.ndarray]) -> np.ndarray:
            scores = np.empty(len(texts), np.float32)
            for group, ids, last in padded(texts, PADDED_TOKENS):
                scores[group] = run(ids, last) @ head
            return scores

        return score, kernel

    return load


def openvino(group: int | None) -> Load:
    def last_states(folder: Path) -> LastStates:
        from benchmarks.openvino_runtime import last_states

        return last_states(folder, group)

    return converted(last_states, f"OpenVINO, groups of {group or 32}")


def onnx_runtime(kind: str, kernel: str) -> Load:
    def last_states(folder: Path) -> LastStates:
        from benchmarks.onnx_runtime import last_states

        return last_states(folder, kind)

    return converted(last_states, kernel)


PEERS: dict[str, Load] = {
    "lightrm w8a8": ours("w8a8"),
    "lightrm w8a8, nothing shared": ours("w8a8", shares=False),
    "lightrm w4a8": ours("w4a8"),
    "lightrm bf16": ours("bf16"),
    "lightrm fp32": ours("fp32"),
    "transformers fp32": hugging_face(torch.float32),
    "transformers bf16": hugging_face(torch.bfloat16),
    "bitsandbytes nf4": hugging_face(torch.bfloat16, bitsandbytes_4bit, "bitsandbytes"),
    "bitsandbytes int8": hugging_face(torch.bfloat16, bitsandbytes_8bit, "bitsandbytes"),
    "torchao int8": hugging_face(torch.float32, torchao_int8, "torchao, eager"),
    "torchao int8, compiled": hugging_face(torch.bfloat16, torchao_compiled, "torchao, Inductor"),
    "torch quantize_dynamic": hugging_face(torch.float32, torch_dynamic, "FBGEMM"),
    "OpenVINO int8": openvino(group=256),
    "OpenVINO int8, its default groups": openvino(group=None),
    "ONNX Runtime int8": onnx_runtime("int8", "DynamicQuantizeMatMul"),
    "ONNX Runtime int8, blocks": onnx_runtime("int8-blocks", "MatMulNBits, int8 activations"),
    "ONNX Runtime int4, blocks": onnx_runtime("int4-blocks", "MatMulNBits, int8 activations"),
    "llama.cpp Q8_0": llama_cpp("Q8_0"),
    "llama.cpp Q8_0, prompt kept": llama_cpp("Q8_0", keeps=True),
    "llama.cpp Q4_0": llama_cpp("Q4_0"),
    "llama.cpp Q4_K_M": llama_cpp("Q4_K_M"),
}


def gemms_alone(folder: Path) -> tuple[Score, str]:
    """The ceiling of w8a8: its int8 products that cannot be left out, and nothing between them. Of the last layer these
    are keys and values; all else is needed for the last tokens only. Sums go to memory that is kept. Its "scores" are
    zeros."""
    from lightrm.kernels import gemm
    from lightrm.kernels.arena import Arena, use_arena
    from lightrm.kernels.cpu.cpu_products import described
    from lightrm.kernels.library_products import multiply
    from lightrm.kernels.operands import Rows
    from lightrm.schemes.int8 import Rowwise

    config = json.loads((folder / "config.json").read_text())
    width, ffn, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    shapes = [(3 * width, width), (width, width), (2 * ffn, width), (width, ffn)]
    whole = [torch.randint(-127, 127, shape, dtype=torch.int8) for shape in shapes * (layers - 1)]
    keys_and_values = torch.randint(-127, 127, (2 * width, width), dtype=torch.int8)
    last = [torch.randint(-127, 127, shape, dtype=torch.int8) for shape in ((width, width), *shapes[1:])]
    memory = Arena(PADDED_TOKENS * 2 * ffn * 4 + 2**20)

    def product(rows: int, weight: torch.Tensor) -> None:
        few = Rows(inputs[weight.shape[1]][:rows], torch.ones(rows))
        multiply(few, Rowwise(weight, torch.ones(len(weight))), None)

    def score(texts: list[np.ndarray]) -> np.ndarray:
        tokens = sum(len(text) for text in texts)
        with use_arena(memory):
            for start in range(0, tokens, PADDED_TOKENS):
                for weight in [*whole, keys_and_values]:
                    product(min(PADDED_TOKENS, tokens - start), weight)
            for weight in last:
                product(len(texts), weight)
        return np.zeros(len(texts), np.float32)

    inputs = {n: torch.ones(PADDED_TOKENS, n, dtype=torch.int8) for n in (width, ffn)}
    return score, described(gemm.cpu_product()[1]).partition(";")[0]


PEERS["int8 products alone"] = gemms_alone


def weights_read(bits: int) -> Load:
    """The bytes of the linear layers read once, and nothing else: what memory allows where there are few tokens."""

    def load(folder: Path) -> tuple[Score, str]:
        config = json.loads((folder / "config.json").read_text())
        width, ffn, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
        weights = torch.ones(layers * (4 * width + 3 * ffn) * width * bits // 8 // 4)

        def score(texts: list[np.ndarray]) -> np.ndarray:
            weights.sum()
            return np.zeros(len(texts), np.float32)

        return score, "PyTorch's sum"

    return load


READINGS = {"weights read, 8 bits": weights_read(8), "weights read, 4 bits": weights_read(4)}
PEERS |= READINGS


def peak_memory() -> int:
    """Of this process alone, bytes: getrusage's would start at what the parent had in memory."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def main() -> None:
    name, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    score, kernel = PEERS[name](folder)
    print(json.dumps({"kernel": kernel}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        texts = sequences(asked["groups"], asked["seed"], vocabulary)
        started = time.perf_counter()
        scores = score(texts)
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "peak": peak_memory(), "scores": scores.tolist()}), flush=True)


if __name__ == "__main__":
    main()
