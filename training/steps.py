"""One optimizer loop for both stages: AdamW, warm-up and cosine, checkpoints that a killed run resumes from."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

WARM_UP = 0.03
SAVE_EVERY = 120.0  # seconds


class Steps:
    def __init__(self, network: nn.Module, checkpoint: Path, *, total: int, peak: float, weight_decay: float) -> None:
        self.network, self.checkpoint, self.total, self.peak = network, checkpoint, total, peak
        matrices = [p for p in network.parameters() if p.ndim > 1]
        vectors = [p for p in network.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)
        self.step, self.losses, self.saved_at = 0, [], time.monotonic()
        if checkpoint.exists():
            state = torch.load(checkpoint, weights_only=True)
            network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    def rate(self) -> float:
        warm = WARM_UP * self.total
        if self.step < warm:
            return self.peak * (self.step + 1) / warm
        progress = (self.step - warm) / (self.total - warm)
        return self.peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))

    def remaining(self) -> Iterator[int]:
        while self.step < self.total:
            yield self.step
            self.step += 1
            if time.monotonic() - self.saved_at > SAVE_EVERY:
                self.save()
        self.save()

    def descend(self, loss: torch.Tensor, note: str = "") -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())
        if (self.step + 1) % 25 == 0:
            mean = sum(self.losses) / len(self.losses)
            place = f"{self.checkpoint.stem} {self.step + 1}/{self.total}"
            print(f"{time.strftime('%H:%M:%S')} {place} loss {mean:.3f} {note}", flush=True)
            self.losses.clear()

    def save(self) -> None:
        """Write beside, then rename: a kill leaves the last whole checkpoint."""
        state = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        unfinished = self.checkpoint.with_suffix(".unfinished")
        torch.save(state, unfinished)
        os.replace(unfinished, self.checkpoint)
        self.saved_at = time.monotonic()
