"""Where the weights are while a model scores, and how many tokens it computes at once: whatever the memory allows.

resident    all weights in memory; a pack of tokens goes through all layers, then the next pack
streamed    two layers in memory, the one that computes and the one that is read; a window of packs goes through
            each layer in turn, so that a layer is read once for all of them
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightrm.architecture import Architecture
from lightrm.display.sizes import size_text
from lightrm.engine.memory import Room, activation_bytes, overhead, table_bytes, weight_bytes
from lightrm.errors import SchemeError
from lightrm.schemes.grammar import Scheme

MOST_TOKENS = {"cpu": 8192, "cuda": 16384}  # of one pack: larger ones are no quicker, and share no prompt more
LEAST_TOKENS = 512  # below, products wait for weights
STREAMED_TOKENS = 2048  # of a pack where a window holds several
MOST_WINDOW = {"cpu": 2**15, "cuda": 2**17}  # tokens for which reading a layer takes no time to speak of


@dataclass(frozen=True, slots=True)
class Residence:
    """tokens: of one pack. window: tokens of all packs that go through the layers together, 0 if the model is resident.
    room: bytes that activations may take. bytes: what everything takes at most. reason: in words, for the repr. unit:
    what holds tokens that are computed at once."""

    tokens: int
    window: int
    room: int
    bytes: int
    reason: str
    unit: str = "packs"

    @property
    def streamed(self) -> bool:
        return self.window > 0

    def __str__(self) -> str:
        if self.streamed:
            return f"layers streamed, {self.window} tokens at a time in packs of {self.tokens}, because {self.reason}"
        return f"{self.unit} of {self.tokens} tokens, {self.reason}"


def bytes_between_layers(a: Architecture, scheme: Scheme) -> int:
    """Return what a token of a window needs between layers: its residual stream and its RoPE tables."""
    tables = 1 if a.local_positions is None else 2
    return (4 if scheme.integer else scheme.dtype.itemsize) * a.width + tables * 4 * a.head_width + 16


def layer_bytes(a: Architecture, scheme: Scheme) -> int:
    return (weight_bytes(a, scheme) - table_bytes(a, scheme)) // a.layers


def reading_bytes(a: Architecture, scheme: Scheme) -> int:
    """Return what a tensor needs on its way from the file into a layer: as stored, and in float32 copies if it is
    folded."""
    largest = a.width * a.ffn_width
    return largest * (4 + 12 if scheme.folds else 4)


def streamed_bytes(a: Architecture, scheme: Scheme, tokens: int, window: int) -> int:
    """Return the bytes of a streamed model: embedding table, two layers, the tensor that is read, the activations of a
    pack and the residual streams of a window."""
    held = table_bytes(a, scheme) + 2 * layer_bytes(a, scheme) + reading_bytes(a, scheme)
    return held + activation_bytes(a, scheme, tokens) + window * bytes_between_layers(a, scheme)


def resident_bytes(a: Architecture, scheme: Scheme, tokens: int) -> int:
    return weight_bytes(a, scheme) + activation_bytes(a, scheme, tokens)


def tokens_within(a: Architecture, scheme: Scheme, room: int) -> int:
    """Return how many tokens' activations fit into `room` bytes; 0 if none do."""
    fixed = activation_bytes(a, scheme, 0)
    return max(0, room - fixed) // (activation_bytes(a, scheme, 1) - fixed)


def choose_residence(
    a: Architecture, scheme: Scheme, device: torch.device, room: Room, tokens: int | None = None, held: int = 0
) -> Residence:
    """Choose resident if the model fits, with packs as large as pays; otherwise streamed, with as large a window as
    fits.

    tokens: of a pack, if the caller wants to say; held: bytes of the weights that are in memory already. Raises
    SchemeError with the numbers if even streaming does not fit.
    """
    least, most = tokens or LEAST_TOKENS, tokens or MOST_TOKENS[device.type]
    left = room.bytes - activation_bytes(a, scheme, 0) - max(0, weight_bytes(a, scheme) - held)
    fit = tokens_within(a, scheme, left)
    if fit >= least:
        chosen = min(fit, most)
        reason = (
            f"what fits beside the weights into {room.of}" if fit < most else f"the most that pays on {device.type}"
        )
        total = resident_bytes(a, scheme, chosen) + overhead(device)
        return Residence(chosen, 0, left, total, "as asked" if tokens else reason)
    left = room.bytes - streamed_bytes(a, scheme, 0, 0)
    chosen = tokens or min(tokens_within(a, scheme, left // 2), STREAMED_TOKENS)
    window = min(
        (left - activation_bytes(a, scheme, chosen)) // bytes_between_layers(a, scheme), MOST_WINDOW[device.type]
    )
    if chosen < least or window < chosen:
        raise SchemeError(
            f"{scheme} of this model needs {size_text(resident_bytes(a, scheme, least))} resident and "
            f"{size_text(streamed_bytes(a, scheme, least, least))} streamed, and there are {size_text(room.bytes)} for "
            f"it of {room.of} on {device}: give it more memory, or take a smaller scheme"
        )
    total = streamed_bytes(a, scheme, chosen, window) + overhead(device)
    need = size_text(resident_bytes(a, scheme, least))
    left -= window * bytes_between_layers(a, scheme)
    return Residence(chosen, window, left, total, f"{need} would not fit into {room.of}")
