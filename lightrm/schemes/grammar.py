"""The names of schemes, and the one parser for them.

    fp32 bf16 fp16     weights as they are
    w8a8               int8 weights per output channel, int8 activations per token, int32 accumulation
    w4a8[-gN]          int4 weights with an integer multiplier for each group of N inputs, widened to int8; then as w8a8
    w4a16[-gN]         int4 weights of the same kind, or another tool's in groups, with 16-bit activations
    nf4                bitsandbytes' 4-bit floats with double quantization, 16-bit activations
    bnb-int8           bitsandbytes' LLM.int8: int8 weights and activations, outlier columns in float

nf4 and bnb-int8 are there to load such files and to compare with; bitsandbytes itself runs them. N is 128 by default;
64 and 32 need more memory and have a smaller error.

In a fidelity report alone, "hf:" and a name stand for the scores that transformers' own class gives.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch

from lightrm.errors import SchemeError

Weights = Literal["float", "int8", "int4", "nf4"]
Path = Literal["float", "integer", "bitsandbytes"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BITSANDBYTES: dict[str, Weights] = {"bnb-int8": "int8", "nf4": "nf4"}
NAMES = (*DTYPES, "w8a8", "w4a8", "w4a16", *BITSANDBYTES)
GROUPS = (128, 64, 32)
PROGRAM = "hf:"
OTHERS = {"hf:fp32": "fp32", "hf:bf16": "bf16", "hf:fp16": "fp16", "hf:nf4": "nf4", "hf:int8": "bnb-int8"}
PACKED = "hf:gptq"  # a file's own values, in another program's products
PATTERN = re.compile(r"(w4a8|w4a16)(?:-g(\d+))?")


@dataclass(frozen=True, slots=True)
class Scheme:
    """How weights and activations are stored.

    weights: how weights are stored; integer: whether activations are int8; dtype: of everything that stays in float;
    group: number of inputs that share a multiplier, 0 without groups; reason: why this scheme was chosen, for the repr.
    """

    name: str
    weights: Weights
    integer: bool
    dtype: torch.dtype
    group: int = 0
    reason: str = "asked for"

    @property
    def kind(self) -> str:
        """The name without its group size."""
        return self.name.partition("-g")[0]

    @property
    def path(self) -> Path:
        """Which set of kernels runs the scheme."""
        if self.name in BITSANDBYTES:
            return "bitsandbytes"
        return "integer" if self.integer else "float"

    @property
    def folds(self) -> bool:
        """Whether norms and rotations are folded into the weights."""
        return self.weights != "float" and self.name not in BITSANDBYTES

    def __str__(self) -> str:
        return self.name


def parse_scheme(text: str, device: torch.device, reason: str = "asked for") -> Scheme:
    """Return the scheme of a name. Raises SchemeError on an unknown name, and on fp16 for a CPU."""
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    if text in DTYPES:
        if text == "fp16" and device.type == "cpu":
            raise SchemeError(
                "fp16 on a CPU is many times slower than bf16 and no more exact than fp32: use bf16 or fp32"
            )
        return Scheme(text, "float", False, DTYPES[text], reason=reason)
    if text == "w8a8":
        return Scheme(text, "int8", True, torch.float32, reason=reason)
    if text in BITSANDBYTES:
        return Scheme(text, BITSANDBYTES[text], False, half, reason=reason)
    if text.startswith(PROGRAM):
        raise SchemeError(
            f"{text!r} is for `lightrm fidelity` alone, where there are {', '.join((*OTHERS, PACKED))}; to load a "
            "model that way: engine='transformers'"
        )
    found = PATTERN.fullmatch(text)
    if found is None or int(found[2] or GROUPS[0]) not in GROUPS:
        groups = ", ".join(map(str, GROUPS))
        raise SchemeError(f"no scheme {text!r}; there are auto, {', '.join(NAMES)}; -gN with N = {groups} after w4")
    integer = found[1] == "w4a8"
    return Scheme(
        text, "int4", integer, torch.float32 if integer else half, group=int(found[2] or GROUPS[0]), reason=reason
    )
