"""Whole models with random weights made on the card: lightrm's schemes, transformers and bitsandbytes, one at a time.

Every scorer gets the same ids in the same real mix of lengths, unshared, sorted by length; ours packed, transformers
padded on the right. pairs/s counts two sequences a pair; memory is the allocator's peak, weights included. Layers have
weights of their own, as in a real model. Where a card is too small for float16, all get the layers that fit.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from benchmarks.gpu.lengths import LONGEST, read_groups
from benchmarks.gpu.stopwatch import Suite, said
from benchmarks.peers import Score, bitsandbytes_4bit, bitsandbytes_8bit, padded_scorer, sequences
from lightrm.architecture import Architecture, Rope
from lightrm.engine.packing import packs
from lightrm.loading.folding import Folding
from lightrm.loading.packers import Packer
from lightrm.model.decoder import Decoder, Layer
from lightrm.model.head import ValueHead
from lightrm.model.linear import Linear, linear_for
from lightrm.schemes.grammar import Scheme, parse_scheme

BUDGET = 16384  # tokens of a pack, or of a padded batch
ROOM = 3 * 2**30  # for activations
AT_LEAST = 2.0  # seconds of timed passes
SIZES = {"7B": (4096, 11008, 32, 32), "13B": (5120, 13696, 40, 40)}  # width, ffn, heads, layers
OURS = ("w8a8", "w4a8", "w4a16", "fp16", "bf16")
PEERS: dict[str, tuple[torch.dtype, Callable[[torch.nn.Module], torch.nn.Module] | None]] = {
    "transformers bf16": (torch.bfloat16, None),
    "transformers fp16": (torch.float16, None),
    "bitsandbytes nf4": (torch.bfloat16, bitsandbytes_4bit),
    "bitsandbytes int8": (torch.float16, bitsandbytes_8bit),
}


def architecture(size: str, suite: Suite) -> Architecture:
    width, ffn, heads, layers = (64, 128, 2, 1) if suite.rehearsal else SIZES[size]
    vocabulary = 300 if suite.rehearsal else 32000
    a = Architecture("llama", layers, width, ffn, heads, heads, width // heads, vocabulary, 1e-6, Rope(), LONGEST)
    if suite.rehearsal:
        return a
    free = torch.cuda.mem_get_info(suite.device)[0] - ROOM - 2 * a.vocabulary * a.width
    return replace(a, layers=max(1, min(layers, free * layers // (2 * a.matrix_parameters))))


def ours(a: Architecture, name: str, device: torch.device) -> Score:
    """lightrm's own decoder over random weights, drawn in the form in which they are held."""
    scheme = parse_scheme(name, torch.device("cuda"))
    block = Folding(a).gated_block if scheme.folds else 1

    def linear(outputs: int, inputs: int, block: int = 1) -> Linear:
        return linear_for(scheme, random_weight(scheme, outputs, inputs, device), None, block)

    norm = None if scheme.folds else torch.ones(a.width, dtype=scheme.dtype, device=device)
    layers = [
        Layer(norm, linear(*a.linears["qkv"]), linear(*a.linears["output"]),
              norm, linear(*a.linears["gate_up"]), linear(*a.linears["down"], block))
        for _ in range(a.layers)
    ]  # fmt: skip
    table = torch.randn(a.vocabulary, a.width, device=device).half()
    decoder = Decoder(a, table, layers, norm, scheme.dtype)
    head = ValueHead((torch.randn(1, a.width, device=device) / a.width**0.5,), (None,))

    def score(texts: list[np.ndarray]) -> np.ndarray:
        scores = np.empty(len(texts), np.float32)
        for group, batch in packs(texts, BUDGET):
            scores[group] = head(decoder.last_hidden(batch.to(device))).cpu().numpy()
        return scores

    return score


