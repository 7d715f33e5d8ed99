"""Files in 8-bit floats with a scale for each block, as DeepSeek and Qwen publish them, or for each matrix, as AutoFP8.

For each quantized layer X of O x I:

    X.weight            float8_e4m3fn (O, I)
    X.weight_scale_inv  float (ceil(O / R), ceil(I / C)) for blocks of weight_block_size = [R, C]; one number without it
    X.weight_scale      the same under AutoFP8's name
    X.input_scale, X.activation_scale    of rounded activations, which lightrm does not round so

    weight[o, i] = q[o, i] * weight_scale_inv[o / R, i / C]      in float32; `inv` is the inverse of what divided

No kernel of lightrm multiplies 8-bit floats, so the values are only widened.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lightrm.checkpoints.config import Config, shown
from lightrm.checkpoints.source import PackedSource, Quantized, TensorSource
from lightrm.errors import TensorMismatchError, UnsupportedModelError
from lightrm.schemes.scaled import Scaled

WEIGHT = ".weight"
SCALES = (".weight_scale_inv", ".weight_scale")
BESIDE = (*SCALES, ".input_scale", ".activation_scale")
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# What a config may say; None: at any value, since tensors show it or it concerns activations or no decoder of ours.
FIELDS: dict[str, tuple[object, ...] | None] = {
    "quant_method": None, "activation_scheme": None, "modules_to_not_convert": None, "ignored_layers": None,
    "modules_to_convert": None, "weight_block_size": None, "dequantize": None, "fmt": ("e4m3",),
    "scale_fmt": None, "expert_dtype": None, "weight_dtype": ("fp8", "e4m3"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fp8Terms:
    """block: rows and columns that share a scale, None for one scale. where: the file that says it."""

    block: tuple[int, int] | None
    where: str


class Fp8Source(PackedSource):
    """A source in which each float8 weight appears as a plain one."""

    holds = None

    def __init__(self, stored: TensorSource, terms: Fp8Terms) -> None:
        super().__init__(stored)
        self.terms = terms
        self.scales: dict[str, str] = {}  # of each weight
        for name in stored.names:
            if name.endswith(WEIGHT) and stored.dtype(name) == torch.float8_e4m3fn:
                self.add(name)

    def add(self, name: str) -> None:
        """Check a weight and its scale. Raises TensorMismatchError."""
        stem, shape = name.removesuffix(WEIGHT), self.stored.shape(name)
        scale = next((stem + end for end in SCALES if stem + end in self.stored.names), None)
        if scale is None or len(shape) != 2:
            raise TensorMismatchError(f"fp8 layer {stem!r} of {shape} has no {SCALES[0]}, or is not a matrix")
        expected, found, dtype = self.grid(shape), self.stored.shape(scale), self.stored.dtype(scale)
        if (found if len(found) == 2 else (*found, 1, 1)[:2]) != expected or dtype not in FLOATS:
            raise TensorMismatchError(
                f"fp8 layer {stem!r}: {scale} is {dtype} {found}; {self.terms.where} asks for floats {expected}, for "
                f"{'one scale' if self.terms.block is None else f'blocks of {self.terms.block}'}"
            )
        self.scales[name] = scale
        for part in BESIDE:
            self.names.pop(stem + part, None)

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the scales of a weight."""
        if self.terms.block is None:
            return 1, 1
        return tuple(-(-size // side) for size, side in zip(shape, self.terms.block, strict=True))

    def packed(self, name: str) -> None:
        return None

    def quantized(self, name: str) -> Quantized | None:
        if name not in self.scales:
            return None
        values_OI, scale = self.stored.read(name), self.stored.read(self.scales[name])
        shape = values_OI.shape[0], values_OI.shape[1]
        return Scaled(values_OI, scale.view(self.grid(shape)), None, self.terms.block or shape, torch.float32)

    def packed_shape(self, name: str) -> tuple[int, int] | None:
        return None  # the stored one is right

    def dtype(self, name: str) -> torch.dtype | None:
        """Return the dtype that a weight was made from: these models are trained in bfloat16, and need its range."""
        return torch.bfloat16 if name in self.scales else self.stored.dtype(name)


def read_fp8_terms(values: Config, where: str) -> Fp8Terms:
    """Raises UnsupportedModelError on what lightrm does not read."""
    for name, value in values.raw.items():
        allowed = FIELDS.get(name, ())
        if value is not None and allowed is not None and value not in allowed:
            raise UnsupportedModelError(
                f"{where} has {name} {shown(value)}, which lightrm does not read of fp8 files; take the model's "
                "full-precision files"
            )
    block: Any = values.raw.get("weight_block_size")
    if block is None:
        return Fp8Terms(None, where)
    if isinstance(block, list) and len(block) == 2 and all(type(side) is int and 0 < side < 2**31 for side in block):
        return Fp8Terms((block[0], block[1]), where)
    raise UnsupportedModelError(f"{where}: weight_block_size must be two positive whole numbers, found {shown(block)}")
