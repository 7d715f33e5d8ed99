"""PackedBatch: the tokens of many sequences that go through the model together.

T tokens in a pack, S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightrm.kernels.segments import Segment


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """token_ids_T and position_ids_T: int64 (T,). last_S: int64 (S,), the index of each sequence's last token."""

    token_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    segments: tuple[Segment, ...]
    last_S: torch.Tensor

    def __len__(self) -> int:
        return len(self.token_ids_T)

    def to(self, device: torch.device) -> PackedBatch:
        return PackedBatch(
            self.token_ids_T.to(device), self.position_ids_T.to(device), self.segments, self.last_S.to(device)
        )
