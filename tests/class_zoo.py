"""Tiny random models of transformers' own classes, written by transformers, with tokenizers of their kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.vocabularies import CORPUS, unigram

SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 600,
    "initializer_range": 0.2, "num_labels": 1,
}  # fmt: skip
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def written(name: str, folder: Path, **config: Any) -> Path:
    """Write a model of a class, its config class being named alike."""
    theirs = getattr(transformers, name.replace("ForSequenceClassification", "Config"))
    torch.manual_seed(3)
    model = getattr(transformers, name)(theirs(**{**SIZES, **config}))
    with torch.no_grad():
        for part in model.parameters():  # biases too, which start at 0
            part.add_(torch.randn_like(part) * 0.05)
    model.save_pretrained(folder)
    return folder


def deberta(folder: Path) -> Path:
    written(
        "DebertaV2ForSequenceClassification", folder, max_position_embeddings=64, relative_attention=True,
        position_buckets=16, pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm", share_att_key=True,
        position_biased_input=False, type_vocab_size=0, pooler_hidden_size=64,
    )  # fmt: skip
    return with_tokenizer(folder, unigram(), {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"})


def bert(folder: Path) -> Path:
    written("BertForSequenceClassification", folder, max_position_embeddings=64)
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=500, show_progress=False, special_tokens=specials)
    )
    return with_tokenizer(
        folder, tokenizer, {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]", "unk": "[UNK]"}
    )


def roberta(folder: Path) -> Path:
    written("RobertaForSequenceClassification", folder, max_position_embeddings=66, type_vocab_size=1, pad_token_id=1)
    return with_tokenizer(
        folder, byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]),
        {"cls": "<s>", "sep": "</s>", "pad": "<pad>", "mask": "<mask>", "unk": "<unk>"}, middle=2,
    )  # fmt: skip


def modernbert(folder: Path) -> Path:
    written(
        "ModernBertForSequenceClassification", folder, max_position_embeddings=64, pad_token_id=0, cls_token_id=1,
        sep_token_id=2, bos_token_id=1, eos_token_id=2, local_attention=8, num_hidden_layers=4,
    )  # fmt: skip
    return with_tokenizer(
        folder, byte_level(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]),
        {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]", "unk": "[UNK]"}, types=False,
    )  # fmt: skip


def gpt_neox(folder: Path, pad: int | None = 1) -> Path:
    written("GPTNeoXForSequenceClassification", folder, max_position_embeddings=128, pad_token_id=pad)
    return with_chat(folder)


def with_chat(folder: Path) -> Path:
    """Write a tokenizer with a chat template."""
    tokenizer = byte_level(["<|endoftext|>", "<|padding|>", "<|im_start|>", "<|im_end|>"])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>", pad_token="<|padding|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    fast.chat_template = CHAT
    fast.save_pretrained(folder)
    return folder


def byte_level(specials: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, show_progress=False, special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def with_tokenizer(
    folder: Path, tokenizer: Tokenizer, names: dict[str, str], middle: int = 1, types: bool = True
) -> Path:
    """Write a tokenizer that puts CLS and SEP around a text, and `middle` times SEP between two."""
    tokenizer.add_special_tokens(sorted(set(names.values())))
    cls, sep = names["cls"], names["sep"]
    kind = ":1" if types else ""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}", pair=f"{cls} $A {' '.join([sep] * middle)} $B{kind} {sep}{kind}",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in (cls, sep)],
    )  # fmt: skip
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=64, **{f"{role}_token": name for role, name in names.items()},
        model_input_names=["input_ids", "attention_mask", *(["token_type_ids"] if types and middle == 1 else [])],
    )  # fmt: skip
    fast.save_pretrained(folder)
    return folder


ENCODERS = {"deberta": deberta, "bert": bert, "roberta": roberta, "modernbert": modernbert}


def reference(folder: Path, **options: Any) -> Any:
    """The model as transformers loads it."""
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, **options).eval()


@torch.inference_mode()
def one_by_one(model: Any, sequences: list[list[int]]) -> list[float]:
    return [float(model(input_ids=torch.tensor([ids])).logits) for ids in sequences]
