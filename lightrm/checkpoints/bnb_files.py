"""Files that transformers saved after bitsandbytes quantized them: nf4 or fp4 in blocks, or LLM.int8.

For each linear layer X of O x I:

    4 bits   X.weight                  bytes (O * I / 2, 1)     see `schemes.blockwise`; under another dtype than
                                       uint8 where a trainer asked for it (bnb_4bit_quant_storage)
             X.weight.absmax           float32, or uint8 under double quantization
             X.weight.quant_map        float32 (16,)
             X.weight.nested_absmax, .nested_quant_map          under double quantization
             X.weight.quant_state.bitsandbytes__nf4 (__fp4)     JSON in bytes: shape, blocksize, dtype, nested_offset
    8 bits   X.weight                  int8 (O, I)
             X.SCB                     float32 (O,), the largest magnitude of each row, 127 times the scale
             X.weight_format           0: row by row

No bitsandbytes is needed to read them.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from lightrm.checkpoints.source import PackedSource, TensorSource
from lightrm.errors import CorruptFileError, TensorMismatchError, UnsupportedModelError
from lightrm.files import parse_json
from lightrm.schemes.blockwise import Blockwise, Nested
from lightrm.schemes.int8 import LEVELS, Rowwise

STATE = ".quant_state.bitsandbytes__"
KINDS = ("nf4", "fp4")
FOUR_BIT_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
MAXIMA, FORM, WEIGHT = ".SCB", ".weight_format", ".weight"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class FourBitSource(PackedSource):
    """A source in which each weight that has a quant_state appears as a plain weight."""

    holds = "nf4"

    def __init__(self, stored: TensorSource) -> None:
        super().__init__(stored)
        self.kinds: dict[str, str] = {}
        for name in stored.names:
            weight, mark, kind = name.partition(STATE)
            if mark:
                self.kinds[weight] = kind
        for weight, kind in self.kinds.items():
            if kind not in KINDS:
                raise UnsupportedModelError(f"bitsandbytes layer {weight!r} is of kind {kind!r}, expected nf4 or fp4")
            absent = [part for part in ("", *FOUR_BIT_PARTS[:2]) if weight + part not in stored.names]
            if absent:
                raise TensorMismatchError(f"bitsandbytes layer {weight!r} lacks {', '.join(absent)}")
            for part in (*FOUR_BIT_PARTS, STATE + kind):
                self.names.pop(weight + part, None)

    def state(self, name: str) -> dict[str, Any]:
        """Return the quant_state of a weight. Raises CorruptFileError."""
        stored = self.stored.read(name + STATE + self.kinds[name])
        where = f"{self.stored.names[name]}: the quant_state of layer {name!r}"
        if stored.dtype != torch.uint8 or stored.ndim != 1:
            raise CorruptFileError(f"{where} is not bytes, but {stored.dtype} {tuple(stored.shape)}")
        try:
            state = parse_json(bytes(stored.tolist()), where, CorruptFileError)
            outputs, inputs = map(int, state["shape"])
            state |= {"shape": (outputs, inputs), "blocksize": int(state["blocksize"]), "dtype": DTYPES[state["dtype"]]}
            if state["blocksize"] < 1:
                raise ValueError(f"blocks of {state['blocksize']}")
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptFileError(f"{where} cannot be read: {error!r}") from error
        return state

    def nested(self, name: str, state: dict[str, Any]) -> Nested:
        """Return what the maxima of a weight were quantized with. Raises TensorMismatchError or CorruptFileError."""
        table, outer = (vector(self.stored, name + part) for part in (".nested_quant_map", ".nested_absmax"))
        try:
            block, offset = int(state["nested_blocksize"]), float(state["nested_offset"])
            if block < 1:
                raise ValueError(f"blocks of {block}")
        except (ValueError, KeyError, TypeError) as error:
            where = f"{self.stored.names[name]}: the quant_state of layer {name!r}"
            raise CorruptFileError(f"{where} does not tell how its maxima are quantized: {error!r}") from error
        return Nested(table, outer, block, offset)

    def packed(self, name: str) -> Blockwise | None:
        if name not in self.kinds:
            return None
        state, read = self.state(name), self.stored.read
        stored, level, maximum = read(name), read(name + ".quant_map"), vector(self.stored, name + ".absmax")
        packed = stored.contiguous().view(-1).view(torch.uint8)
        count = math.prod(state["shape"])
        fits = len(packed) == (count + 1) // 2 and level.shape == (16,)
        if not fits or len(maximum) != -(-count // state["blocksize"]):
            raise TensorMismatchError(
                f"bitsandbytes layer {name!r}: {len(packed)} bytes of {stored.dtype} and {len(maximum)} maxima do not "
                f"fit a weight of {state['shape']} in blocks of {state['blocksize']}"
            )
        nested = self.nested(name, state) if maximum.dtype == torch.uint8 else None
        if nested and (nested.table.shape != (256,) or len(nested.outer) != -(-len(maximum) // nested.block)):
            raise TensorMismatchError(f"bitsandbytes layer {name!r}: {len(nested.outer)} nested maxima do not fit")
        kind = self.kinds[name]
        return Blockwise(packed, maximum, level, state["shape"], state["blocksize"], kind, state["dtype"], nested)

    def packed_shape(self, name: str) -> tuple[int, int] | None:
        found: tuple[int, int] | None = self.state(name)["shape"] if name in self.kinds else None
        return found


class EightBitSource(PackedSource):
    """A source in which each weight that has an SCB appears as a plain weight."""

    holds = "bnb-int8"

    def __init__(self, stored: TensorSource) -> None:
        super().__init__(stored)
        for name in stored.names:
            if name.endswith(MAXIMA):
                self.hide(name.removesuffix(MAXIMA))

    def hide(self, stem: str) -> None:
        if stem + WEIGHT not in self.names:
            raise TensorMismatchError(f"bitsandbytes layer {stem!r} lacks its weight")
        self.names.pop(stem + MAXIMA)
        if self.names.pop(stem + FORM, None) is not None and self.stored.read(stem + FORM).tolist() not in (0, [0]):
            raise UnsupportedModelError(
                f"bitsandbytes layer {stem!r} is stored in a tiled form that depends on the card it was made on: "
                "save it again with bitsandbytes 0.45 or later"
            )

    def packed(self, name: str) -> Rowwise | None:
        if self.packed_shape(name) is None:
            return None
        values_OI, maximum_O = self.stored.read(name), vector(self.stored, name.removesuffix(WEIGHT) + MAXIMA)
        if values_OI.dtype != torch.int8 or len(maximum_O) != len(values_OI):
            raise TensorMismatchError(
                f"bitsandbytes layer {name!r}: {values_OI.dtype} {tuple(values_OI.shape)} does not fit "
                f"{len(maximum_O)} row maxima"
            )
        return Rowwise(values_OI, maximum_O.float() / LEVELS)

    def packed_shape(self, name: str) -> tuple[int, int] | None:
        if not name.endswith(WEIGHT) or name.removesuffix(WEIGHT) + MAXIMA not in self.stored.names:
            return None
        shape = self.stored.shape(name)
        if len(shape) != 2:
            raise TensorMismatchError(f"bitsandbytes layer {name!r} has the shape {shape}, expected a matrix")
        return shape[0], shape[1]


def vector(stored: TensorSource, name: str) -> torch.Tensor:
    """Return a tensor that lists numbers. Raises TensorMismatchError if it is missing or has another shape."""
    if name not in stored.names:
        raise TensorMismatchError(f"the bitsandbytes checkpoint lacks {name!r}")
    found = stored.read(name)
    if found.ndim != 1:
        raise TensorMismatchError(f"{stored.names[name]}: {name!r} has the shape {tuple(found.shape)}, expected a list")
    return found


def bitsandbytes_source(source: TensorSource) -> PackedSource | None:
    """Return the source read through the format that its tensor names show; None if they show none."""
    if any(STATE in name for name in source.names):
        return FourBitSource(source)
    if any(name.endswith(MAXIMA) for name in source.names):
        return EightBitSource(source)
    return None
