"""Everything about a card in one run: `python -m benchmarks.gpu`, or `make gpu`.

    python -m benchmarks.gpu [--minutes 9] [--sizes 7B 13B] [--name h100]
    python -m benchmarks.gpu --rehearse        every line of it, tiny, on a CPU in Triton's interpreter; no figures

First every kernel against its twin on the card; if one differs, it is named, and nothing is measured. Then the card's
ceilings, linear layers, attention, passes, and whole models beside transformers and bitsandbytes. Needs PyTorch, Triton
and transformers; bitsandbytes where it is there. Writes results/gpu_NAME.json, a CSV file beside it with one row a
measurement, and prints a summary. Sizes follow the card's memory, from 8 GB on.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
from typing import Any


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.5, help="whole models stop being measured when they are up")
    parser.add_argument("--sizes", nargs="*", default=["13B", "7B"])
    parser.add_argument("--name", help="of the result files; the card's own name by default")
    parser.add_argument("--commit", help="what is measured, where the copy on this machine has no git history")
    parser.add_argument("--rehearse", action="store_true")
    return parser.parse_args()


def main() -> int:
    asked = arguments()
    if asked.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    import torch

    from benchmarks.gpu import checks, single, whole
    from benchmarks.gpu.stopwatch import Suite
    from lightrm.kernels import dispatch

    if not asked.rehearse and not torch.cuda.is_available():
        print("PyTorch sees no CUDA card here: --rehearse runs the suite on a CPU, without figures", file=sys.stderr)
        return 2
    if asked.rehearse:
        dispatch.card_of = lambda like: 80  # tensors on the CPU go where a card's would
    device = torch.device("cpu" if asked.rehearse else "cuda")
    suite = Suite(device, asked.rehearse, asked.minutes * 60)
    failed = checks.failures(suite)
    if failed:
        print(f"{len(failed)} kernels differ from their twins on this card; nothing was measured:", *failed, sep="\n  ")
        return 1
    print(f"{suite.rows[0]['value']} checks held", flush=True)
    ceiling = single.ceilings(suite)
    for part in (single.linears, single.attention, single.passes):
        part(suite, ceiling)
        print(f"{part.__name__} done, {suite.left:.0f} s left", flush=True)
    whole.measure(suite, tuple(asked.sizes))
    if asked.rehearse:
        print(f"the rehearsal went through: {len(suite.rows)} measurements, whose values mean nothing and are not kept")
        return int(any(row.get("failed") for row in suite.rows))
    write(asked.name or slug(torch.cuda.get_device_name(device)), suite.rows, asked.commit)
    print(summary(suite.rows))
    return 0


def slug(name: str) -> str:
    return "_".join("".join(c if c.isalnum() else " " for c in name.lower()).split()[1:4])


def write(name: str, rows: list[dict[str, Any]], commit: str | None) -> None:
    import torch
    import triton

    from benchmarks.record import RESULTS, provenance, write_result

    properties = torch.cuda.get_device_properties(0)
    card = {
        "name": properties.name, "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": properties.total_memory / 2**30, "processors": properties.multi_processor_count,
        "cuda": torch.version.cuda, "triton": triton.__version__,
    }  # fmt: skip
    known = {"commit": commit} if commit else {}
    write_result(f"gpu_{name}", {**provenance(), **known, "card": card, "rows": rows})
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (RESULTS / f"gpu_{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """What could not be timed on this card, one line for each kernel."""
    failed: dict[str, list[str]] = {}
    for row in rows:
        if row["section"] not in ("whole", "checks") and row.get("failed"):
            failed.setdefault(f"{row['section']}: {row['what']}", []).append(row["failed"])
    return [f"{what}: {len(said)} cases failed, first: {said[0]}" for what, said in failed.items()]


def summary(rows: list[dict[str, Any]]) -> str:
    """At most 60 lines: medians over shapes, not every number."""
    lines = [f"{row['what']}: {row['value']:.0f} {row['unit']}" for row in rows if row["section"] == "ceilings"]
    for section, ratio in (("linears", "against_bf16"), ("attention", "against_sdpa")):
        found = [row for row in rows if row["section"] == section and row["value"] is not None]
        cases = sorted({row["tokens"] for row in found}) if section == "linears" else []
        for what in dict.fromkeys(row["what"] for row in found):
            mine = [row for row in found if row["what"] == what]
            if cases:
                by = [[row[ratio] for row in mine if row["tokens"] == tokens] for tokens in cases]
                shown = "  ".join(f"{n}: {statistics.median(v):.2f}" for n, v in zip(cases, by, strict=True) if v)
            else:
                shown = "  ".join(f"{row['case']}: {row[ratio]:.2f}" for row in mine)
            share = statistics.median(row["share"] for row in mine)
            lines.append(f"{section}: {what}, {ratio.replace('_', ' ')}  {shown}  (median share {share:.2f})")
    for row in rows:
        if row["section"] == "passes" and row["value"] is not None:
            lines.append(f"passes: {row['what']}: {row['value']:.0f} GB/s, {row['share']:.2f} of a copy")
    lines += failures(rows)
    whole = [row for row in rows if row["section"] == "whole"]
    base = {row["case"]: row["value"] for row in whole if row["what"] == "transformers bf16"}
    for row in whole:
        if row["value"] is None:
            lines.append(f"whole {row['case']}: {row['what']}: {row['failed']}")
            continue
        times = f", {row['value'] / base[row['case']]:.2f} x transformers bf16" if base.get(row["case"]) else ""
        lines.append(
            f"whole {row['case']}: {row['what']}: {row['value']:.1f} pairs/s{times}, {row['tflops']:.0f} TFLOP/s, "
            f"peak {row['peak_gib']:.1f} GiB"
        )
    return "\n".join(lines[:60])


if __name__ == "__main__":
    sys.exit(main())
