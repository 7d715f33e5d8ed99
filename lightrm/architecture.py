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
class LinearScaling:
    """Positions divided by a factor (arXiv 2306.15595)."""

    factor: float

    def __str__(self) -> str:
        return f"linear x{self.factor:g}"


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's: low frequencies divided by a factor, high ones as they are, a smooth band between."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_positions: int

    def __str__(self) -> str:
        return f"llama3 x{self.factor:g}"


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): frequencies that turn less than `slow` times within the original positions are divided
    by the factor, those that turn more than `fast` times stay, with a ramp between.

    attention_factor: cos and sin are multiplied by it. whole: whether the ends of the ramp are rounded to channels.
    """

    factor: float
    original_positions: int
    fast: float
    slow: float
    attention_factor: float
    whole: bool = True

    def __str__(self) -> str:
        return f"yarn x{self.factor:g}"


@dataclass(frozen=True, slots=True)
class LongRopeScaling:
    """LongRoPE (arXiv 2402.13753): each frequency divided by a factor of its own, from the long list for sequences of
    more than the original positions, from the short one for others. attention_factor: as in YarnScaling."""

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_positions: int
    attention_factor: float

    def __str__(self) -> str:
        return f"longrope beyond {self.original_positions}"


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding (arXiv 2104.09864) in the half-split convention of transformers.

    part: the share of each head's channels that turn, from the first on.
    """

    theta: float = 10000.0
    scaling: LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling | None = None
    part: float = 1.0

    def turned(self, head_width: int) -> int:
        """Return how many channels of a head turn."""
        return int(head_width * self.part)

    def __str__(self) -> str:
        part = "" if self.part == 1 else f" on {self.part:g} of each head"
        return "RoPE" + ("" if self.scaling is None else f" {self.scaling}") + part


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
    """A pre-norm decoder with RMSNorm and a gated MLP.

    head_norms: RMSNorm over each head of query and key, before RoPE. post_norms: RMSNorm of what attention and MLP add
    to the stream, before it is added. norms_add_one: the files hold w for a norm's weight of 1 + w.
    embedding_scale: factor of the embedded tokens. score_width: attention divides q k by its square root; None for the
    head's width. softcap: of attention's scores, see `kernels.operands.ScoreRule`.
    windows: for each layer how many positions a token sees, itself included, None for all; empty if no layer has a
    limit. local_positions: the positions in layers with a window, None if they are the same everywhere.
    """

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
    mlp_bias: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    head_norms: bool = False
    post_norms: bool = False
    norms_add_one: bool = False
    embedding_scale: float = 1.0
    score_width: float | None = None
    softcap: float | None = None
    windows: tuple[int | None, ...] = ()
    local_positions: Rope | None = None

    @property
    def query_width(self) -> int:
        return self.query_heads * self.head_width

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_width

    def window(self, layer: int) -> int | None:
        """Return how many positions a token sees in a layer, itself included; None for all before it."""
        return self.windows[layer] if self.windows else None

    def positions_in(self, layer: int) -> Rope | Alibi:
        """Return the position scheme of a layer."""
        local = self.local_positions is not None and self.window(layer) is not None
        return self.local_positions if local and self.local_positions is not None else self.positions

    @property
    def scaled_from(self) -> int | None:
        """The length from which a sequence turns by other frequencies than a shorter one; None if there is none."""
        scaling = self.positions.scaling if isinstance(self.positions, Rope) else None
        return scaling.original_positions if isinstance(scaling, LongRopeScaling) else None

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
    def biases(self) -> dict[str, bool]:
        """The linear layers of a block by our names, each with whether it has a bias."""
        return {"qkv": self.qkv_bias, "output": self.output_bias, "gate_up": self.mlp_bias, "down": self.mlp_bias}

    @property
    def norms(self) -> dict[str, int]:
        """The norms of a block by our names, each with its width. The first two stand before attention and MLP."""
        norms = {"attention_norm": self.width, "mlp_norm": self.width}
        if self.post_norms:
            norms |= {"attention_post_norm": self.width, "mlp_post_norm": self.width}
        if self.head_norms:
            norms |= {"query_norm": self.head_width, "key_norm": self.head_width}
        return norms

    @property
    def matrix_parameters(self) -> int:
        """Number of weights in the linear layers, without biases: what a scheme quantizes."""
        return self.layers * sum(outputs * inputs for outputs, inputs in self.linears.values())

    @property
    def bias_parameters(self) -> int:
        return self.layers * sum(self.linears[name][0] for name, biased in self.biases.items() if biased)

    @property
    def parameters(self) -> int:
        """Number of the decoder's weights with the embedding, without output layer and value head."""
        norms = self.layers * sum(self.norms.values()) + self.width
        return self.vocabulary * self.width + self.matrix_parameters + self.bias_parameters + norms

    def __str__(self) -> str:
        heads = f"{self.query_heads} heads"
        if self.kv_heads != self.query_heads:
            heads += f"/{self.kv_heads} kv"
        limited = [window for window in self.windows if window is not None]
        window = f", a window of {limited[0]} in {len(limited)} layers" if limited else ""
        return f"{self.family} {self.layers}x{self.width}, {heads}, {self.positions}{window}"


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
