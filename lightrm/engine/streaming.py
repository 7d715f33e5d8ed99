"""The layers of a model that does not fit into memory: read when needed, the next one while the current one
computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from lightrm.kernels import forks
from lightrm.model.decoder import Layer


class StreamedLayers:
    """Reads like a list of layers. At most two layers are in memory, since the caller drops each before it asks for the
    next. Only one thread at a time may ask, which the engine ensures.

    make: reads one layer and places it on the device. It is called by one thread at a time, and again in every pass.
    """

    def __init__(self, count: int, make: Callable[[int], Layer], device: torch.device) -> None:
        self.count, self.make, self.device = count, make, device
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.forked()
        forks.call_after_fork(self)

    def forked(self) -> None:
        """In a forked child: start a reading thread of its own, with nothing read yet."""
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="lightrm-layers")
        self.held: Layer | None = None
        self.coming: tuple[int, Future[Layer]] | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Layer:
        """Return a layer. Raises what `make` raises; a layer that failed is read again when it is next asked for."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        if self.copies is not None:  # kernels may still read the layer that is let go of here
            torch.cuda.current_stream(self.device).synchronize()
        self.held = None
        coming, self.coming = self.coming, None
        if coming is not None and coming[0] != index:  # a pass was left in the middle
            coming[1].cancel()
            coming = None
        future = coming[1] if coming is not None else self.reader.submit(self.placed, index)
        self.held = future.result()
        if index + 1 < self.count:
            self.coming = index + 1, self.reader.submit(self.placed, index + 1)
        return self.held

    def placed(self, index: int) -> Layer:
        if self.copies is None:
            return self.make(index)
        with torch.cuda.stream(self.copies):  # beside the kernels of the layer that computes
            layer = self.make(index)
        self.copies.synchronize()
        return layer
