"""A second model that is loaded the first time it is asked for, while other threads wait."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from lightrm.errors import InputError
from lightrm.kernels import forks

Model = TypeVar("Model")


class OpenedOnce(Generic[Model]):
    """The full-precision twin of a model. opens: loads it in a scheme; None if its source is not known."""

    def __init__(self, opens: Callable[[str], Model] | None) -> None:
        self.opens = opens
        self.opened: Model | None = None
        self.forked()
        forks.call_after_fork(self)

    def forked(self) -> None:
        self.opening = threading.Lock()

    def model(self, scheme: str) -> Model:
        """Return the twin. Raises InputError if the source of a quantized folder is not known."""
        with self.opening:
            if self.opened is None:
                if self.opens is None:
                    raise InputError("this folder does not hold its source: pass reference=... to load")
                self.opened = self.opens(scheme)
            return self.opened
