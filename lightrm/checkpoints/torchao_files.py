"""Files that transformers saved after torchao quantized them to int8: `Int8Tensor`, taken apart into plain tensors.

For each linear layer X of O x I:

    X._weight_qdata       int8 (O, I)
    X._weight_scale       float32, on a grid: one number for each block_size = [rows, columns]
    X._weight_zero_point  int8, on the same grid; all zero in symmetric files
    the file's metadata   "X.weight": JSON with _type, block_size, dtype, and act_quant_kwargs if activations are int8

    weight[o, i] = scale * (qdata[o, i] - zero_point)      in float32, rounded to dtype, as `Int8Tensor.dequantize` does

One scale for each row, zero points of 0 and int8 activations are `schemes.int8`, which w8a8 keeps. Other classes of
tensors, and torchao's pickles of older versions, are refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lightrm.checkpoints.config import Config, shown
from lightrm.checkpoints.safe import SafeFile
from lightrm.checkpoints.source import PackedSource, Quantized, TensorSource
from lightrm.errors import CorruptFileError, TensorMismatchError, UnsupportedModelError
from lightrm.files import parse_json
from lightrm.schemes.int8 import Rowwise
from lightrm.schemes.scaled import Scaled

PARTS = ("qdata", "scale", "zero_point")
UNUSED = ("act_quant_scale", "act_quant_zero_point")  # of activations that are rounded by fixed scales
MARK = "._weight_qdata"
KIND, PLAIN = "Int8Tensor", "Tensor"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Layer:
    """How a weight is stored. block: rows and columns that share a scale. dtype: of the widened weight. kept: whether
    `schemes.int8` holds it."""

    shape: tuple[int, int]
    block: tuple[int, int]
    dtype: torch.dtype
    kept: bool


class TorchaoSource(PackedSource):
    """A source in which each tensor that torchao took apart appears as one weight."""

    def __init__(self, stored: TensorSource) -> None:
        super().__init__(stored)
        self.layers: dict[str, Layer] = {}
        for path, file in stored.opened.items():
            notes = file.notes if isinstance(file, SafeFile) else {}
            for name, text in notes.items():
                if "." in name and name not in stored.names and isinstance(text, str):
                    where = f"{path}: the metadata of {name!r}"
                    self.add(name, parse_json(text.encode(), where, CorruptFileError), where)
        strays = [name for name in self.names if "._weight_" in name]
        if strays:
            raise TensorMismatchError(f"torchao tensor {strays[0]!r} belongs to no weight that the metadata describes")
        self.holds = "w8a8" if self.layers and all(layer.kept for layer in self.layers.values()) else None

    def add(self, name: str, note: dict[str, Any], where: str) -> None:
        """Show a weight in place of its parts. Raises UnsupportedModelError, TensorMismatchError or
        CorruptFileError."""
        if note.get("_type") == PLAIN:
            return
        listed, data = note.get("_tensor_data_names"), note.get("_data")
        if note.get("_type") != KIND or not isinstance(listed, list) or set(listed) - {*PARTS, *UNUSED}:
            raise UnsupportedModelError(
                f"{where} says {shown(note.get('_type'))} of {shown(listed)}; of torchao's files lightrm reads {KIND} "
                f"of {', '.join(PARTS)}: take the model's full-precision files"
            )
        absent = [part for part in listed if self.part(name, part) not in self.stored.names]
        if absent or not {"qdata", "scale"} <= set(listed) or not isinstance(data, dict):
            raise TensorMismatchError(f"torchao layer {name!r} lacks {', '.join(absent) or 'its values or scales'}")
        self.layers[name] = self.layer(name, data, where, "zero_point" in listed)
        for part in listed:
            self.names.pop(self.part(name, part))
        self.names[name] = self.stored.names[self.part(name, "qdata")]

    def layer(self, name: str, data: dict[str, Any], where: str, zeros: bool) -> Layer:
        values, scale = self.part(name, "qdata"), self.part(name, "scale")
        shape, grid = self.stored.shape(values), self.stored.shape(scale)
        block, dtype = data.get("block_size"), data.get("dtype")
        named = DTYPES.get(str(dtype.get("_data"))) if isinstance(dtype, dict) else None
        sides = isinstance(block, list) and len(block) == 2 and all(type(side) is int and side > 0 for side in block)
        if not sides or block is None or named is None:
            raise CorruptFileError(f"{where} names the block {shown(block)} and the dtype {shown(dtype)}")
        fits = len(shape) == 2 and grid == tuple(-(-size // side) for size, side in zip(shape, block, strict=True))
        fits = fits and self.stored.dtype(values) == torch.int8 and self.stored.dtype(scale) in DTYPES.values()
        if not fits or (zeros and self.stored.shape(self.part(name, "zero_point")) != grid):
            raise TensorMismatchError(
                f"torchao layer {name!r}: {self.stored.dtype(values)} {shape} and scales {self.stored.dtype(scale)} "
                f"{grid} do not fit int8 in blocks of {block}"
            )
        symmetric = not zeros or not bool(self.stored.read(self.part(name, "zero_point")).any())
        kept = symmetric and block == [1, shape[1]] and rounds_inputs(data)
        return Layer((shape[0], shape[1]), (block[0], block[1]), named, kept)

    def part(self, name: str, part: str) -> str:
        """Return the name of one part of a weight."""
        stem, _, kind = name.rpartition(".")
        return f"{stem}._{kind}_{part}"

    def packed(self, name: str) -> Rowwise | None:
        if name not in self.layers or not self.layers[name].kept:
            return None
        values_OI, scale = (self.stored.read(self.part(name, part)) for part in ("qdata", "scale"))
        return Rowwise(values_OI, scale.float().view(-1))

    def quantized(self, name: str) -> Quantized | None:
        if name not in self.layers:
            return None
        layer, zero = self.layers[name], self.part(name, "zero_point")
        values_OI, scale = (self.stored.read(self.part(name, part)) for part in ("qdata", "scale"))
        zeros = self.stored.read(zero) if zero in self.stored.names else None
        return Scaled(values_OI, scale, zeros, layer.block, layer.dtype)

    def packed_shape(self, name: str) -> tuple[int, int] | None:
        return self.layers[name].shape if name in self.layers else None

    def dtype(self, name: str) -> torch.dtype | None:
        return self.layers[name].dtype if name in self.layers else self.stored.dtype(name)


def rounds_inputs(data: dict[str, Any]) -> bool:
    """Whether the activations of a layer are rounded to int8 around 0."""
    found = data.get("act_quant_kwargs")
    inner = found.get("_data") if isinstance(found, dict) else None
    mapping = inner.get("mapping_type") if isinstance(inner, dict) else None
    return isinstance(mapping, dict) and mapping.get("_data") == "SYMMETRIC"


def said_of_torchao(values: Config) -> str | None:
    """Return the scheme that keeps the values, as far as the config tells."""
    default = values.entries("quant_type").get("default")
    kind = default.get("_type") if isinstance(default, dict) else None
    return "w8a8" if kind == "Int8DynamicActivationInt8WeightConfig" else None
