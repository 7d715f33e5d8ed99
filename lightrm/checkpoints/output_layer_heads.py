"""Reward models that are language models: their head is some rows of the output layer, and no other row is read.

    nemotron       nvidia/Llama-3.1-Nemotron-70B-Reward-HF (model card): the score is the logit of token 0 behind the
                   rendered chat, the first number of the logits that its `generate` makes
    math_shepherd  peiyi9979/math-shepherd-mistral-7b-prm (model card): softmax over the logits of `+` and `-` at each
                   step tag `ки`; the two ids are tokenizer.encode("+ -")[1:], 648 and 387
    rlhflow_prm    RLHFlow/Llama3.1-8B-PRM-Deepseek-Data and -Mistral-Data (RLHF-Reward-Modeling, prm_evaluate.py):
                   each step is a user turn that "+" answers; softmax over the logits of tokenizer.encode("+")[-1] and
                   tokenizer.encode("-")[-1] where "+" is predicted

Nothing in the files tells them from any other language model, whose logits would be scores without a meaning. So the
caller names the layout, unless the model is loaded by one of the hub ids above.
"""

from __future__ import annotations

from pathlib import Path

from lightrm.architecture import PostStep
from lightrm.checkpoints.layout import Layout, backbone, difference
from lightrm.checkpoints.score_position import reads_last
from lightrm.errors import TokenizerError
from lightrm.text.checkpoint_tokenizer import open_tokenizer

HEAD = "lm_head.weight"
PUBLISHED = {
    "nvidia/Llama-3.1-Nemotron-70B-Reward-HF": "nemotron",
    "peiyi9979/math-shepherd-mistral-7b-prm": "math_shepherd",
    "RLHFlow/Llama3.1-8B-PRM-Deepseek-Data": "rlhflow_prm",
    "RLHFlow/Llama3.1-8B-PRM-Mistral-Data": "rlhflow_prm",
}


def rename(name: str) -> str | None:
    return "head.0.weight" if name == HEAD else backbone(name)


def shepherd_rows(folder: Path) -> tuple[int, ...]:
    """Return the ids of `-` and `+` as the model card finds them. Raises TokenizerError."""
    found = open_tokenizer(folder, False).plain("+ -", True)[1:]
    if len(found) != 2:
        raise TokenizerError(f"{folder}: its tokenizer reads '+ -' as {found} behind BOS, expected one token each")
    return found[1], found[0]


def rlhflow_rows(folder: Path) -> tuple[int, ...]:
    """Return the ids of "-" and "+" as RLHFlow's code finds them. Raises TokenizerError."""
    tokenizer = open_tokenizer(folder, False)
    return tokenizer.plain("-", True)[-1], tokenizer.plain("+", True)[-1]


NEMOTRON = Layout(
    name="nemotron",
    models="Llama-3.1-Nemotron-70B-Reward-HF",
    describes="Llama-3.1-Nemotron-70B-Reward-HF: row 0 of lm_head",
    matches=lambda config, names: False,
    rename=rename,
    template=lambda config: "chat",
    reading=lambda config: reads_last("as its model card reads: the next token's logits"),
    rows=lambda folder: (0,),
    asked=True,
)
SHEPHERD = Layout(
    name="math_shepherd",
    models="math-shepherd-mistral-7b-prm",
    describes="math-shepherd-mistral-7b-prm: the rows of + and - in lm_head, read at each step tag",
    matches=lambda config, names: False,
    rename=rename,
    template=lambda config: None,
    reading=lambda config: reads_last("the step tag behind a step"),
    post=lambda config, buffers: PostStep(probability=True),
    condense=difference,
    steps="tagged",
    rows=shepherd_rows,
    asked=True,
)
RLHFLOW = Layout(
    name="rlhflow_prm",
    models="RLHFlow's Llama3.1-8B-PRM",
    describes="RLHFlow's Llama3.1-8B-PRM: the rows of + and - in lm_head, read before each answer +",
    matches=lambda config, names: False,
    rename=rename,
    template=lambda config: None,
    reading=lambda config: reads_last("the token before the answer + to a step"),
    post=lambda config, buffers: PostStep(probability=True),
    condense=difference,
    steps="turns",
    rows=rlhflow_rows,
    asked=True,
)