def random_weight(scheme: Scheme, outputs: int, inputs: int, device: torch.device):
    """Values of about 1 / sqrt(I), so that activations stay what they are."""
    packer = Packer(scheme, outputs, inputs, device)
    for held in packer.held:
        if held.dtype == torch.uint8:
            held.random_(0, 256)
        elif held.dtype == torch.int8:
            held.random_(1, 16) if scheme.weights == "int4" else held.random_(-127, 128)
        elif held.ndim == 1:
            held.fill_(inputs**-0.5 / (40 if scheme.weights == "int4" else 73))
        else:
            held.normal_(0, inputs**-0.5)
    return packer.weight()


def hugging_face(a: Architecture, name: str, device: torch.device) -> Score:
    """One layer made on the CPU, then copied to the card layer by layer: bitsandbytes rounds what arrives."""
    import transformers

    dtype, change = PEERS[name]
    config = transformers.LlamaConfig(
        vocab_size=a.vocabulary, hidden_size=a.width, intermediate_size=a.ffn_width, num_hidden_layers=1,
        num_attention_heads=a.query_heads, num_key_value_heads=a.kv_heads, max_position_embeddings=a.max_positions,
        attn_implementation="sdpa",  # type: ignore[call-arg]
    )  # fmt: skip
    body = transformers.LlamaModel(config).to(dtype).eval()
    first = body.layers[0]
    made = []
    for _ in range(a.layers):
        layer = copy.deepcopy(first)
        made.append((layer if change is None else change(layer)).to(device))
    body.layers = torch.nn.ModuleList(made)
    body.config.num_hidden_layers = a.layers
    head = torch.randn(1, a.width, device=device) / a.width**0.5
    return padded_scorer(body.to(device), head, str(device), BUDGET)


def measure(suite: Suite, sizes: tuple[str, ...]) -> None:
    for size in sizes:
        a = architecture(size, suite)
        full = suite.rehearsal or a.layers == SIZES[size][3]
        for name in [*(f"lightrm {name}" for name in OURS), *PEERS]:
            case = f"{size}" if full else f"{size}, {a.layers} layers"
            if suite.left < 20:
                suite.add("whole", name, case, "pairs/s", None, failed="no time was left")
                continue
            try:
                measure_one(suite, a, name, case)
            except Exception as error:  # a peer that cannot run here is part of the result
                suite.add("whole", name, case, "pairs/s", None, failed=said(error))
            if not suite.rehearsal:
                gc.collect()
                torch.cuda.empty_cache()


def measure_one(suite: Suite, a: Architecture, name: str, case: str) -> None:
    """Passes over the mix until AT_LEAST seconds are spent, after one over a part of it; the median rate counts."""
    groups = [(9, [5, 7]), (2, [3])] if suite.rehearsal else read_groups(128)
    texts = sequences(groups, 1, a.vocabulary)
    if not suite.rehearsal:
        torch.cuda.reset_peak_memory_stats(suite.device)
    score = (
        ours(a, name.split()[1], suite.device) if name.startswith("lightrm") else hugging_face(a, name, suite.device)
    )
    scores = score(texts[:2] if suite.rehearsal else texts)  # compiles, and warms up
    if not np.isfinite(scores).all():
        raise ArithmeticError(f"scores are {scores[:3]}")
    seconds: list[float] = []
    while not seconds or (not suite.rehearsal and sum(seconds) < AT_LEAST and suite.left > 10):
        started = time.perf_counter()
        score(texts)
        seconds.append(time.perf_counter() - started)
    once = statistics.median(seconds)
    peak = 0 if suite.rehearsal else torch.cuda.max_memory_allocated(suite.device)
    tokens = sum(map(len, texts))
    computed = tokens
    if name.startswith("lightrm"):  # a pair's prompt is computed once
        computed = sum(len(batch) for _, batch in packs(texts, BUDGET))
    work = computed * 2 * a.matrix_parameters / 1e12
    suite.add(
        "whole", name, case, "pairs/s", len(texts) / 2 / once, tokens_s=tokens / once, tflops=work / once,
        peak_gib=peak / 2**30, passes=len(seconds), failed="",
    )  # fmt: skip
