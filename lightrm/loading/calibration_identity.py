"""What the result of a calibration depends on, so that a stopped one goes on only with the same."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch

from lightrm.checkpoints import contents
from lightrm.checksums import tensor_sum

if TYPE_CHECKING:
    from lightrm.loading.loader import Loader


def identity(loader: Loader, calibration: Sequence[Sequence[int]]) -> dict[str, str]:
    """Return all that changes a bit of the result, each value a short text: the files, the scheme, the token ids, and
    what computes. Raises CheckpointError if a file cannot be read."""
    lengths = torch.tensor([len(ids) for ids in calibration])
    tokens = torch.tensor([token for ids in calibration for token in ids])
    files = contents.parts(loader.checkpoint)
    return {
        "weights": files["weights"],
        "config": files["config"],
        "scheme": loader.scheme.name,
        "form": type(loader).__name__,
        "layout": loader.checkpoint.layout.name,
        "positions": str(loader.architecture.positions),
        "texts": f"{len(lengths)}, {len(tokens)} tokens, {tensor_sum(torch.cat([lengths, tokens]))}",
        "device": str(loader.device),
        "threads": str(torch.get_num_threads()),
        "versions": ", ".join(f"{name} {version(name)}" for name in ("lightrm", "torch")),
    }
