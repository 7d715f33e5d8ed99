"""What the quantization_config of compressed-tensors (llm-compressor, vLLM) says, read field by field.

`config_groups` lists the kinds of quantized layers of the model, each with its targets. Which layer is of which kind is
read from the tensors themselves, since they show it: dtype, shapes of the scales, zero points. The config says what
tensors cannot: that activations are rounded to int8 too, or that something else changes the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightrm.checkpoints.config import Config, shown
from lightrm.errors import ConfigError, UnsupportedModelError

FORMATS = ("int-quantized", "pack-quantized", "float-quantized", "naive-quantized")
MIXED = "mixed-precision"  # each group then has a format of its own
STRATEGIES = ("tensor", "channel", "group", "block")
# Fields that change nothing for a reader of tensors, in compressed-tensors and in transformers' own class.
NOTES = (
    "quant_method", "quantization_status", "global_compression_ratio", "ignore", "version", "run_compressed",
    "dequantize", "use_optimized_inference",
)  # fmt: skip
CURE = "take the model's full-precision files"


@dataclass(frozen=True, slots=True)
class Group:
    """One kind of quantized layers.

    kind: "int" or "float". inputs: of a group, or None. block: rows and columns, or None. rounds_inputs: whether
    activations are int8 as well.
    """

    name: str
    format: str
    kind: str
    bits: int
    strategy: str
    symmetric: bool
    inputs: int | None
    block: tuple[int, int] | None
    rounds_inputs: bool

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the shape of the scales of a weight."""
        outputs, inputs = shape
        if self.block is not None:
            return -(-outputs // self.block[0]), -(-inputs // self.block[1])
        if self.inputs is not None:
            return outputs, -(-inputs // self.inputs)
        return (1, 1) if self.strategy == "tensor" else (outputs, 1)

    def cell(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns that share a scale."""
        if self.block is not None:
            return self.block
        return shape[0] if self.strategy == "tensor" else 1, self.inputs or shape[1]

    def __str__(self) -> str:
        return f"{self.kind}{self.bits} by {self.strategy}{'' if self.symmetric else ', asymmetric'}"


@dataclass(frozen=True, slots=True)
class CompressedTerms:
    """groups: the kinds of layers. where: the file that says it."""

    groups: tuple[Group, ...]
    where: str

    @property
    def holds(self) -> str | None:
        """The scheme that keeps the values, as far as the config tells."""
        if all(group.format == "pack-quantized" for group in self.groups):
            return "w4a16"
        kept = all(
            group.kind == "int"
            and group.bits == 8
            and group.strategy == "channel"
            and group.symmetric
            and group.rounds_inputs
            and group.format != "pack-quantized"
            for group in self.groups
        )
        return "w8a8" if kept else None


def read_compressed_terms(values: Config, where: str) -> CompressedTerms:
    """Raises UnsupportedModelError on what lightrm does not read, ConfigError on a field of another type."""
    form = values.text("format") if values.has("format") else "none"
    for name, value in values.raw.items():
        if name not in (*NOTES, "format", "config_groups") and not absent(name, value):
            raise UnsupportedModelError(
                f"{where} has {name} {shown(value)}, which changes the model or its files; lightrm does not read it: "
                f"{CURE}"
            )
    raw = values.entries("config_groups")
    if not raw:
        raise ConfigError(f"{where} has no config_groups: nothing says how the weights are quantized")
    return CompressedTerms(tuple(group_of(str(name), group, form, values, where) for name, group in raw.items()), where)


def absent(name: str, value: Any) -> bool:
    """Whether a field says that a part is not there."""
    if name == "sparsity_config" and isinstance(value, dict):
        return bool(value.get("format", "dense") == "dense")
    return value in (None, {}, [], False)


def group_of(name: str, raw: Any, form: str, values: Config, where: str) -> Group:
    if not isinstance(raw, dict):
        raise UnsupportedModelError(f"{where} names the preset {name!r}; lightrm reads groups that are written out")
    fields = Config(raw, values.path)
    where = f"{where} group {name!r}"
    own = fields.text("format") if fields.has("format") else form
    if own not in FORMATS or (form not in FORMATS and form != MIXED):
        raise UnsupportedModelError(
            f"{where} is stored as {own if own not in FORMATS else form!r}; lightrm reads {', '.join(FORMATS)}: {CURE}"
        )
    if fields.entries("output_activations"):
        raise UnsupportedModelError(f"{where} rounds output_activations, which lightrm does not run: {CURE}")
    weights = Config(fields.entries("weights"), values.path)
    if not weights.raw:
        raise UnsupportedModelError(f"{where} does not quantize weights; lightrm does not run it: {CURE}")
    kind, bits = str(weights.raw.get("type", "int")).lower(), weights.integer("num_bits", 8)
    strategy = str(weights.raw.get("strategy") or implied(weights)).lower()
    read = (2, 4, 8) if own == "pack-quantized" else (4, 8) if kind == "int" else (8,)
    if strategy not in STRATEGIES or kind not in ("int", "float") or bits not in read:
        raise UnsupportedModelError(
            f"{where} has weights of {kind}{bits} by {strategy}; as {own}, lightrm reads "
            f"{' and '.join(map(str, read))} bits by {', '.join(STRATEGIES)}: {CURE}"
        )
    rounded = Config(fields.entries("input_activations"), values.path)
    return Group(
        name=name,
        format=own,
        kind=kind,
        bits=bits,
        strategy=strategy,
        symmetric=weights.flag("symmetric") if weights.has("symmetric") else True,
        inputs=weights.integer("group_size") if strategy == "group" else None,
        block=block_of(weights, where) if strategy == "block" else None,
        rounds_inputs=bool(rounded.raw) and rounded.raw.get("num_bits", 8) == 8 and rounded.raw.get("type") == "int",
    )


def implied(weights: Config) -> str:
    """Return the strategy of weights whose config names none, as compressed-tensors infers it."""
    size = weights.raw.get("group_size")
    return "tensor" if size is None else "channel" if size == -1 else "group"


def block_of(weights: Config, where: str) -> tuple[int, int]:
    found: Any = weights.raw.get("block_structure")
    if isinstance(found, str):
        found = [int(side) for side in found.split("x") if side.isdecimal()]
    if isinstance(found, list) and len(found) == 2 and all(type(side) is int and 0 < side < 2**31 for side in found):
        return found[0], found[1]
    raise ConfigError(f"{where}: block_structure must be two positive whole numbers, found {shown(found)}")
