"""Checkpoint -> Decoder and ValueHead: read one tensor, check it, convert it on the device, place it, forget it.

Shapes and names are checked before the first weight is read, so a wrong folder fails in a second.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from lightrm.architecture import Alibi, Architecture
from lightrm.checkpoints.detect import Checkpoint, listed
from lightrm.errors import MissingHeadError, NumericsError, TensorMismatchError
from lightrm.heads import ValueHead
from lightrm.linear import Linear
from lightrm.ops import KernelChoice, kernels_for
from lightrm.schemes import Scheme, size_text
from lightrm.transformer import Decoder, Layer

FUSED = {"qkv": ("query", "key", "value"), "gate_up": ("gate", "up")}


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What loading did. seconds: wall time; bytes: of the weights as held; ignored: tensors of the file left out."""

    seconds: float
    bytes: int
    kernels: KernelChoice
    scheme: Scheme
    file_dtypes: tuple[str, ...]
    ignored: tuple[str, ...]

    def __str__(self) -> str:
        ignored = f"; ignored {listed(self.ignored, 3)}" if self.ignored else ""
        return (
            f"{size_text(self.bytes)} as {self.scheme} ({self.scheme.reason}) from {'/'.join(self.file_dtypes)} "
            f"in {self.seconds:.1f} s; kernels: {self.kernels}{ignored}"
        )


def expected_shapes(a: Architecture) -> dict[str, tuple[int, ...]]:
    """Our name -> shape of every tensor the decoder needs; fused weights by their parts."""
    rows = part_rows(a)
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (a.vocabulary, a.width), "final_norm.weight": (a.width,)}
    for i in range(a.layers):
        prefix = f"layers.{i}."
        shapes |= {f"{prefix}attention_norm.weight": (a.width,), f"{prefix}mlp_norm.weight": (a.width,)}
        for part in ("query", "key", "value", "gate", "up"):
            shapes[f"{prefix}{part}.weight"] = (rows[part], a.width)
        shapes |= {f"{prefix}output.weight": (a.width, a.query_width), f"{prefix}down.weight": (a.width, a.ffn_width)}
        if a.qkv_bias:
            shapes |= {f"{prefix}{part}.bias": (rows[part],) for part in FUSED["qkv"]}
        if a.output_bias:
            shapes[f"{prefix}output.bias"] = (a.width,)
    return shapes


def part_rows(a: Architecture) -> dict[str, int]:
    return {"query": a.query_width, "key": a.kv_width, "value": a.kv_width, "gate": a.ffn_width, "up": a.ffn_width}


def real_architecture(checkpoint: Checkpoint) -> Architecture:
    """The config's, with the embedding's own row count: trainers extend a vocabulary without telling config.json."""
    if "embedding.weight" not in checkpoint.tensors:
        return checkpoint.architecture
    return replace(checkpoint.architecture, vocabulary=checkpoint.shape("embedding.weight")[0])


def check_tensors(checkpoint: Checkpoint) -> None:
    """Raises TensorMismatchError on missing, unexpected or misshapen tensors, MissingHeadError without a head."""
    a = real_architecture(checkpoint)
    expected = expected_shapes(a)
    rows = part_rows(a)
    for ours in checkpoint.tensors:
        stem, _, kind = ours.rpartition(".")
        if stem.endswith(".qkv"):  # one fused tensor in place of three
            parts = [f"{stem.removesuffix('qkv')}{part}.{kind}" for part in FUSED["qkv"]]
            if all(part in expected for part in parts):
                total = sum(rows[part] for part in FUSED["qkv"])
                expected[ours] = (total, a.width) if kind == "weight" else (total,)
                for part in parts:
                    del expected[part]
    present = {ours for ours in checkpoint.tensors if not ours.startswith(("head.", "normalizer."))}
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
    for ours, shape in expected.items():
        found = checkpoint.shape(ours)
        if found != shape:
            raise TensorMismatchError(
                f"{where}: {checkpoint.tensors[ours][1]} has shape {found}, config.json asks for {shape}"
            )
    if "head.0.weight" not in checkpoint.tensors:
        raise MissingHeadError(f"{where}: the value head has no weight, only {listed(checkpoint.tensors, 3)}")


