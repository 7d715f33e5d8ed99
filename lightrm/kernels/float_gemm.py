"""The float32 product of two large matrices on a CPU, for work that is done once, such as calibration.

PyTorch multiplies float32 by MKL, which takes half of the vector's width on CPUs that are not Intel's: there oneDNN is
twice as fast (AMD EPYC with AVX-512: 450 GFLOP/s on two cores, MKL 205). The rule depends on the installation alone,
and not on a measurement, since the two do not round alike and a calibration that goes on must give the same bits.
"""

from __future__ import annotations

import platform
from functools import lru_cache

import torch


def product(a_NK: torch.Tensor, b_MK: torch.Tensor) -> torch.Tensor:
    """a @ b.T, float32 (N, K) and (M, K) -> (N, M), on the tensors' device."""
    if a_NK.device.type == "cpu" and a_NK.numel() and b_MK.numel() and by_onednn():
        made: torch.Tensor = torch.ops.mkldnn._linear_pointwise(dense(a_NK), dense(b_MK), None, "none", [], "")
        return made
    return a_NK @ b_MK.T


def dense(x: torch.Tensor) -> torch.Tensor:
    """Return a matrix without gaps between its rows or columns: with gaps, oneDNN's product is a hundred times
    slower."""
    return x if x.T.is_contiguous() else x.contiguous()


@lru_cache(maxsize=1)
def by_onednn() -> bool:
    """Whether this PyTorch has oneDNN's float32 product, on a CPU where that is how to get one in full width."""
    has = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has and platform.machine().lower() in ("x86_64", "amd64")
