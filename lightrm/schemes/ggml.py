"""The block formats of GGUF files: 32 or 256 consecutive weights of a row share a block of bytes.

    kind    weights   bytes of a block, in order                     a weight
    Q4_0    32        d 2, q 16                                      d (q - 8)
    Q4_1    32        d 2, m 2, q 16                                 d q + m
    Q5_0    32        d 2, fifth bits 4, q 16                        d (q - 16)
    Q5_1    32        d 2, m 2, fifth bits 4, q 16                   d q + m
    Q8_0    32        d 2, q 32                                      d q
    Q2_K    256       scales 16, q 64, d 2, m 2                      d s q - m t     s, t of 16 weights, 4 bits each
    Q3_K    256       third bits 32, q 64, scales 12, d 2            d s q           s of 16 weights, 6 bits, less 32
    Q4_K    256       d 2, m 2, scales 12, q 128                     d s q - m t     s, t of 32 weights, 6 bits each
    Q5_K    256       d 2, m 2, scales 12, fifth bits 32, q 128      d s q - m t     the same
    Q6_K    256       q 128, fifth and sixth bits 64, scales 16, d 2 d s (q - 32)    s of 16 weights, int8

d and m are float16. Everything is computed in float32, in the order in which llama.cpp and its Python package do it, so
the result is theirs bit for bit. 4-bit values lie in the halves of a run of bytes: first all low halves, then all high
ones; a run has 16 bytes, or 32 in the blocks of 256.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Blocks = Callable[[torch.Tensor], torch.Tensor]  # uint8 (N, bytes) -> float32 (N, weights)
SMALL, LARGE = 32, 256


def half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """Return the float16 at a byte of each block, float32 (N, 1)."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def shifted(values: torch.Tensor, run: int, shifts: range, bits: int) -> torch.Tensor:
    """Return values of some bits, packed in runs of bytes: uint8 (N, B) -> (N, B * len(shifts))."""
    runs = values.contiguous().view(len(values), -1, 1, run)
    return torch.cat([runs >> by & 2**bits - 1 for by in shifts], 2).flatten(1)


def nibbles(values: torch.Tensor, run: int) -> torch.Tensor:
    return shifted(values, run, range(0, 8, 4), 4)


def q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return half(blocks, 0) * (nibbles(blocks[:, 2:], 16).float() - 8)


def q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return half(blocks, 0) * nibbles(blocks[:, 4:], 16).float() + half(blocks, 2)


def fifth(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """Return 5-bit values: 32 high bits in 4 bytes from `at` on, then 16 bytes of low ones."""
    high = (blocks[:, at : at + 4, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return nibbles(blocks[:, at + 4 :], 16) | high.flatten(1) << 4


def q5_0(blocks: torch.Tensor) -> torch.Tensor:
    return half(blocks, 0) * (fifth(blocks, 2).float() - 16)


def q5_1(blocks: torch.Tensor) -> torch.Tensor:
    return half(blocks, 0) * fifth(blocks, 4).float() + half(blocks, 2)


def q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * half(blocks, 0)


def scaled(values: torch.Tensor, scale: torch.Tensor, least: torch.Tensor | None = None) -> torch.Tensor:
    """values (N, 256) times a scale for each run of weights (N, runs), less a least one."""
    runs = values.float().view(len(values), scale.shape[1], -1) * scale[:, :, None]
    return (runs if least is None else runs - least[:, :, None]).flatten(1)


def six_bits(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales and least values of Q4_K and Q5_K: 12 bytes (N, 12) -> (N, 8) each.

    Bytes 0 .. 3 and 4 .. 7 hold six bits of scales and of least values 0 .. 3, and in their top two bits the high bits
    of numbers 4 .. 7, whose low halves are in bytes 8 .. 11.
    """
    first, second, low = packed.split(4, 1)
    scale = torch.cat([first & 63, (low & 15) | first >> 2 & 48], 1)
    least = torch.cat([second & 63, low >> 4 | second >> 2 & 48], 1)
    return scale.float(), least.float()


def q2_k(blocks: torch.Tensor) -> torch.Tensor:
    scales = blocks[:, :16]
    scale, least = half(blocks, 80) * (scales & 15).float(), half(blocks, 82) * (scales >> 4).float()
    return scaled(shifted(blocks[:, 16:80], 32, range(0, 8, 2), 2), scale, least)


def q3_k(blocks: torch.Tensor) -> torch.Tensor:
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    scale = nibbles(low, 8) | shifted(high, 4, range(0, 8, 2), 2) << 4
    absent = 1 - shifted(blocks[:, :32], 32, range(8), 1)  # where the third bit is 0, 4 is taken off
    values = shifted(blocks[:, 32:96], 32, range(0, 8, 2), 2).to(torch.int8) - (absent << 2).to(torch.int8)
    return scaled(values, half(blocks, 108) * (scale.float() - 32))


def q4_k(blocks: torch.Tensor) -> torch.Tensor:
    scale, least = six_bits(blocks[:, 4:16])
    return scaled(nibbles(blocks[:, 16:], 32), half(blocks, 0) * scale, half(blocks, 2) * least)


def q5_k(blocks: torch.Tensor) -> torch.Tensor:
    scale, least = six_bits(blocks[:, 4:16])
    values = nibbles(blocks[:, 48:], 32) | shifted(blocks[:, 16:48], 32, range(8), 1) << 4
    return scaled(values, half(blocks, 0) * scale, half(blocks, 2) * least)


def q6_k(blocks: torch.Tensor) -> torch.Tensor:
    values = nibbles(blocks[:, :128], 64) | shifted(blocks[:, 128:192], 32, range(0, 8, 2), 2) << 4
    scale = half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float()
    return scaled(values.to(torch.int8) - 32, scale)


@dataclass(frozen=True, slots=True)
class Kind:
    """One format. weights, bytes: of a block. blocks: widens blocks; None for plain numbers of `dtype`."""

    name: str
    weights: int
    bytes: int
    blocks: Blocks | None = None
    dtype: torch.dtype = torch.float32


# By their numbers in a file.
KINDS = {
    0: Kind("F32", 1, 4),
    1: Kind("F16", 1, 2, None, torch.float16),
    2: Kind("Q4_0", SMALL, 18, q4_0),
    3: Kind("Q4_1", SMALL, 20, q4_1),
    6: Kind("Q5_0", SMALL, 22, q5_0),
    7: Kind("Q5_1", SMALL, 24, q5_1),
    8: Kind("Q8_0", SMALL, 34, q8_0),
    10: Kind("Q2_K", LARGE, 84, q2_k),
    11: Kind("Q3_K", LARGE, 110, q3_k),
    12: Kind("Q4_K", LARGE, 144, q4_k),
    13: Kind("Q5_K", LARGE, 176, q5_k),
    14: Kind("Q6_K", LARGE, 210, q6_k),
    30: Kind("BF16", 1, 2, None, torch.bfloat16),
}


@dataclass(frozen=True, slots=True)
class Blocked:
    """A matrix in such a format. packed: uint8 (O, bytes of a row)."""

    packed: torch.Tensor
    kind: Kind

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.packed), self.packed.shape[1] // self.kind.bytes * self.kind.weights

    @property
    def dtype(self) -> torch.dtype:
        return self.kind.dtype

    def rows(self, start: int, end: int) -> torch.Tensor:
        """Return output channels start .. end dequantized, (end - start, I), in `dtype`."""
        packed = self.packed[start:end]
        if self.kind.blocks is None:
            return packed.contiguous().view(self.kind.dtype)
        return self.kind.blocks(packed.reshape(-1, self.kind.bytes)).view(end - start, -1)
