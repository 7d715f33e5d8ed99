"""openbmb/UltraRM-13b (LLaMA) and openbmb/Eurus-RM-7b (Mistral): `regression_head.weight`, no bias."""

from __future__ import annotations

from collections.abc import Collection

from lightrm.checkpoints.config import Config
from lightrm.checkpoints.layout import Layout, backbone, linear_head
from lightrm.checkpoints.score_position import reads_last


def matches(config: Config, names: Collection[str]) -> bool:
    return "regression_head.weight" in names


def rename(name: str) -> str | None:
    return linear_head(name, "regression_head") or backbone(name)


LAYOUT = Layout(
    name="ultrarm",
    models="UltraRM-13b, Eurus-RM-7b",
    describes="UltraRM, Eurus-RM: regression_head",
    matches=matches,
    rename=rename,
    template=lambda config: "eurus" if config.raw.get("model_type") == "mistral" else "ultrarm",
    reading=lambda config: reads_last("as UltraRM's class reads: the last of the mask"),
)
