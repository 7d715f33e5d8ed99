"""LoRA adapters that were never merged: `adapter_config.json`, low-rank pairs, and a head beside them.

    merged = base + scale * B @ A,   scale = alpha / r, or alpha / sqrt(r) for rank-stabilized LoRA

(arXiv 2106.09685, 2312.03732), in float32, one tensor at a time while loading. Other tensors of the adapter file (a
trained `score` head, biases, some rows of an embedding) replace those of the base. Weight-decomposed LoRA (use_dora,
arXiv 2402.09353) gives each row of the merged weight its own length. Two initializations subtract their first factors
from the base weight, when training starts and again when peft loads the adapter, so lightrm subtracts them too:

    pissa    the first r singular triples of the base (arXiv 2404.02948)
    olora    scale * Q_r @ R_r of its QR decomposition (arXiv 2406.01775)

`adapter_config` reads the settings.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lightrm.checkpoints.adapter_config import (
    CONFIG,
    MERGE,
    check_settings,
    initialization,
    scale_of,
    stem_of,
    token_indices,
)
from lightrm.checkpoints.config import read_config
from lightrm.checkpoints.source import TensorSource
from lightrm.errors import CheckpointError, NumericsError, TensorMismatchError, UnsupportedModelError

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
WRAPPER = "base_model.model."
# What a tensor of the file is of the base's weight or bias that group 1 names.
KINDS = {
    "A": r"(.+)\.lora_A(?:\.default)?\.weight",
    "B": r"(.+)\.lora_B(?:\.default)?\.weight",
    "embedded A": r"(.+)\.lora_embedding_A(?:\.default)?(?:\.weight)?",
    "embedded B": r"(.+)\.lora_embedding_B(?:\.default)?(?:\.weight)?",
    "shift": r"(.+)\.lora_B(?:\.default)?\.bias",
    "lengths": r"(.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?",
    "rows": r"(.+)\.token_adapter\.trainable_tokens_delta(?:\.default)?",
}


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter, read. Keys are names of changed tensors: in the base or, for a replaced tensor, in the adapter file.

    replaced: base name -> name in the adapter file, for each tensor that the adapter replaces.
    pairs: names of A (r, I) and B (O, r), with their scale.
    shifts: biases that are added, with their scale.
    rows: indices and values of replaced rows.
    lengths: DoRA's lengths of rows.
    transposed: embeddings, whose pairs are stored transposed.
    taken_off: the initialization whose factors are subtracted, if any.
    base, revision: where the base model was.
    """

    source: TensorSource
    pairs: dict[str, tuple[str, str]]
    scale: dict[str, float]
    replaced: dict[str, str]
    base: str | None
    shifts: dict[str, str] = field(default_factory=dict)
    rows: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    lengths: dict[str, str] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    taken_off: str | None = None
    revision: str | None = None

    def merge(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return one tensor with the adapter merged; float32 if the adapter changes it."""
        if name in self.shifts:
            shift = self.source.read(self.shifts[name]).float()
            if shift.shape != tensor.shape:
                raise TensorMismatchError(
                    f"LoRA bias of {name!r}: {tuple(shift.shape)} does not fit the base's {tuple(tensor.shape)}"
                )
            shifted: torch.Tensor = tensor.float() + self.scale[name] * shift
            return shifted
        if name in self.rows:
            which, stored = self.rows[name]
            new = self.source.read(stored).float()
            if new.shape != (len(which), *tensor.shape[1:]) or not all(0 <= row < len(tensor) for row in which):
                raise TensorMismatchError(
                    f"trained tokens of {name!r}: {tuple(new.shape)} for {len(which)} indices do not fit the base's "
                    f"{tuple(tensor.shape)}"
                )
            tensor = tensor.float().index_copy(0, torch.tensor(which), new)
        if name not in self.pairs:
            return tensor
        low, high = (self.source.read(part).float() for part in self.pairs[name])
        across = name in self.transposed
        weight_OI = tensor.float().T if across else tensor.float()
        shape = weight_OI.shape
        if len(shape) != 2 or low.shape[1] != shape[1] or high.shape != (shape[0], low.shape[0]):
            raise TensorMismatchError(
                f"LoRA pair of {name!r}: A {tuple(low.shape)} and B {tuple(high.shape)} do not fit "
                f"the base weight {tuple(tensor.shape)}"
            )
        if self.taken_off is not None:
            if not bool(torch.isfinite(weight_OI).all()):
                raise NumericsError(f"{name} of the adapter's base holds NaN or Inf values")
            weight_OI = weight_OI - first_factors(weight_OI, low.shape[0], self.taken_off, self.scale[name])
        merged: torch.Tensor = weight_OI + self.scale[name] * (high @ low)
        if name in self.lengths:
            length_O = self.source.read(self.lengths[name]).float().view(-1)
            if len(length_O) != len(merged):
                raise TensorMismatchError(f"DoRA of {name!r}: {len(length_O)} lengths for {len(merged)} rows")
            merged = merged * (length_O / merged.norm(dim=1)).view(-1, 1)
        return merged.T.contiguous() if across else merged


def first_factors(weight_OI: torch.Tensor, rank: int, kind: str, scale: float) -> torch.Tensor:
    """Return what the initialization subtracted from a base weight, float32 (O, I).

    The singular vectors come from the smaller Gram matrix in float64: a full decomposition of a layer takes minutes.
    """
    if kind == "olora":
        q, r = torch.linalg.qr(weight_OI)
        projected: torch.Tensor = scale * (q[:, :rank] @ r[:rank])
        return projected
    outputs, inputs = weight_OI.shape
    across = inputs < outputs
    rows = (weight_OI.T if across else weight_OI).double()
    _, vectors = torch.linalg.eigh(rows @ rows.T)  # in ascending order
    first = vectors[:, -rank:]
    taken: torch.Tensor = (first @ (first.T @ rows)).float()
    return taken.T if across else taken


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter. Raises CheckpointError, UnsupportedModelError or TensorMismatchError."""
    config = read_config(folder, CONFIG)
    check_settings(config)
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{folder} has {CONFIG} but none of {', '.join(WEIGHTS)}")
    source = TensorSource([path])
    found, replaced = sorted_names(source)
    pairs = paired(found, path)
    for name in (name for pair in pairs.values() for name in pair):
        if len(source.shape(name)) != 2:
            raise TensorMismatchError(f"{path}: {name!r} has the shape {source.shape(name)}, expected a matrix")
    use_dora, taken_off = config.flag("use_dora"), initialization(config)
    if use_dora != bool(found["lengths"]) or (use_dora and found["lengths"].keys() != pairs.keys()):
        raise TensorMismatchError(
            f"{path}: {len(found['lengths'])} of {len(pairs)} pairs have DoRA's lengths, {CONFIG} says use_dora "
            f"{use_dora}"
        )
    if found["embedded A"] and (taken_off is not None or use_dora):
        kind = "use_dora" if use_dora else f"init_lora_weights {taken_off!r}"
        raise UnsupportedModelError(f"{config.path}: {kind} of an embedding; {MERGE}")
    scale = {name: scale_of(config, name, source.shape(low)) for name, (low, _) in pairs.items()}
    shifts = {f"{stem_of(name)}.bias": stored for name, stored in found["shift"].items()}
    scale |= {bias: scale[f"{stem_of(bias)}.weight"] for bias in shifts}
    at = {name: replaced.get(name, name) for name in (*scale, *found["rows"])}
    base, revision = config.raw.get("base_model_name_or_path"), config.raw.get("revision")
    return Adapter(
        source=source,
        pairs={at[name]: pair for name, pair in pairs.items()},
        scale={at[name]: value for name, value in scale.items()},
        replaced=replaced,
        base=base if isinstance(base, str) and base else None,
        shifts={at[bias]: stored for bias, stored in shifts.items()},
        rows={at[name]: (token_indices(config, name), stored) for name, stored in found["rows"].items()},
        lengths={at[name]: stored for name, stored in found["lengths"].items()},
        transposed=frozenset(at[name] for name in found["embedded A"]),
        taken_off=taken_off,
        revision=revision if isinstance(revision, str) and revision else None,
    )


def sorted_names(source: TensorSource) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Return the adapter's tensors by kind, each as: name of the base's weight -> name in the file; and the tensors
    that replace those of the base.

    Raises UnsupportedModelError on a tensor of another method.
    """
    found: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
    replaced: dict[str, str] = {}
    for name, path in source.names.items():
        plain = name.removeprefix(WRAPPER).replace(".base_layer.", ".")
        matches = ((kind, re.fullmatch(pattern, plain)) for kind, pattern in KINDS.items())
        kind, stem = next(((kind, match[1]) for kind, match in matches if match is not None), ("", ""))
        if kind:
            found[kind][f"{stem}.weight"] = name
        elif "lora_" in plain or "token_adapter" in plain:
            raise UnsupportedModelError(f"{path}: {name!r} is not a plain LoRA pair; {MERGE}")
        else:
            replaced[plain.replace(".modules_to_save.default", "").replace(".modules_to_save", "")] = name
    return found, replaced


def paired(found: dict[str, dict[str, str]], path: Path) -> dict[str, tuple[str, str]]:
    """Return the names of both halves of each pair. Raises TensorMismatchError on half a pair, and on a tensor that
    belongs to a pair which is missing."""
    low, high = found["A"] | found["embedded A"], found["B"] | found["embedded B"]
    alone = sorted(low.keys() ^ high.keys())
    if alone:
        raise TensorMismatchError(f"{path}: {alone[0]!r} has only one half of its LoRA pair")
    lonely = [name for name in found["shift"] if name not in low]
    if lonely:
        raise TensorMismatchError(f"{path}: the bias of {lonely[0]!r} is changed, but it has no LoRA pair")
    return {name: (low[name], high[name]) for name in low}
