"""Sizes of memory as text: 8 GiB for 8589934592."""

from __future__ import annotations

import re

from lightrm.errors import SchemeError


def size_text(size: float, digits: int = 1) -> str:
    """Return bytes in GiB or MiB."""
    return f"{size / 2**30:.{digits}f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def parse_size(text: str | int) -> int:
    """Return the bytes of "8GiB", "8 GB" or "8g", in powers of two; a number stays what it is. Raises SchemeError."""
    if isinstance(text, int):
        return text
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", text.strip(), re.IGNORECASE)
    if found is None:
        raise SchemeError(f"{text!r} is not a size: write 8GiB, 512MiB or a number of bytes")
    return int(float(found[1]) * 2 ** (10 * " kmgt".index(found[2].lower() or " ")))
