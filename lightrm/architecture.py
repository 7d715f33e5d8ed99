"""What a decoder looks like, and what is done to its score: frozen descriptions that everything else is built from.

Knows no file formats and no tensors. The position scheme is an object of its own, `Rope` or `Alibi`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightrm.errors import InputError

LINEARS = ("qkv", "output", "gate_up", "down")  # the linear layers of a block, in the order in which they run


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding in the half-split convention of transformers.

    kind: `plain` (RoFormer, arXiv 2104.09864), `linear` (positions divided by `factor`, arXiv 2306.15595),
    or `llama3` (Llama 3.1: low frequencies divided by `factor`, a smooth band between).
    """

    theta: float = 10000.0
    kind: Literal["plain", "linear", "llama3"] = "plain"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_positions: int = 8192

    def __str__(self) -> str:
        return "RoPE" if self.kind == "plain" else f"RoPE {self.kind} x{self.factor:g}"


@dataclass(frozen=True, slots=True)
class Alibi:
    """Attention with linear biases (arXiv 2108.12409).

    table: `relative` adds slope * (j - i) in float32, the exact function; `absolute` rounds a table of
    slope * j to the compute dtype first, as Baichuan's published half-precision code does.
    """

    table: Literal["relative", "absolute"] = "relative"

    def __str__(self) -> str:
        return "ALiBi" if self.table == "relative" else "ALiBi (absolute table)"


@dataclass(frozen=True, slots=True)
class Architecture:
    """A pre-norm decoder with RMSNorm and a gated MLP."""

    family: str
    layers: int
    width: int
    ffn_width: int
    query_heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    norm_eps: float
    positions: Rope | Alibi
    max_positions: int
    qkv_bias: bool = False
    output_bias: bool = False

    @property
    def query_width(self) -> int:
        return self.query_heads * self.head_width

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_width

    @property
    def parts(self) -> dict[str, dict[str, int]]:
        """The linear layers of a block by our names, each with its parts in order and their output features."""
        return {
            "qkv": {"query": self.query_width, "key": self.kv_width, "value": self.kv_width},
            "output": {"output": self.width},
            "gate_up": {"gate": self.ffn_width, "up": self.ffn_width},
            "down": {"down": self.width},
        }

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of a block by our names, each with its output and its input features."""
        inputs = {"output": self.query_width, "down": self.ffn_width}
        return {name: (sum(rows.values()), inputs.get(name, self.width)) for name, rows in self.parts.items()}

    @property
    def matrix_parameters(self) -> int:
        """Number of weights in the linear layers, without biases: what a scheme quantizes."""
        return self.layers * sum(outputs * inputs for outputs, inputs in self.linears.values())

    @property
    def bias_parameters(self) -> int:
        layer = self.qkv_bias * self.linears["qkv"][0] + self.output_bias * self.width
        return self.layers * layer

    @property
    def parameters(self) -> int:
        """Number of the decoder's weights with the embedding, without output layer and value head."""
        norms = (2 * self.layers + 1) * self.width
        return self.vocabulary * self.width + self.matrix_parameters + self.bias_parameters + norms

    def __str__(self) -> str:
        heads = f"{self.query_heads} heads"
        if self.kv_heads != self.query_heads:
            heads += f"/{self.kv_heads} kv"
        return f"{self.family} {self.layers}x{self.width}, {heads}, {self.positions}"


@dataclass(frozen=True, slots=True)
class PostStep:
    """score = sign * (x - mean) / std, then 1 / (1 + exp(-score)) if it is a probability."""

    mean: float = 0.0
    std: float = 1.0
    negate: bool = False
    probability: bool = False

    def __str__(self) -> str:
        parts = []
        if self.mean != 0.0 or self.std != 1.0:
            parts.append(f"(x - {self.mean:.4g}) / {self.std:.4g}")
        if self.negate:
            parts.append("negated: the model scores cost")
        if self.probability:
            parts.append("a probability: sigmoid(x)")
        return ", ".join(parts) or "raw"


@dataclass(frozen=True, slots=True)
class GateForm:
    """What a model's own code does with its gate.

    activation: between its layers. softmax: whether its outputs are made to sum to 1. pattern: the token ids that mark
    the end of the prompt, of which the first is read, where they stand last; empty if the gate is read with the answer.
    adjusts: whether the attributes are what the transform makes of the outputs; otherwise they are the outputs.
    """

    activation: Literal["relu", "selu"]
    softmax: bool
    pattern: tuple[int, ...] = ()
    adjusts: bool = False

    def prompt_end(self, ids: Sequence[int]) -> int:
        """Return the number of ids up to the one that the gate reads. Raises InputError if the pattern is not there."""
        count, pattern = len(self.pattern), list(self.pattern)
        for start in range(len(ids) - count, -1, -1):
            if list(ids[start : start + count]) == pattern:
                return start + 1
        raise InputError(
            f"this model's gate is read where the token ids {pattern} end a prompt, and the sequence does not hold them"
        )
