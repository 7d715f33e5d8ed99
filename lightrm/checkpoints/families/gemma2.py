"""Gemma 2: Gemma with norms behind attention and MLP too, capped attention scores, and a window in every second
layer."""

from __future__ import annotations

from dataclasses import replace

from lightrm.architecture import Architecture
from lightrm.checkpoints.config import Config
from lightrm.checkpoints.families.family import (
    FULL,
    GELU_TANH,
    SLIDING,
    Family,
    check_activation,
    layer_types,
    read_layers,
    read_window,
    windows_by_type,
)  # fmt: skip
from lightrm.checkpoints.families.gemma import gemma
from lightrm.checkpoints.rope_config import read_rope

WINDOW, SOFTCAP, SCORE_WIDTH = 4096, 50.0, 256  # transformers' defaults, where config.json is silent
READS = (
    "attention_bias", "hidden_activation", "query_pre_attn_scalar", "sliding_window", "layer_types",
    "attn_logit_softcapping",
)  # fmt: skip
NAMES = {
    "post_attention_layernorm": "attention_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}


def architecture(config: Config) -> Architecture:
    check_activation(config, ("hidden_act", "hidden_activation"), GELU_TANH)
    types = layer_types(config) or [FULL if i % 2 else SLIDING for i in range(read_layers(config))]
    capped = "attn_logit_softcapping" not in config.raw or config.has("attn_logit_softcapping")
    return replace(
        gemma(config, read_rope(config)),
        post_norms=True,
        score_width=config.number("query_pre_attn_scalar", SCORE_WIDTH, positive=True),
        softcap=config.number("attn_logit_softcapping", SOFTCAP, positive=True) if capped else None,
        windows=windows_by_type(config, types, read_window(config, WINDOW)),
    )


FAMILY = Family("gemma2", architecture, reads=READS, names=NAMES)
