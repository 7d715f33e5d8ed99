"""Process reward models with a head of their own: Qwen2.5-Math-PRM and Skywork-o1-Open-PRM.

Qwen2ForProcessRewardModel (its own code; also vLLM and SGLang, qwen2_rm.py) has an MLP `score.0`, ReLU, `score.2`, with
biases, which gives two logits. A step's score is softmax(logits)[1] at the `<extra_0>` behind the step.

Skywork's PRM_MODEL (SkyworkAI/skywork-o1-prm-inference, model_utils/prm_model.py), class Qwen2ForPrmModel in its
config, has `v_head.summary` with a bias. A step's score is sigmoid(v_head) at the line break behind the step.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from lightrm.architecture import PostStep
from lightrm.checkpoints.config import Config
from lightrm.checkpoints.layout import Layout, backbone, difference, linear_head
from lightrm.checkpoints.score_position import reads_last


def is_qwen(config: Config, names: Collection[str]) -> bool:
    return config.classes == "Qwen2ForProcessRewardModel" and "score.0.weight" in names


def is_skywork(config: Config, names: Collection[str]) -> bool:
    return config.classes == "Qwen2ForPrmModel" and "v_head.summary.weight" in names


def qwen_rename(name: str) -> str | None:
    return linear_head(name, "score") or backbone(name)


def skywork_rename(name: str) -> str | None:
    return linear_head(re.sub(r"^pretrained_model\.", "", name), "v_head.summary") or backbone(
        name, ("model.", "pretrained_model.model.")
    )


QWEN = Layout(
    name="qwen_prm",
    models="Qwen2.5-Math-PRM",
    describes="Qwen2.5-Math-PRM: score.0 and score.2, read at each <extra_0>",
    matches=is_qwen,
    rename=qwen_rename,
    template=lambda config: None,
    reading=lambda config: reads_last("the <extra_0> behind a step"),
    post=lambda config, buffers: PostStep(probability=True),
    outputs="pair",
    condense=difference,
    steps="extra_0",
)
SKYWORK = Layout(
    name="skywork_prm",
    models="Skywork-o1-Open-PRM",
    describes="Skywork-o1-Open-PRM: v_head.summary of a Qwen2ForPrmModel, read at the line break behind each step",
    matches=is_skywork,
    rename=skywork_rename,
    template=lambda config: None,
    reading=lambda config: reads_last("the line break behind a step"),
    post=lambda config, buffers: PostStep(probability=True),
    steps="lines",
)
