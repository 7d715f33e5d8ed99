"""Stage one: the vocabulary, then next-token training on the corpus and on the preferred answers."""

from __future__ import annotations

import random
from pathlib import Path

import sentencepiece
import torch
from torch import nn

from training.network import VOCABULARY, RewardNetwork
from training.records import Pair, questions_and_answers
from training.steps import Steps

ROW = 512  # tokens of one training row
ROWS = 10  # rows a step
EPOCHS = 2


def train_vocabulary(texts: list[str], folder: Path) -> Path:
    """A sentencepiece BPE with LLaMA's own settings: byte fallback, split digits, unk/bos/eos = 0/1/2."""
    target = folder / "tokenizer.model"
    if target.exists():
        return target
    raw = folder / "vocabulary.txt"
    raw.write_text("\n".join(line for text in texts for line in text.split("\n") if line.strip()), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(raw),
        model_prefix=str(folder / "unfinished"),
        model_type="bpe",
        vocab_size=VOCABULARY,
        character_coverage=0.9985,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        max_sentence_length=16384,
        num_threads=2,
        minloglevel=1,
    )
    (folder / "unfinished.model").rename(target)
    return target


def token_stream(
    documents: list[str], pairs: list[Pair], vocabulary: sentencepiece.SentencePieceProcessor
) -> torch.Tensor:
    """Every preferred answer and every other document as `<s> text </s>`, shuffled once, end to end."""
    dialogues = {pair.prompt + pair.chosen for pair in pairs}
    dialogues |= {prompt + answer for prompt, answer, _ in questions_and_answers(documents)}
    # Most short documents are the pairs over again, without the template.
    others = [text for text in documents if len(text) > 2000 or not questions_and_answers([text])]
    texts = sorted({*others, *dialogues})
    random.Random(0).shuffle(texts)
    ids = [i for text in vocabulary.encode(texts) for i in (1, *text, 2)]
    return torch.tensor(ids)


def pretrain(network: RewardNetwork, stream: torch.Tensor, folder: Path) -> None:
    rows = stream[: len(stream) // ROW * ROW].view(-1, ROW)
    per_epoch = len(rows) // ROWS
    steps = Steps(network, folder / "pretrain.pt", total=EPOCHS * per_epoch, peak=2e-3, weight_decay=0.1)
    for step in steps.remaining():
        epoch, place = divmod(step, per_epoch)
        if epoch > 0:  # a fresh cut of the stream each epoch
            shift = 131 * epoch
            rows = stream[shift : shift + (len(stream) - shift) // ROW * ROW].view(-1, ROW)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(epoch))
        batch = rows[order[place * ROWS : (place + 1) * ROWS]]
        with torch.autocast("cpu", torch.bfloat16):
            logits = network.next_token_logits(batch)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
        steps.descend(loss)
