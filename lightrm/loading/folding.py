"""Norm weights and rotations folded into the matrices around them, one tensor at a time, in float32.

int8 activations lose precision in channels beside an outlier. A rotation spreads outliers over many channels. Most of
it costs nothing at run time: the matrix behind a rotation R absorbs the inverse of R.

    residual stream   x R, R = spread of `schemes.hadamard`. RMSNorm commutes with R once its weight sits in the matrix
                      that reads it. The embedding, o and down write rotated rows; qkv, gate, up and the head read them
    value and o       each head's values are rotated; o's columns undo it, since attention only mixes tokens
    gate * up         rotated at run time, in `gated_quantize`; down's columns undo it

A norm between a layer and the residual stream (Gemma) weights each channel of what is added, which no rotated stream
can bear. There the stream stays as it is, and the rows that qkv, gate and up read are rotated at run time, after the
norm, in blocks; their columns undo it. The norm's weight is applied to the rows before they are rotated: in Gemma it
makes small the very channels that are large, and folded into the columns it would leave them large.

Exact in real numbers; tests compare in float32. D width, F feed-forward width, E head width, O x I a weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightrm.architecture import Architecture
from lightrm.schemes.hadamard import block_of, hadamard, spread

MOST_AT_RUN_TIME = 256  # at run time a row is rotated in blocks of at most this, to bound its cost
TURNED_AT_ONCE = 2**18  # numbers
CHUNK = 256  # columns turned at once where a rotation runs along the rows
READ_NORMS = ("attention_norm", "mlp_norm")  # of a block: what qkv, gate and up read


@dataclass(frozen=True, slots=True)
class Folding:
    """The rotations of one architecture. Every method changes a float32 tensor in place and returns it."""

    architecture: Architecture

    @property
    def gated_block(self) -> int:
        """Block size of the transform that `down` expects on its input."""
        return block_of(self.architecture.ffn_width, MOST_AT_RUN_TIME)

    @property
    def normed_block(self) -> int:
        """Block size of the transform that qkv, gate and up expect on their input; 1 if the stream itself is
        rotated."""
        return block_of(self.architecture.width, MOST_AT_RUN_TIME) if self.architecture.post_norms else 1

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms of a block whose weights go into the matrices that read them."""
        return () if self.architecture.post_norms else READ_NORMS

    def block(self, name: str) -> int:
        """Return the block size of the transform that a linear layer expects on its input."""
        return {"qkv": self.normed_block, "output": 1, "gate_up": self.normed_block, "down": self.gated_block}[name]

    def reads_residual(self, weight_OD: torch.Tensor, norm_D: torch.Tensor) -> torch.Tensor:
        """Fold the norm's weight and the rotation into the columns of qkv, gate or up; or the rotation alone, if the
        norm's weight is applied at run time."""
        return turn(weight_OD.mul_(norm_D)) if self.norms else turn(weight_OD, self.normed_block)

    def reads_last(self, weight_OD: torch.Tensor, norm_D: torch.Tensor) -> torch.Tensor:
        """Fold the last norm's weight, and the rotation of the stream, into the columns of the head's first layer."""
        weight_OD.mul_(norm_D)
        return weight_OD if self.architecture.post_norms else turn(weight_OD)

    def writes_residual(self, weight_DI: torch.Tensor) -> torch.Tensor:
        """Rotate the rows of o and down, or a bias, as the stream is."""
        if self.architecture.post_norms:
            return weight_DI
        if weight_DI.ndim == 1:
            return turn(weight_DI[None])[0]
        return turn_rows(weight_DI, self.architecture.width)

    def embedding(self, rows_VD: torch.Tensor) -> torch.Tensor:
        return rows_VD if self.architecture.post_norms else turn(rows_VD)

    def value(self, weight: torch.Tensor) -> torch.Tensor:
        """Rotate the rows of the value heads, (J * E, D), or their bias (J * E,)."""
        width = self.architecture.head_width
        if weight.ndim == 1:
            return turn(weight.view(-1, width)).view(-1)
        return turn_rows(weight, width)

    def output(self, weight_DI: torch.Tensor) -> torch.Tensor:
        """Undo each head's rotation in the columns of o, then rotate its rows."""
        width = self.architecture.head_width
        turn(weight_DI.view(-1, width))
        return self.writes_residual(weight_DI)

    def down(self, weight_DF: torch.Tensor) -> torch.Tensor:
        return self.writes_residual(turn(weight_DF, self.gated_block))


def turn(x: torch.Tensor, block: int | None = None) -> torch.Tensor:
    """Apply `spread` along the last axis, or `hadamard` in blocks; in place, in groups of rows that stay in cache."""
    for rows in x.split(max(1, TURNED_AT_ONCE // x.shape[-1])):
        rows.copy_(spread(rows) if block is None else hadamard(rows, block))
    return x


def turn_rows(weight_OI: torch.Tensor, width: int) -> torch.Tensor:
    """Apply `spread` along the rows, in place: each run of `width` rows is one rotated space."""
    for columns in weight_OI.split(CHUNK, 1):
        turned = turn(columns.T.reshape(-1, width))
        columns.copy_(turned.view(columns.shape[1], -1).T)
    return weight_OI
