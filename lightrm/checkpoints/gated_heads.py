"""Several rewards that a gating network weighs: ArmoRM-Llama3-8B, QRM on LLaMA-3, URM-LLaMa-3.1-8B.

    ArmoRM  `regression_layer` gives 19 rewards where the answer is read, `gating.layers` (linear with bias, ReLU) one
            number for each at the end of the prompt. score = (softmax(gate / temperature) * logit_scale) . (rewards @
            reward_transform_matrix). Its attributes are the rewards (modeling_custom.py of its repository on the hub).
    QRM     `regression_layer` gives num_quantiles numbers for each reward, of which the mean counts. `gating.layers`
            are linear without bias, ReLU, batch norm, and a last linear. Its attributes are rewards @
            reward_transform_matrix (RewardBench, rewardbench/models/qrm.py).
    URM     `score` gives a mean and a second number for each of five attributes; `weights.fc` (linear, SELU, linear,
            SELU, linear, with biases) weighs the means, both where the answer is read (SGLang, llama_reward.py).

The prompt ends at the first token of the last `<|eot_id|><|start_header_id|>assistant<|end_header_id|>\\n\\n`, ids
128009 128006 78191 128007 271, as `find_token_for_gating` of both codes has it. Both read the answer before the first
pad token.
"""

from __future__ import annotations

import re
from collections.abc import Collection

import torch

from lightrm.architecture import GateForm
from lightrm.checkpoints.config import Config
from lightrm.checkpoints.head_outputs import label_names
from lightrm.checkpoints.layout import Layout, backbone, linear_head
from lightrm.checkpoints.score_position import Reading, reads_last
from lightrm.errors import ConfigError, TensorMismatchError

PROMPT_END = (128009, 128006, 78191, 128007, 271)
HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
ARMO = (
    *(f"helpsteer-{name}" for name in HELPSTEER),
    *(f"ultrafeedback-{name}" for name in ("overall_score", "instruction_following", "truthfulness", "honesty")),
    "ultrafeedback-helpfulness", "beavertails-is_safe", "prometheus-score", "argilla-overall_quality",
    "argilla-judge_lm", "code-complexity", "code-style", "code-explanation", "code-instruction-following",
    "code-readability",
)  # fmt: skip
GATING_FIELDS = frozenset({"num_objectives", "gating_temperature", "gating_hidden_dim", "gating_n_hidden"})
TOP = {"regression_layer.weight": "head.0.weight", "reward_transform_matrix": "gate.transform",
       "gating.logit_scale": "gate.factor"}  # fmt: skip
NORMS = {"weight": "weight", "bias": "bias", "running_mean": "mean", "running_var": "var"}


def is_armo(config: Config, names: Collection[str]) -> bool:
    return {"regression_layer.weight", "reward_transform_matrix"} <= set(names) and not config.has("num_quantiles")


def is_qrm(config: Config, names: Collection[str]) -> bool:
    return {"regression_layer.weight", "reward_transform_matrix"} <= set(names) and config.has("num_quantiles")


def is_urm(config: Config, names: Collection[str]) -> bool:
    return "score.weight" in names and "weights.fc.0.weight" in names


def armo_rename(name: str) -> str | None:
    if name in TOP:
        return TOP[name]
    layer = re.fullmatch(r"gating\.layers\.(\d+)\.(weight|bias)", name)
    return f"gate.{int(layer[1])}.{layer[2]}" if layer is not None else backbone(name)


def qrm_rename(name: str) -> str | None:
    """Its layers are linear, ReLU, batch norm, three by three."""
    if name in TOP:
        return TOP[name]
    layer = re.fullmatch(r"gating\.layers\.(\d+)\.(\w+)", name)
    if layer is None:
        return backbone(name)
    k, part = divmod(int(layer[1]), 3)
    if layer[2] == "num_batches_tracked":
        return ""
    if part == 2 and layer[2] in NORMS:
        return f"gate.{k}.norm.{NORMS[layer[2]]}"
    return f"gate.{k}.{layer[2]}" if part == 0 and layer[2] in ("weight", "bias") else None


