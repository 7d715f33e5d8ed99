"""The value head of a checkpoint, with its gate if it has one: read, checked, condensed, folded; always in float32."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from lightrm.checkpoints.checkpoint import Checkpoint
from lightrm.checkpoints.head_outputs import label_names, promised
from lightrm.errors import TensorMismatchError
from lightrm.model.gate import Gate
from lightrm.model.head import ValueHead

if TYPE_CHECKING:
    from lightrm.loading.loader import Loader

BATCH_NORM_EPS = 1e-5  # PyTorch's default, which no config names
Layers = tuple[list[torch.Tensor], list[torch.Tensor | None]]  # weights and biases


def read_head(loader: Loader, final_norm_D: torch.Tensor) -> ValueHead:
    """Return the head, the final norm folded into what reads the hidden state. Raises TensorMismatchError if its layers
    do not fit together."""
    checkpoint = loader.checkpoint
    layout, config = checkpoint.layout, checkpoint.config
    weights, biases = read_layers(loader, "head")
    if layout.condense is not None:
        weights[-1] = layout.condense(config, weights[-1])
        last = biases[-1]
        biases[-1] = None if last is None else layout.condense(config, last)
    gate = None
    if layout.gate is not None:
        gate = read_gate(loader, len(weights[-1]))
        if layout.gate.adjusts and gate.transform_KK is not None:
            weights[-1] = gate.transform_KK.T @ weights[-1]
            gate = Gate(gate.form, gate.weights, gate.biases, gate.factor)
    if loader.folding is not None:
        norm_D = loader.float_copy(final_norm_D)
        loader.folding.reads_last(weights[0], norm_D)
        if gate is not None:
            loader.folding.reads_last(gate.weights[0], norm_D)
    names = attribute_names(checkpoint, len(weights[-1]))
    buffers = {name: loader.read(name) for name in checkpoint.tensors if name.startswith("normalizer.")}
    return ValueHead(tuple(weights), tuple(biases), layout.post(config, buffers), names, gate)


def read_layers(loader: Loader, stem: str) -> Layers:
    """Return the linear layers `stem.0`, `stem.1`, ... of an MLP on the hidden state."""
    tensors, width = loader.checkpoint.tensors, loader.architecture.width
    weights: list[torch.Tensor] = []
    biases: list[torch.Tensor | None] = []
    while (name := f"{stem}.{len(weights)}.weight") in tensors:
        weight = loader.float_copy(loader.read(name))
        bias = None
        if (beside := name.replace(".weight", ".bias")) in tensors:
            bias = loader.float_copy(loader.read(beside))
        if weight.ndim != 2 or weight.shape[1] != width or (bias is not None and bias.shape != weight.shape[:1]):
            found = None if bias is None else tuple(bias.shape)
            raise TensorMismatchError(
                f"{tensors[name][1]} has shape {tuple(weight.shape)} with bias {found}, "
                f"expected (outputs, {width}) and (outputs,)"
            )
        weights.append(weight)
        biases.append(bias)
        width = weight.shape[0]
    return weights, biases


def read_gate(loader: Loader, outputs: int) -> Gate:
    """Return the gate of a head with that many outputs. Batch norms and temperature are part of its layers then."""
    checkpoint = loader.checkpoint
    form, tensors = checkpoint.layout.gate, checkpoint.tensors
    assert form is not None
    weights, biases = read_layers(loader, "gate")
    if not weights or len(weights[-1]) != outputs:
        found = [tuple(weight.shape) for weight in weights]
        raise TensorMismatchError(f"{checkpoint.folder}: the gate's layers are {found}, the head has {outputs} outputs")
    for k in range(len(weights) - 1):
        if f"gate.{k}.norm.weight" in tensors:
            fold_batch_norm(loader, k, weights, biases)
    if form.softmax:
        temperature = checkpoint.config.number("gating_temperature", 10.0, positive=True)
        weights[-1] = weights[-1] / temperature
        last = biases[-1]
        biases[-1] = None if last is None else last / temperature
    factor = one(loader, "gate.factor", (1,))
    transform = one(loader, "gate.transform", (outputs, outputs))
    ones = torch.ones(1, device=loader.device)
    return Gate(form, tuple(weights), tuple(biases), ones if factor is None else factor, transform)


def fold_batch_norm(loader: Loader, k: int, weights: list[torch.Tensor], biases: list[torch.Tensor | None]) -> None:
    """Put the batch norm behind the activation of layer k into layer k + 1, which reads it: x * scale + shift."""
    shape = (len(weights[k]),)
    parts = {part: one(loader, f"gate.{k}.norm.{part}", shape) for part in ("weight", "bias", "mean", "var")}
    scale, shift, mean, var = parts["weight"], parts["bias"], parts["mean"], parts["var"]
    if scale is None or shift is None or mean is None or var is None:
        raise TensorMismatchError(f"{loader.checkpoint.folder}: batch norm {k} of the gate lacks one of {list(parts)}")
    scale = scale / (var + BATCH_NORM_EPS).sqrt()
    moved = weights[k + 1] @ (shift - mean * scale)
    before = biases[k + 1]
    weights[k + 1] = weights[k + 1] * scale
    biases[k + 1] = moved if before is None else before + moved


def one(loader: Loader, ours: str, shape: tuple[int, ...]) -> torch.Tensor | None:
    """Return a tensor of the gate, None if there is none. Raises TensorMismatchError on another shape."""
    if ours not in loader.checkpoint.tensors:
        return None
    tensor = loader.float_copy(loader.read(ours))
    if tensor.shape != shape:
        found = loader.checkpoint.tensors[ours][1]
        raise TensorMismatchError(f"{found} has shape {tuple(tensor.shape)}, expected {shape}")
    return tensor


def attribute_names(checkpoint: Checkpoint, outputs: int) -> tuple[str, ...]:
    """Return the names of a head's outputs; none if they are not attributes, or if there is only one."""
    layout, config = checkpoint.layout, checkpoint.config
    if layout.outputs != "attributes" or outputs == 1:
        return ()
    return label_names(config, outputs) if layout.attributes is None else layout.attributes(config, outputs)


def said_outputs(checkpoint: Checkpoint) -> str:
    """Return what a model gives for a text, in words, without reading a weight."""
    layout = checkpoint.layout
    if layout.steps:
        return f"a probability for each step of an answer, in the form {layout.steps!r}"
    heads = sorted(name for name in checkpoint.tensors if re.fullmatch(r"head\.\d+\.weight", name))
    rows: int | None = 1
    if heads and layout.outputs == "attributes":
        rows = checkpoint.shape(heads[-1])[0] if checkpoint.shaped else promised(checkpoint.config)
    if rows is None:
        return "one score, or several attributes: config.json does not say which"
    if rows > 1 and layout.condense is not None:
        rows = len(layout.condense(checkpoint.config, torch.empty(rows, 1)))
    names = attribute_names(checkpoint, rows)
    if names:
        gated = ", and one score, for which a gate weighs them" if layout.gate is not None else ""
        return f"{rows} attributes: {', '.join(names)}{gated}"
    return "one score"
