"""One linear layer at a time: every scheme, the shapes of LLaMA-7B and Baichuan-13B, packs of 256 and 2048 tokens.

    python -m benchmarks.linear [--rounds 5]

A layer is timed as it runs: rows made from a float input, the product, and the product added to a stream. The ceiling
is the bare product of the same kind: int8 x int8 for integer schemes, the float product of the scheme's dtype for the
others. In each round every scheme runs once after its ceiling; shares are taken within a round, medians reported.
Writes results/linear_cpu.json and prints a table. For cards: benchmarks.gpu.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.record import measured_on, provenance, quote, this_cpu, write_result
from lightrm.kernels import products
from lightrm.kernels.dispatch import kernels_for
from lightrm.kernels.operands import Residual
from lightrm.loading.packers import WholePacker, packer_for
from lightrm.model.linear import Linear, linear_for
from lightrm.schemes.grammar import parse_scheme

SHAPES = {
    "7B qkv": (12288, 4096), "7B o": (4096, 4096), "7B gate_up": (22016, 4096), "7B down": (4096, 11008),
    "13B qkv": (15360, 5120), "13B o": (5120, 5120), "13B gate_up": (27392, 5120), "13B down": (5120, 13696),
}  # fmt: skip
TOKENS = (256, 2048)
SCHEMES = ("fp32", "bf16", "w8a8", "w4a8", "w4a16", "nf4", "bnb-int8")
CPU = torch.device("cpu")


def build(scheme_name: str, outputs: int, inputs: int) -> Linear:
    """A layer with random weights, the quantized parts drawn directly: their values do not matter for time."""
    scheme = parse_scheme(scheme_name, CPU)
    packer = packer_for(scheme, outputs, inputs, CPU)
    if isinstance(packer, WholePacker):
        packer.put(0, torch.randn(outputs, inputs) * 0.02)
    else:
        for held in packer.held:
            held.copy_(torch.randn(held.shape) * 0.02 if held.is_floating_point() else torch.randint(1, 8, held.shape))
    return linear_for(scheme, packer.weight(), None)


def added(layer: Linear, stream_TO: torch.Tensor, x_TI: torch.Tensor) -> torch.Tensor:
    """stream + layer(x), its rows rounded first where it reads int8."""
    residual = Residual(stream_TO)
    layer.add_to(residual, layer.rows(x_TI))
    return products.add_pending(residual)


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def measure(rounds: int, shapes: list[str], tokens: list[int]) -> dict[str, Any]:
    rows = []
    for shape in shapes:
        outputs, inputs = SHAPES[shape]
        layers = {name: build(name, outputs, inputs) for name in SCHEMES}
        values_OI = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
        floats = {d: torch.randn(outputs, inputs, dtype=d) for d in (torch.float32, torch.bfloat16)}
        for count in tokens:
            x_TI = torch.randn(count, inputs)
            values_TI = torch.randint(-127, 128, (count, inputs), dtype=torch.int8)
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in layers}
            for k in range(rounds + 1):
                for name, layer in layers.items():
                    dtype = parse_scheme(name, CPU).dtype
                    x, stream = x_TI.to(dtype), torch.zeros(count, outputs, dtype=dtype)
                    if layer.int8 or name == "bnb-int8":
                        bare = timed(lambda: products.int8_product(values_TI, values_OI))  # noqa: B023
                    else:
                        weight = floats[dtype if dtype in floats else torch.bfloat16].to(dtype)
                        bare = timed(lambda: products.linear(x, weight))  # noqa: B023
                    whole = timed(lambda: added(layer, stream, x))  # noqa: B023
                    if k:
                        times[name].append((bare, whole))
            work = 2 * count * outputs * inputs / 1e9
            for name, pairs in times.items():
                rows.append(
                    {
                        "shape": shape,
                        "tokens": count,
                        "scheme": name,
                        "GFLOP/s": work / statistics.median(whole for _, whole in pairs),
                        "ceiling GFLOP/s": work / statistics.median(bare for bare, _ in pairs),
                        "share": statistics.median(bare / whole for bare, whole in pairs),
                    }
                )
                print(rows[-1], flush=True)
    kernels = str(kernels_for(CPU, "integer"))
    return {**provenance(), **this_cpu(), "kernels": kernels, "rounds": rounds, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """Share of the ceiling: the median over the shapes, by scheme and tokens."""
    rows = result["rows"]
    counts, schemes = sorted({r["tokens"] for r in rows}), list(dict.fromkeys(r["scheme"] for r in rows))
    lines = ["| share of the bare product | " + " | ".join(f"{n} tokens" for n in counts) + " |"]
    lines.append("| --- |" + " ---: |" * len(counts))
    for scheme in schemes:
        shares = [
            statistics.median(r["share"] for r in rows if (r["scheme"], r["tokens"]) == (scheme, n)) for n in counts
        ]
        lines.append(f"| {scheme} | " + " | ".join(f"{share:.2f}" for share in shares) + " |")
    bare = {(r["shape"], r["tokens"], r["scheme"]): r["ceiling GFLOP/s"] for r in rows}
    for other in [scheme for scheme in ("fp32", "bf16") if scheme in schemes]:
        over = [bare[shape, n, "w8a8"] / bare[shape, n, other] for shape, n, scheme in bare if scheme == other]
        lines.append(f"\nThe bare int8 product is {statistics.median(over):.1f} x as fast as the bare {other} one.")
    lines += ["", measured_on(result)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES))
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    arguments = parser.parse_args()
    result = measure(arguments.rounds, arguments.shapes, arguments.tokens)
    write_result("linear_cpu", result)
    quote("linear_cpu", table)
    print(table(result))


if __name__ == "__main__":
    main()
