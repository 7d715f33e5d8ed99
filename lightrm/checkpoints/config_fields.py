"""Which fields config.json may have: those that lightrm reads, and those that cannot change a score.

A field that lightrm does not know may change the model: `partial_rotary_factor` rotates only a part of each head. So a
field is refused by name unless it is read, known to be harmless, or at the value that means the part is absent.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from lightrm.checkpoints.config import Config, shown
from lightrm.checkpoints.families import family_of
from lightrm.errors import UnsupportedModelError

# Read for every model: the architecture, the head's outputs, the tokenizer's last resort, the stored dtype.
READ_NAMES = """
    model_type architectures hidden_act hidden_size num_attention_heads num_key_value_heads head_dim num_hidden_layers
    intermediate_size vocab_size rms_norm_eps max_position_embeddings rope_theta rope_scaling rope_parameters
    pad_token_id bos_token_id eos_token_id num_labels id2label quantization_config torch_dtype dtype
    compression_config
"""
# Training, generation, bookkeeping; what tensors tell by themselves (tied output layer, head sizes, biases).
HARMLESS_NAMES = """
    transformers_version auto_map name_or_path tokenizer_class tokenizer_name prefix finetuning_task problem_type
    label2id task_specific_params output_hidden_states output_attentions output_past output_scores return_dict
    return_dict_in_generate torchscript use_bfloat16 use_cache use_return_dict tf_legacy_loss chunk_size_feed_forward
    initializer_range initializer_factor init_std pretraining_tp gradient_checkpointing tie_word_embeddings
    attn_implementation experts_implementation keys_to_ignore_at_inference is_decoder cross_attention_hidden_size
    pad_token bos_token eos_token unk_token sep_token_id unk_token_id mask_token_id cls_token_id decoder_start_token_id
    forced_bos_token_id forced_eos_token_id user_token_id assistant_token_id end_of_conversation_token_id bad_words_ids
    begin_suppress_tokens suppress_tokens do_sample early_stopping diversity_penalty temperature top_k top_p typical_p
    epsilon_cutoff eta_cutoff length_penalty repetition_penalty encoder_repetition_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size exponential_decay_length_penalty max_length min_length max_new_tokens min_new_tokens
    num_beams num_beam_groups num_return_sequences remove_invalid_values num_assistant_tokens
    num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind target_lookbehind
    generation_config transformers.js_config sentence_transformers unsloth_version unsloth_fixed unsloth_tokenized
    model_name base_model base_model_name base_model_name_or_path neftune_noise_alpha training_args loss_type
    z_loss_weight packing_samples use_flash_attn use_flash_attention use_flash_attention_2 use_flash_attn_2 flash_attn
    bf16 fp16 fp32 deepspeed seed model_max_length max_sequence_length max_seq_length max_seq_len seq_length
    tokenizer_model_max_length tokenizer_padding_side padding_side truncation_side max_window_layers
    summary_dropout_prob v_head_init_strategy v_head_initializer_range vhead_layer_type vhead_num_neurons
    vhead_num_layers final_logit_softcapping cache_implementation
"""
# Names that this decoder has no use for at these values, and at no other.
AT_DEFAULT: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1,), "rotary_pct": (1,), "rope_interleaved": (False,), "is_causal": (True,),
    "is_encoder_decoder": (False,), "add_cross_attention": (False,), "tie_last_hidden_states": (True,),
    "attention_bias": (False,), "qkv_bias": (False,), "attention_out_bias": (False,), "use_rope": (True,),
    "score_dim": (1,), "use_mrope": (False,), "use_dynamic_ntk": (False,), "use_logn_attn": (False,),
    "qk_norm": (False,), "use_qk_norm": (False,), "qk_layernorm": (False,), "use_parallel_residual": (False,),
    "parallel_residual": (False,),
    "embedding_multiplier": (1,), "residual_multiplier": (1,), "norm_type": ("rmsnorm", "rms_norm", "RMSNorm"),
    "mlp_bias": (False,), "use_bidirectional_attention": (False,),
}  # fmt: skip
READ, HARMLESS = frozenset(READ_NAMES.split()), frozenset(HARMLESS_NAMES.split())
DROPOUT = re.compile(r"(.*_)?(dropout|pdrop|drop_rate|dropout_prob|dropout_p|dropout_rate)")
# A switch that is off is a part that is not there; but what every one of these decoders has may be switched off too.
ALWAYS_ON = re.compile(r"causal|rope|rotary|norm|residual|attention$|attn$|position|gate|mask")


@dataclass(frozen=True, slots=True)
class Fields:
    """Names of the fields in config.json: those that are read, and those that change nothing."""

    read: tuple[str, ...]
    harmless: tuple[str, ...]


def check_fields(config: Config, own: Collection[str]) -> Fields:
    """Return the fields of a config. own: what the layout reads. Raises UnsupportedModelError on one that may change
    the model."""
    family = family_of(config)
    reads = READ | set(family.reads) | set(own)
    read, harmless = [], []
    for name, value in config.raw.items():
        if name in reads:
            read.append(name)
        elif harmless_at(name, value, family.model_type):
            harmless.append(name)
        else:
            raise UnsupportedModelError(
                f"{config.path}: lightrm does not know the field {name!r} ({shown(value)}) of a {family.model_type} "
                "model, and what it does not know may change the scores. If you are sure that this field does not, "
                "take it out of a copy of config.json and load that folder"
            )
    return Fields(tuple(read), tuple(harmless))


def harmless_at(name: str, value: Any, family: str) -> bool:
    if family == "qwen2" and name in ("attention_bias", "qkv_bias"):  # its code never asks: it has them always
        return True
    if name in AT_DEFAULT:
        usual = (None, *AT_DEFAULT[name])
        return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in usual)
    if name == "layer_types" and isinstance(value, list):
        return set(map(str, value)) <= {"full_attention"}
    known = name in HARMLESS or name.startswith("_") or DROPOUT.fullmatch(name)
    nothing = value is None or value in ({}, [], "")
    return bool(known or nothing or (value is False and not ALWAYS_ON.search(name)))
