"""Every kernel on this card, on the shapes that are timed and on ugly ones, before any figure.

Whole numbers must be those of the twin. Floats may be off by what their own sum allows, no more: `benchmarks.rounding`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks import rounding
from benchmarks.gpu.stopwatch import Suite
from benchmarks.rounding import Bounded
from lightrm.kernels import integer
from lightrm.kernels.cuda import cuda_attention, cuda_passes, cuda_products
from lightrm.kernels.operands import ScoreRule, Sums
from lightrm.kernels.paths import paths_of
from lightrm.kernels.segments import ROOT, Segment, views
from lightrm.model.positions import alibi_slopes
from lightrm.schemes import int4, tiled
from lightrm.schemes.hadamard import hadamard
from lightrm.schemes.int4 import Int4
from lightrm.schemes.int8 import Rowwise

Found = Iterator[tuple[str, bool]]


def failures(suite: Suite) -> list[str]:
    """Names of the checks that do not hold, with how many there were in the suite's rows."""
    held, failed = 0, []
    for check in (products, grouped_products, passes, attention):
        for name, holds in check(suite):
            held += holds
            failed += [] if holds else [name]
    suite.add("checks", "all kernels", "against their twins", "checks held", held, failed=failed)
    return failed


def normal(suite: Suite, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=suite.device)


def int8s(suite: Suite, *shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, device=suite.device)


def within(suite: Suite, found: torch.Tensor, bound: Bounded) -> bool:
    """Triton's interpreter cuts bfloat16 off where a card rounds it."""
    return rounding.within(found, bound, cut=suite.rehearsal and found.dtype == torch.bfloat16)


def sizes(suite: Suite) -> tuple[tuple[int, int, int], ...]:
    """Rows, out and in features."""
    if suite.rehearsal:
        return ((17, 65, 128),)
    return ((1, 17, 128), (50, 1000, 5120), (127, 65, 13696), (2048, 15360, 5120), (4096, 5120, 13696))


def products(suite: Suite) -> Found:
    for rows, outputs, inputs in sizes(suite):
        shape = f"{rows} x {outputs} x {inputs}"
        values, ones = int8s(suite, rows, inputs), torch.ones(rows, device=suite.device)
        scale, bias = normal(suite, outputs).abs(), normal(suite, outputs)
        whole = int8s(suite, outputs, inputs)
        narrow = int4.quantize(normal(suite, outputs, inputs), int4.group_for(inputs, 128))
        widened = int4.widen(narrow.packed, narrow.multiplier_OG)
        yield f"widen {shape}", torch.equal(cuda_passes.widen(narrow.packed, narrow.multiplier_OG), widened)
        held = {"int8": Rowwise(whole, scale), "int4": Int4(narrow.packed, narrow.multiplier_OG, scale)}
        for kind, weight in held.items():
            acc = integer.product(values, whole if kind == "int8" else widened)
            plain = cuda_products.product(
                values, ones, weight_with(weight, torch.ones_like(scale)), None, torch.float32
            )
            yield f"{kind} {shape}: sums", torch.equal(plain, acc.float())
            row_scale, stream = normal(suite, rows).abs(), normal(suite, rows, outputs)
            bound = rounding.scaled(acc, row_scale, scale, bias)
            half = cuda_products.product(values, row_scale, weight, bias, torch.bfloat16)
            yield f"{kind} {shape}: scales and bias", within(suite, half, bound)
            onto = stream.clone()
            cuda_products.product(values, row_scale, weight, bias, torch.float32, onto)
            yield f"{kind} {shape}: onto the stream", within(suite, onto, bound + Bounded.of(stream))


def weight_with(weight: Rowwise | Int4, scale_O: torch.Tensor) -> Rowwise | Int4:
    if isinstance(weight, Rowwise):
        return Rowwise(weight.values_OI, scale_O)
    return Int4(weight.packed, weight.multiplier_OG, scale_O)


def grouped_products(suite: Suite) -> Found:
    for rows, outputs, inputs in sizes(suite):
        grid = tiled.tiled_int4(int4.quantize(normal(suite, outputs, inputs), int4.group_for(inputs, 64)), torch.half)
        assert grid is not None
        for dtype in (torch.float16, torch.bfloat16):
            x, weight_OI = normal(suite, rows, inputs).to(dtype), grid.rows(0, outputs)
            # Multipliers are exact in half precision, the scale waits for the end: only levels of bfloat16 are rounded.
            weight = Bounded.of(weight_OI).rounded(dtype, cut=suite.rehearsal) if dtype == torch.bfloat16 else None
            bound = Bounded.of(x).product((weight or Bounded.of(weight_OI)).each(torch.t), more=2)
            found = cuda_products.grouped_product(x, grid, None)
            yield f"w4a16 {rows} x {outputs} x {inputs} {dtype}", within(suite, found, bound)


