"""Which tensors a decoder needs, and their shapes: checked before the first weight is read.

So a wrong folder fails within a second, and the error names what is wrong with it.
"""

from __future__ import annotations

import re
from dataclasses import replace

from lightrm.architecture import Architecture
from lightrm.checkpoints.checkpoint import Checkpoint
from lightrm.checkpoints.detect import listed
from lightrm.errors import MissingHeadError, TensorMismatchError


def expected_shapes(a: Architecture) -> dict[str, tuple[int, ...]]:
    """Return our name -> shape of every tensor that the decoder needs, with fused weights as their parts."""
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (a.vocabulary, a.width), "final_norm.weight": (a.width,)}
    for i in range(a.layers):
        prefix = f"layers.{i}."
        shapes |= {f"{prefix}{name}.weight": (width,) for name, width in a.norms.items()}
        for name, (_, inputs) in a.linears.items():
            for part, rows in a.parts[name].items():
                shapes[f"{prefix}{part}.weight"] = (rows, inputs)
                if a.biases[name]:
                    shapes[f"{prefix}{part}.bias"] = (rows,)
    return shapes


def real_architecture(checkpoint: Checkpoint) -> Architecture:
    """Return the config's architecture with the row count of the embedding: trainers extend a vocabulary without
    updating config.json."""
    if "embedding.weight" not in checkpoint.tensors or not checkpoint.shaped:
        return checkpoint.architecture
    return replace(checkpoint.architecture, vocabulary=checkpoint.shape("embedding.weight")[0])


def check_tensors(checkpoint: Checkpoint) -> None:
    """Raise TensorMismatchError on missing, unexpected or misshapen tensors, MissingHeadError without a head."""
    a = real_architecture(checkpoint)
    blocks = (re.match(r"layers\.(\d{1,9})\.", ours) for ours in checkpoint.tensors)
    held = 1 + max((int(block[1]) for block in blocks if block is not None), default=-1)
    if a.layers > held:  # before anything is counted up to what config.json says
        raise TensorMismatchError(
            f"{checkpoint.config.path}: num_hidden_layers is {a.layers}, the weights hold {held} layers; a shard is "
            "missing, or config.json belongs to another model"
        )
    expected = expected_shapes(a)
    for ours in checkpoint.tensors:
        stem, _, kind = ours.rpartition(".")
        block, _, whole = stem.rpartition(".")
        if whole in ("qkv", "gate_up"):  # one fused tensor in place of its parts
            parts = [f"{block}.{part}.{kind}" for part in a.parts[whole]]
            if all(part in expected for part in parts):
                expected[ours] = a.linears[whole] if kind == "weight" else a.linears[whole][:1]
                for part in parts:
                    del expected[part]
    present = {ours for ours in checkpoint.tensors if not ours.startswith(("head.", "normalizer.", "gate."))}
    where = checkpoint.folder
    missing = sorted(expected.keys() - present)
    if missing:
        raise TensorMismatchError(
            f"{where}: {len(missing)} tensors are missing: {listed(missing)}; a shard is incomplete, or config.json "
            "belongs to another model"
        )
    unexpected = sorted(present - expected.keys())
    if unexpected:
        foreign = [checkpoint.tensors[ours][1] for ours in unexpected]
        raise TensorMismatchError(f"{where}: config.json leaves no place for {listed(foreign)}: is it another model's?")
    for ours, shape in expected.items() if checkpoint.shaped else ():
        found = checkpoint.shape(ours)
        if found != shape:
            raise TensorMismatchError(
                f"{where}: {checkpoint.tensors[ours][1]} has shape {found}, config.json asks for {shape}"
            )
    if "head.0.weight" not in checkpoint.tensors:
        raise MissingHeadError(f"{where}: the value head has no weight, only {listed(checkpoint.tensors, 3)}")