class Loader:
    """Places the tensors of one checkpoint on one device."""

    def __init__(self, checkpoint: Checkpoint, scheme: Scheme, device: torch.device, alibi: Alibi) -> None:
        self.checkpoint, self.scheme, self.device = checkpoint, scheme, device
        self.architecture = real_architecture(checkpoint)
        if isinstance(self.architecture.positions, Alibi):
            self.architecture = replace(self.architecture, positions=alibi)
        self.dtypes: set[str] = set()

    def load(self) -> tuple[Decoder, ValueHead, LoadReport]:
        started = time.perf_counter()
        a = self.architecture
        check_tensors(self.checkpoint)
        head = self.head()
        embedding = self.tensor("embedding.weight")
        layers = [self.layer(i) for i in range(a.layers)]
        decoder = Decoder(a, embedding, layers, self.tensor("final_norm.weight"))
        report = LoadReport(
            seconds=time.perf_counter() - started,
            bytes=a.parameters * self.scheme.dtype.itemsize,
            kernels=kernels_for(self.device),
            scheme=self.scheme,
            file_dtypes=tuple(sorted(self.dtypes)),
            ignored=self.checkpoint.ignored,
        )
        return decoder, head, report

    def read(self, ours: str) -> torch.Tensor:
        """Raises NumericsError if the tensor is not finite."""
        tensor = self.checkpoint.read(ours)
        self.dtypes.add(str(tensor.dtype).removeprefix("torch."))
        if not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise NumericsError(f"{self.checkpoint.tensors[ours][1]} holds {count} NaN or Inf values")
        return tensor

    def tensor(self, ours: str) -> torch.Tensor:
        return self.convert(self.read(ours), ours)

    def convert(self, tensor: torch.Tensor, ours: str) -> torch.Tensor:
        """On the device, in the compute dtype, in memory of its own (never a view of a mapped file)."""
        placed = tensor.to(self.device, self.scheme.dtype, copy=True)
        if self.scheme.dtype == torch.float16 and not torch.isfinite(placed).all():
            raise NumericsError(f"{self.checkpoint.tensors[ours][1]} overflows fp16: load with bf16 or fp32")
        return placed

    def layer(self, i: int) -> Layer:
        prefix = f"layers.{i}."
        return Layer(
            attention_norm_D=self.tensor(f"{prefix}attention_norm.weight"),
            qkv=self.fused(prefix, "qkv"),
            output=self.linear(f"{prefix}output"),
            mlp_norm_D=self.tensor(f"{prefix}mlp_norm.weight"),
            gate_up=self.fused(prefix, "gate_up"),
            down=self.linear(f"{prefix}down"),
        )

    def linear(self, stem: str) -> Linear:
        bias = f"{stem}.bias"
        return Linear(self.tensor(f"{stem}.weight"), self.tensor(bias) if bias in self.checkpoint.tensors else None)

    def fused(self, prefix: str, fused: str) -> Linear:
        if f"{prefix}{fused}.weight" in self.checkpoint.tensors:
            return self.linear(f"{prefix}{fused}")
        parts = FUSED[fused]
        bias = None
        if f"{prefix}{parts[0]}.bias" in self.checkpoint.tensors:
            bias = self.stacked([f"{prefix}{part}.bias" for part in parts])
        return Linear(self.stacked([f"{prefix}{part}.weight" for part in parts]), bias)

    def stacked(self, names: list[str]) -> torch.Tensor:
        """Parts one below the other, each converted straight into its rows."""
        shapes = [self.checkpoint.shape(name) for name in names]
        whole = torch.empty(sum(s[0] for s in shapes), *shapes[0][1:], dtype=self.scheme.dtype, device=self.device)
        start = 0
        for name, shape in zip(names, shapes, strict=True):
            whole[start : start + shape[0]] = self.convert(self.read(name), name)
            start += shape[0]
        return whole

    def head(self) -> ValueHead:
        """The value head in float32. Raises TensorMismatchError if its layers do not fit together."""
        tensors, width = self.checkpoint.tensors, self.architecture.width
        weights: list[torch.Tensor] = []
        biases: list[torch.Tensor | None] = []
        while f"head.{len(weights)}.weight" in tensors:
            stem = f"head.{len(weights)}"
            weight = self.read(f"{stem}.weight").to(self.device, torch.float32, copy=True)
            bias = None
            if f"{stem}.bias" in tensors:
                bias = self.read(f"{stem}.bias").to(self.device, torch.float32, copy=True)
            if weight.ndim != 2 or weight.shape[1] != width or (bias is not None and bias.shape != weight.shape[:1]):
                found = None if bias is None else tuple(bias.shape)
                raise TensorMismatchError(
                    f"{tensors[f'{stem}.weight'][1]} has shape {tuple(weight.shape)} with bias {found}, "
                    f"expected (outputs, {width}) and (outputs,)"
                )
            weights.append(weight)
            biases.append(bias)
            width = weight.shape[0]
        buffers = {name: self.read(name) for name in tensors if name.startswith("normalizer.")}
        post = self.checkpoint.layout.post(self.checkpoint.config, buffers)
        return ValueHead(tuple(weights), tuple(biases), post)
