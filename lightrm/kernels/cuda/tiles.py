"""Tile sizes, from a table by compute capability and problem size. Nothing is tuned at run time.

They are chosen by what the compiler makes of them, which `tests/test_compiled_kernels.py` checks: no spilled registers,
the integer instruction of the tensor cores in the main loop, and on cards of capability 8.6, 8.9 and 12.0, which have
100 KB of shared memory per multiprocessor, room for two programs at once. On 9.0 a program is two warp groups.

A tile only decides which multiprocessor computes what: integer sums are the same for all tiles, and float sums run in
one order.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, NamedTuple

import torch

COMPILED_FOR = (80, 86, 89, 90, 100, 120)  # compute capabilities whose kernels the tests read
LEAST_PRODUCTS = 80  # below, Triton's int8 product does not compile, and its float products leave the tensor cores
LEAST_PASSES = 75
BAND = 8  # tile rows that are walked together: see `triton_products.place`
FEW, SOME = 32, 64  # rows up to which a smaller tile is taken

Kind = Literal["int8", "int4", "grouped"]


class Tile(NamedTuple):
    """rows x outputs of a program. It reads 2 * half inputs at a time, unless the layout of the weight demands another
    number."""

    rows: int
    outputs: int
    half: int
    warps: int
    stages: int


# By what a processor holds: 8.0 has 164 KB, 9.0 and 10.0 have 228 KB of shared memory, 8.6 (and 8.9, 12.0) has 100 KB.
# On 10.0 sums lie in a memory of their own; more than 128 rows of them spill when the residual is added.
TILES: dict[Kind, dict[int, tuple[Tile, Tile, Tile]]] = {
    "int8": {
        80: (Tile(32, 64, 64, 4, 4), Tile(64, 64, 64, 4, 3), Tile(256, 128, 32, 8, 3)),
        86: (Tile(32, 64, 64, 4, 3), Tile(64, 64, 64, 4, 3), Tile(128, 128, 32, 8, 3)),
        90: (Tile(32, 64, 64, 4, 4), Tile(64, 64, 64, 4, 4), Tile(256, 128, 64, 8, 3)),
        100: (Tile(32, 64, 64, 4, 4), Tile(64, 64, 64, 4, 4), Tile(128, 128, 64, 8, 3)),
    },
    "int4": {
        80: (Tile(32, 64, 64, 4, 4), Tile(64, 64, 64, 4, 3), Tile(128, 128, 64, 8, 3)),
        86: (Tile(32, 64, 64, 4, 3), Tile(64, 64, 64, 4, 3), Tile(128, 128, 64, 8, 3)),
        90: (Tile(32, 64, 64, 4, 4), Tile(64, 64, 64, 4, 4), Tile(256, 128, 64, 8, 3)),
        100: (Tile(32, 64, 64, 4, 4), Tile(64, 64, 64, 4, 4), Tile(128, 128, 64, 8, 3)),
    },
    "grouped": {
        80: (Tile(32, 64, 64, 4, 3), Tile(64, 64, 64, 4, 3), Tile(128, 128, 64, 8, 3)),
        86: (Tile(32, 64, 64, 4, 2), Tile(64, 64, 64, 4, 2), Tile(128, 128, 64, 8, 2)),
        90: (Tile(32, 64, 64, 4, 3), Tile(64, 64, 64, 4, 3), Tile(128, 128, 64, 8, 3)),
        100: (Tile(32, 64, 64, 4, 3), Tile(64, 64, 64, 4, 3), Tile(128, 128, 64, 8, 3)),
    },
}
SMALL_SHARED = (86, 89, 120)


def keys_for(card: int, head_width: int) -> int:
    """Return how many keys attention reads at a time. With wide heads 64 keys spill registers, except on 9.0."""
    return 64 if head_width <= 64 or (card >= 90 and card not in SMALL_SHARED) else 32


@cache
def capability(device: torch.device) -> int:
    """Return 10 * major + minor; in the interpreter, which has no device, that of the oldest card in the table.

    AMD cards, which PyTorch also calls cuda, get 0: the kernels contain instructions of NVIDIA's.
    """
    if device.type != "cuda":
        return COMPILED_FOR[0]
    if torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def tile_for(kind: Kind, card: int, rows: int) -> Tile:
    """Return the tile of a product with so many rows. A card that is not in the table uses the entry of the next older
    one."""
    known = 86 if card in SMALL_SHARED else max(key for key in TILES[kind] if key <= max(card, COMPILED_FOR[0]))
    few, some, many = TILES[kind][known]
    return few if rows <= FEW else some if rows <= SOME else many
