"""Answers that say no: a status and one JSON form for every error, without a word of what the caller wrote."""

from __future__ import annotations

from starlette.responses import JSONResponse

from lightrm.errors import (
    InputError,
    LightRMError,
    MemoryLimitError,
    NumericsError,
    TemplateError,
    TokenizerError,
    TooLongError,
)  # fmt: skip


class RefusedError(Exception):
    """A request that is not answered. status: of HTTP. again: seconds after which to ask again; None: not at all."""

    def __init__(self, status: int, kind: str, message: str, again: int | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.again = status, kind, message, again

    def response(self) -> JSONResponse:
        headers = {} if self.again is None else {"Retry-After": str(self.again)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse({"error": {"type": self.kind, "message": self.message}}, self.status, headers)


STATUS: tuple[tuple[type[LightRMError], int], ...] = (  # the first that fits
    (TooLongError, 413), (MemoryLimitError, 413), (NumericsError, 500), (InputError, 400), (TemplateError, 400),
    (TokenizerError, 400),
)  # fmt: skip


def refusal_of(error: LightRMError) -> RefusedError:
    """Return the answer to a request that lightrm refuses: the caller reads what lightrm found in it."""
    status = next((status for kind, status in STATUS if isinstance(error, kind)), 500)
    return RefusedError(status, type(error).__name__, str(error).encode(errors="replace").decode())
