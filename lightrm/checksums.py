"""Checksums of what lightrm writes: XXH3 with 128 bits, which sees any change and every order, at the speed of memory.

They guard against accidents, not against malice: whoever can write a folder can write its checksums too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash

SEAL = "checksum"  # the key under which an object of JSON holds the checksum of all its other keys
BLOCK = 2**22  # bytes of a file that are in memory at once


def file_sum(path: Path) -> str:
    """Raises OSError."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def tensor_sum(tensor: torch.Tensor) -> str:
    """Of a tensor's bytes; dtype and shape are not among them."""
    return xxhash.xxh3_128_hexdigest(tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy().data)


def word_sum(tensor: torch.Tensor) -> int:
    """What folders of format 2 and 3 hold: the sum of a tensor's 64-bit words, the rest bytes added, modulo 2^64 and
    signed. Any one change shows, another order of the words does not."""
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    whole = len(flat) // 8 * 8
    words = flat[:whole]
    if words.storage_offset() % 8 or words.data_ptr() % 8:
        words = words.clone()
    total = int(words.view(torch.int64).sum()) + int(flat[whole:].sum())
    return (total + 2**63) % 2**64 - 2**63


def sealed(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The object with its own checksum, whatever spaces and order of keys it is written with."""
    others = {name: value for name, value in raw.items() if name != SEAL}
    text = json.dumps(others, sort_keys=True, ensure_ascii=False)
    return others | {SEAL: xxhash.xxh3_128_hexdigest(text.encode())}
