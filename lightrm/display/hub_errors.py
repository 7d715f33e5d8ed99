"""What people are told when the hub cannot be asked, in one line. The HTTP client's own errors change between versions
of huggingface-hub."""

from __future__ import annotations

CLIENTS = ("httpx", "requests", "httpcore")


def unreachable(error: Exception) -> bool:
    """Whether an error says that a repository cannot be had from the hub now, for whatever reason."""
    from huggingface_hub.errors import (  # noqa: PLC0415  slow to import
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    known = (OfflineModeIsEnabled, LocalEntryNotFoundError, OSError, HfHubHTTPError, HFValidationError)
    return isinstance(error, known) or type(error).__module__.startswith(CLIENTS)


def first_line(error: Exception) -> str:
    said = str(error).strip().splitlines() or ["no details"]
    return f"{type(error).__name__}: {said[0]}"
