"""The forward pass of a model that is not ours: padded ids in, outputs of the class out.

    ids (B, T), mask (B, T) with 1 for tokens and 0 for padding at the end, token types (B, T) or None
    -> outputs (B, labels), float32

Rows are padded at the end, so a token's position is its place in the row, as transformers counts by default.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch


class ClassForward:
    """A class that gives the score itself. takes_types: whether it is passed token types. head: names of the parts that
    make the score of what the backbone gives; they compute in float32, so that a score is not rounded to half a
    precision at the end."""

    def __init__(self, module: Any, takes_types: bool, head: Iterable[str]) -> None:
        self.module, self.takes_types = module, takes_types
        for name in head:
            part = getattr(module, name)
            if isinstance(part, torch.nn.Module):
                part.float().register_forward_pre_hook(widened, with_kwargs=True)

    @torch.inference_mode()
    def __call__(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor | None) -> torch.Tensor:
        more = {"token_type_ids": types} if self.takes_types and types is not None else {}
        outputs: torch.Tensor = self.module(input_ids=ids, attention_mask=mask, **more).logits
        return outputs.float()


def widened(part: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
    """Return the inputs of a part in float32."""

    def wide(value: Any) -> Any:
        return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return tuple(map(wide, inputs)), {name: wide(value) for name, value in named.items()}


class PooledForward:
    """A backbone, and a linear layer in float32 on its last token or on the mean over its tokens."""

    def __init__(
        self, module: Any, weight_OD: torch.Tensor, bias_O: torch.Tensor, pooling: Literal["last", "mean"]
    ) -> None:
        self.module, self.weight_OD, self.bias_O, self.pooling = module, weight_OD, bias_O, pooling

    @torch.inference_mode()
    def __call__(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor | None) -> torch.Tensor:
        hidden = self.module(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        count = mask.sum(1)
        if self.pooling == "mean":
            pooled = (hidden * mask[:, :, None]).sum(1) / count[:, None]
        else:
            pooled = hidden[torch.arange(len(ids), device=ids.device), count - 1]
        return torch.nn.functional.linear(pooled, self.weight_OD, self.bias_O)
