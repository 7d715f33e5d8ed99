"""Checksums of what lightrm writes: XXH3 with 128 bits, which shows any change and any reordering, at memory speed.

They protect against accidents, not against malice: whoever can write a folder can write its checksums too.
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
    """Return the checksum of a file. Raises OSError."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def tensor_sum(tensor: torch.Tensor) -> str:
    """Return the checksum of a tensor's bytes, without dtype and shape."""
    return xxhash.xxh3_128_hexdigest(tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy().data)


def sealed(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the object with its own checksum, which does not depend on spaces and the order of keys."""
    others = {name: value for name, value in raw.items() if name != SEAL}
    text = json.dumps(others, sort_keys=True, ensure_ascii=False)
    return others | {SEAL: xxhash.xxh3_128_hexdigest(text.encode())}
