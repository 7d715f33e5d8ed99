"""The grammar of schemes: how weights and activations are held. One string, one parser.

fp32, bf16 and fp16 hold the weights as they are. The 8- and 4-bit schemes are not here yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightrm.errors import SchemeError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Scheme:
    """name: as the user writes it; dtype: of weights and activations; reason: why it was chosen."""

    name: str
    dtype: torch.dtype
    reason: str

    def __str__(self) -> str:
        return self.name


def choose_scheme(text: str, device: torch.device, parameters: int, free_bytes: int | None) -> Scheme:
    """Parse a scheme; "auto" takes fp32 on a CPU and fp16 on a GPU, the narrower 16 bits where that does not fit.

    free_bytes: memory at hand, None if it cannot be told. Raises SchemeError on an unknown or unfit scheme.
    """
    if text == "auto":
        if device.type == "cuda":
            return Scheme("fp16", torch.float16, "published reward models are run in fp16 on a GPU")
        if free_bytes is not None and 4 * parameters > 0.8 * free_bytes:
            return Scheme(
                "bf16", torch.bfloat16, f"fp32 needs {size_text(4 * parameters)}, {size_text(free_bytes)} are free"
            )
        return Scheme("fp32", torch.float32, "exact, and it fits")
    if text not in DTYPES:
        raise SchemeError(f"no scheme {text!r}; there are auto, {', '.join(DTYPES)}")
    if text == "fp16" and device.type == "cpu":
        raise SchemeError("fp16 on a CPU is many times slower than bf16 and no more exact than fp32: use bf16 or fp32")
    return Scheme(text, DTYPES[text], "asked for")


def size_text(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
