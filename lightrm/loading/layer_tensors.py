"""A quantized layer as tensors by name, and back, in every form that lightrm rounds to: for its own folders, and for
what a calibration keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from lightrm.architecture import LINEARS, Architecture
from lightrm.kernels.operands import Held, Parts
from lightrm.model.decoder import Layer, field_of
from lightrm.model.linear import Linear
from lightrm.schemes.grouped import Grouped
from lightrm.schemes.int4 import Int4
from lightrm.schemes.int8 import Rowwise

LinearOf = Callable[[str, Held, torch.Tensor | None, torch.Tensor | None], Linear]


def tensors_of(layer: Layer, a: Architecture) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all that a layer holds, with its name."""
    for name in LINEARS:
        linear: Linear = getattr(layer, name)
        for part, tensor in parts_of(linear.weight).items():
            yield f"{name}.{part}", tensor
        for part, vector in (("bias", linear.bias_O), ("shift", linear.shift_I)):
            if vector is not None:
                yield f"{name}.{part}", vector
    for name in a.norms:
        if (norm := getattr(layer, field_of(name))) is not None:
            yield name, norm


def parts_of(weight: Held) -> dict[str, torch.Tensor]:
    if isinstance(weight, Rowwise):
        return {"values": weight.values_OI, "scale": weight.scale_O}
    if isinstance(weight, Int4):
        return {"packed": weight.packed, "multiplier": weight.multiplier_OG, "scale": weight.scale_O}
    assert isinstance(weight, Parts)
    (one,) = weight.parts
    assert isinstance(one, Grouped)
    bits = torch.tensor([one.bits], dtype=torch.int32)
    return {"packed": one.packed, "zero": one.zero_GO, "scale": one.scale_GO, "group": one.group_I, "bits": bits}


def held_of(parts: Mapping[str, torch.Tensor]) -> Held:
    """Return the weight of which these are the parts."""
    if "values" in parts:
        return Rowwise(parts["values"], parts["scale"])
    if "multiplier" in parts:
        return Int4(parts["packed"], parts["multiplier"], parts["scale"])
    return Parts((Grouped(parts["packed"], parts["zero"], parts["scale"], parts["group"], int(parts["bits"])),))


def layer_of(tensors: Mapping[str, torch.Tensor], a: Architecture, linear_of: LinearOf) -> Layer:
    """Put a layer together. linear_of: makes a linear layer of its name, weight, bias and shift."""

    def linear(name: str) -> Linear:
        parts = {part.partition(".")[2]: t for part, t in tensors.items() if part.startswith(f"{name}.")}
        bias, shift = parts.pop("bias", None), parts.pop("shift", None)
        return linear_of(name, held_of(parts), bias, shift)

    norms = {field_of(name): tensors.get(name) for name in a.norms}
    return Layer(qkv=linear("qkv"), output=linear("output"), gate_up=linear("gate_up"), down=linear("down"), **norms)