def urm_rename(name: str) -> str | None:
    layer = re.fullmatch(r"weights\.fc\.(\d+)\.(weight|bias)", name)
    if layer is not None:
        return f"gate.{int(layer[1]) // 2}.{layer[2]}"
    return linear_head(name, "score") or backbone(name)


def mean_of_quantiles(config: Config, rows: torch.Tensor) -> torch.Tensor:
    """Return one row for each reward. Raises TensorMismatchError if they do not come out even."""
    count = config.integer("num_quantiles")
    if len(rows) % count:
        raise TensorMismatchError(f"{config.path}: num_quantiles is {count}, regression_layer has {len(rows)} rows")
    return rows.reshape(-1, count, *rows.shape[1:]).mean(1)


def every_second(config: Config, rows: torch.Tensor) -> torch.Tensor:
    """Return the rows of the means: URM's outputs come in pairs, of which the second is a spread."""
    if len(rows) % 2:
        raise TensorMismatchError(f"{config.path}: URM's score has {len(rows)} rows, expected two for each attribute")
    return rows[::2]


def gating_names(config: Config, count: int) -> tuple[str, ...]:
    """Return id2label's names if it has so many, or else the published ones of 19 or of 5 rewards.

    Raises TensorMismatchError if num_objectives is another number.
    """
    if config.has("num_objectives") and config.integer("num_objectives") != count:
        objectives = config.raw["num_objectives"]
        raise TensorMismatchError(f"{config.path}: num_objectives is {objectives}, the head has {count} rewards")
    named = config.entries("id2label")
    if len(named) == count and not any(str(name).startswith("LABEL_") for name in named.values()):
        return label_names(config, count)
    published = {len(ARMO): ARMO, len(HELPSTEER): ARMO[: len(HELPSTEER)]}
    return published.get(count, tuple(f"objective {k}" for k in range(count)))


def urm_names(config: Config, count: int) -> tuple[str, ...]:
    return HELPSTEER if count == len(HELPSTEER) else tuple(f"attribute {k}" for k in range(count))


def before_pad(config: Config) -> Reading:
    if config.integer("vocab_size") <= max(PROMPT_END):
        raise ConfigError(
            f"{config.path}: its gate is read at token {PROMPT_END[0]} of Llama 3, and vocab_size is "
            f"{config.raw['vocab_size']}"
        )
    pad = config.token_id("pad_token_id")
    if pad is None:
        return reads_last("as config.json has no pad_token_id")
    return Reading("before pad", "as its own class reads", pad)


def without_pad(config: Config) -> Reading:
    """SGLang's class, the one at hand for URM, reads the last token. A text with a pad token is refused."""
    pad = config.token_id("pad_token_id")
    return reads_last("as SGLang's class reads") if pad is None else Reading("no pad", "as SGLang's class reads", pad)


ARMORM = Layout(
    name="armorm",
    models="ArmoRM-Llama3-8B",
    describes="ArmoRM: regression_layer, gating and reward_transform_matrix",
    matches=is_armo,
    rename=armo_rename,
    template=lambda config: "chat",
    reading=before_pad,
    outputs="attributes",
    attributes=gating_names,
    gate=GateForm("relu", True, PROMPT_END),
    fields=GATING_FIELDS,
)
QRM = Layout(
    name="qrm",
    models="QRM on LLaMA-3",
    describes="QRM: regression_layer of quantiles, gating with batch norms and reward_transform_matrix",
    matches=is_qrm,
    rename=qrm_rename,
    template=lambda config: "chat",
    reading=before_pad,
    outputs="attributes",
    condense=mean_of_quantiles,
    attributes=gating_names,
    gate=GateForm("relu", True, PROMPT_END, adjusts=True),
    fields=GATING_FIELDS | {"num_quantiles"},
)
URM = Layout(
    name="urm",
    models="URM-LLaMa-3.1-8B",
    describes="URM: score of two numbers for each attribute, weighed by weights.fc",
    matches=is_urm,
    rename=urm_rename,
    template=lambda config: "chat",
    reading=without_pad,
    outputs="attributes",
    condense=every_second,
    attributes=urm_names,
    gate=GateForm("selu", False),
)