def passes(suite: Suite) -> Found:
    widths = ((48, 144, 16),) if suite.rehearsal else ((63, 43 * 256, 256), (5120, 13696, 128), (4096, 11008, 256))
    for width, ffn, block in widths:
        x = normal(suite, 33, width) * torch.logspace(-3, 3, 33, device=suite.device)[:, None]
        for name, found, slow in (
            ("quantize", cuda_passes.quantize(x), integer.quantize(x)),
            ("norm", cuda_passes.norm_quantize(x, 1e-6), integer.norm_quantize(x, 1e-6)),
        ):
            yield f"{name} {width}", torch.equal(found[0], slow[0])
            yield f"{name} {width}: scale", bool(((found[1] - slow[1]).abs() <= 1e-6 * slow[1]).all())
        shift = normal(suite, width)
        centered = rounding.norm(Bounded.of(x), 1e-6) - Bounded.of(shift)
        yield from rows_within(f"norm, shifted {width}", *cuda_passes.norm_quantize(x, 1e-6, None, shift), centered)
        gate_up, bias = normal(suite, 33, 2 * ffn).half(), normal(suite, 2 * ffn)
        ones = torch.ones(33, device=suite.device), torch.ones(2 * ffn, device=suite.device)
        for name, sums in (("gate", Sums(gate_up)), ("gate, biased", Sums(gate_up, *ones, bias))):
            given = Bounded.of(gate_up) if sums.bias_O is None else Bounded.of(gate_up) + Bounded.of(sums.bias_O)
            turned = rounding.spread(rounding.gated(given), block_matrix(ffn, block, suite.device))
            yield from rows_within(f"{name} {ffn}", *cuda_passes.gated_quantize(sums, block), turned)
        rows = torch.tensor([5, 0, 32], device=suite.device)
        weight, bias = normal(suite, 1, width), normal(suite, 1)
        bound = Bounded.of(x[rows]).product(Bounded.of(weight.T)) + Bounded.of(bias)
        yield f"value head {width}", within(suite, cuda_passes.value_head(x, weight, bias, rows), bound)


def rows_within(name: str, values: torch.Tensor, scale_T: torch.Tensor, bound: Bounded) -> Found:
    yield name, bool((rounding.off_rows(values, scale_T, bound) <= 1).all())
    yield f"{name}: scale", rounding.within(scale_T, rounding.scale_of(bound))


def block_matrix(width: int, block: int, device: torch.device) -> torch.Tensor:
    """The Hadamard transform of `schemes.hadamard` as a matrix."""
    columns = torch.eye(width // block, device=device)
    return torch.kron(hadamard(torch.eye(block, device=device), block), columns)


def attention(suite: Suite) -> Found:
    """Plain sequences and a forest; the int8 rows many times over, since many programs must agree who is the last."""
    long = 20 if suite.rehearsal else 700
    forest = (Segment(0, long), Segment(long, 2 * long, 0), Segment(2 * long, 2 * long + 1, 0))
    plain = (Segment(0, 1, ROOT), Segment(1, long, ROOT), Segment(long, 2 * long + 1, ROOT))
    for width in (64, 80, 96, 128):
        heads, kv_heads = (2, 1) if suite.rehearsal else (8, 4)
        query = normal(suite, 2 * long + 1, heads, width).half()
        key, value = (normal(suite, 2 * long + 1, kv_heads, width).half() for _ in range(2))
        for name, segments in (("plain", plain), ("forest", forest)):
            slopes = alibi_slopes(heads).to(suite.device)
            rules = {"": ScoreRule(width**-0.5), " ALiBi": ScoreRule(width**-0.5, slopes)}
            rules[" capped, in a window"] = ScoreRule(width**-0.5, softcap=2.5, window=100)
            for kind, rule in rules.items():
                paths = paths_of(segments, suite.device)
                bound = rounding.attention(query, key, value, *seen_by(segments, suite.device), rule)
                where = f"attention {width} {name}{kind}"
                for k in range(1 if suite.rehearsal else 10):
                    mixed, values, _ = cuda_attention.attend(query, key, value, paths, rule, quantized=True)
                    rounded = torch.equal(values, integer.quantize(mixed.flatten(1).float())[0])
                    yield f"{where}: int8 rows, {k}", rounded
                yield where, within(suite, mixed, bound)


def seen_by(segments: tuple[Segment, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens each token sees, (T, T), and its position on its path, (T,)."""
    tokens = segments[-1].end
    seen, place = torch.zeros(tokens, tokens, dtype=torch.bool), torch.zeros(tokens, dtype=torch.float64)
    for start, end, ranges in views(segments):
        for first, last in ranges:
            seen[start:end, first:last] = True
        seen[start:end, start:end] &= torch.ones(end - start, end - start).tril().bool()
        place[start:end] = seen[start:end].sum(1) - 1
    return seen.to(device), place.to(device)
