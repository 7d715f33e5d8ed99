"""A quantized layer as tensors by name, and back, in every form that calibration rounds to."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from lightrm.architecture import LINEARS, Architecture
from lightrm.kernels.operands import Held, Parts
from lightrm.model.decoder import Layer, field_of
from lightrm.model.linear import Linear
from lightrm.schemes.grouped import Grouped
from lightrm.schemes.int4 import Int4
from lightrm.schemes.int8 import Rowwise

LinearOf = Callable[[str, Held, torch.Tensor | None, torch.Tensor | None], Linear]


def tensors_of(layer: Layer) -> dict[str, torch.Tensor]:
    """Return all that a layer holds."""
    found: dict[str, torch.Tensor | None] = {}
    for name in LINEARS:
        linear: Linear = getattr(layer, name)
        found |= {f"{name}.{part}": tensor for part, tensor in parts_of(linear.weight).items()}
        found |= {f"{name}.bias": linear.bias_O, f"{name}.shift": linear.shift_I}
    for field in ("attention_norm_D", "mlp_norm_D", *OTHER_NORMS):
        found[field] = getattr(layer, field)
    return {name: tensor for name, tensor in found.items() if tensor is not None}


OTHER_NORMS = ("attention_post_norm_D", "mlp_post_norm_D", "query_norm_E", "key_norm_E")


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


def layer_of(tensors: Mapping[str, torch.Tensor], a: Architecture, linear_of: LinearOf) -> Layer:
    """Put a layer together. linear_of: makes a linear layer of its name, weight, bias and shift."""

    def linear(name: str) -> Linear:
        held = {part.partition(".")[2]: t for part, t in tensors.items() if part.startswith(f"{name}.")}
        bias, shift = held.pop("bias", None), held.pop("shift", None)
        weight: Held
        if "values" in held:
            weight = Rowwise(held["values"], held["scale"])
        elif "multiplier" in held:
            weight = Int4(held["packed"], held["multiplier"], held["scale"])
        else:
            weight = Parts((Grouped(held["packed"], held["zero"], held["scale"], held["group"], int(held["bits"])),))
        return linear_of(name, weight, bias, shift)

    norms = {field_of(name): tensors.get(field_of(name)) for name in a.norms}
    return Layer(qkv=linear("qkv"), output=linear("output"), gate_up=linear("gate_up"), down=linear("down"), **norms)
