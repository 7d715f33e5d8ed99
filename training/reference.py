"""Train the reference reward model: LoRA of all linear layers and a value head on SmolLM2-135M-Instruct.

    python -m training.reference DATA --work build/reference --out benchmarks/reference

DATA holds pairs_train.jsonl.gz. A group is one prompt with its chosen answer, the rejected one, and spoilt ones (a
stutter or a cut, and another prompt's answer); loss = -mean log sigmoid(better - worse) over its comparisons. A group
is one row: the prompt once, the answers behind it, each of which sees the prompt and itself. About 70 minutes on
two CPU cores; a killed run goes on from its last checkpoint in `--work`.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn

from lightrm.data.record_forms import prompt_of
from lightrm.engine.packing import common_prefix
from lightrm.text.conversation import turns_of
from lightrm.text.encoding import Tokens, read_tokens
from lightrm.text.templates import Turn
from training.corruptions import cut, repeated
from training.lowrank import save_adapter, with_updates
from training.records import read_jsonl
from training.smollm2 import write_base
from training.steps import Steps

TOKENS = 2048  # padded tokens a step
LONGEST = 512  # tokens of a group: longer ones are left out
LONGEST_TEXT = 4096  # bytes of a record: what is longer is not even encoded
PEAK = 8e-4
STEPS = 560
NATURAL_WEIGHT = 1.0
SCORE_DECAY = 1e-3  # keeps scores near zero, where comparisons alone do not care


@dataclass(frozen=True, slots=True)
class Group:
    """prompt: its ids; answers: the ids behind it; comparisons: (better, worse, weight)."""

    prompt: list[int]
    answers: list[list[int]]
    comparisons: list[tuple[int, int, float]]

    @property
    def length(self) -> int:
        return len(self.prompt) + sum(map(len, self.answers))


class Groups:
    """Makes the groups of one epoch: fresh corruptions and fresh foreign answers every time."""

    def __init__(self, data: Path, tokens: Tokens) -> None:
        self.tokens, self.template = tokens, tokens.own_template()
        self.items = [
            (turns_of(prompt_of(r)), *sides(r), r["lang"])
            for r in read_jsonl(data / "pairs_train.jsonl.gz")
            if "CC-BY-SA" not in r["license"]
            and all(sides(r))
            and len((r["prompt"] + "".join(sides(r))).encode()) < LONGEST_TEXT
        ]
        self.answers = {lang: [item[1] for item in self.items if item[3] == lang] for lang in ("zh", "en")}

    def encode(self, turns: list[Turn], answer: str) -> list[int]:
        return self.tokens.encode(self.template, turns, [answer], 2 * LONGEST_TEXT, strict=True)[0].token_ids

    def make(self, item: tuple[list[Turn], str, str, str], rng: random.Random) -> Group:
        turns, chosen, rejected, lang = item
        texts, comparisons = [chosen], []

        def worse(than: int, answer: str | None, weight: float = 1.0) -> None:
            if answer is not None and answer not in texts:
                comparisons.append((than, len(texts), weight))
                texts.append(answer)

        worse(0, rejected, NATURAL_WEIGHT)
        spoil = 1 if len(texts) == 2 and rng.random() < 0.3 else 0  # a rejected answer too is a proper text
        first, second = rng.sample((cut, repeated), 2)
        spoilt = first(texts[spoil], rng)
        worse(spoil, spoilt if spoilt is not None else second(texts[spoil], rng))
        foreign = rng.sample(self.answers[lang], rng.choice((1, 4)))  # half the time the nearest in length of four
        worse(0, min(foreign, key=lambda text: abs(len(text) - len(chosen))))
        rows = [self.encode(turns, text) for text in texts]
        first_row = np.asarray(rows[0])
        start = min([common_prefix(first_row, np.asarray(row)) for row in rows[1:]] + [len(row) - 1 for row in rows])
        return Group(rows[0][:start], [row[start:] for row in rows], comparisons)

    def epoch(self, number: int) -> list[list[Group]]:
        """Batches of groups of about one length, at most TOKENS padded tokens each, in random order."""
        rng = random.Random(number)
        groups = [self.make(item, rng) for item in self.items]
        groups = sorted((g for g in groups if g.comparisons and g.length <= LONGEST), key=lambda g: g.length)
        batches: list[list[Group]] = [[]]
        for group in groups:
            if (len(batches[-1]) + 1) * group.length > TOKENS:
                batches.append([])
            batches[-1].append(group)
        rng.shuffle(batches)
        return batches


def sides(record: dict) -> tuple[str, str]:
    return record["chosen"].strip(), record["rejected"].strip()


def laid_out(batch: list[Group]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[tuple[int, int]]]:
    """ids (B, L), positions (B, L), who sees whom (B, 1, L, L), and where each answer ends: (row, column)."""
    width = max(group.length for group in batch)
    ids, positions = torch.zeros(len(batch), width, dtype=torch.long), torch.zeros(len(batch), width, dtype=torch.long)
    segment, ends = torch.zeros(len(batch), width, dtype=torch.long), []
    for row, group in enumerate(batch):
        column = len(group.prompt)
        ids[row, :column], positions[row, :column] = torch.tensor(group.prompt), torch.arange(column)
        for number, answer in enumerate(group.answers, 1):
            span = slice(column, column + len(answer))
            ids[row, span], segment[row, span] = torch.tensor(answer), number
            positions[row, span] = torch.arange(len(group.prompt), len(group.prompt) + len(answer))
            column += len(answer)
            ends.append((row, column - 1))
        segment[row, column:] = -1  # padding: nobody's, it sees what is left of it
    same = segment[:, :, None] == segment[:, None, :]
    visible = torch.ones(width, width, dtype=torch.bool).tril() & (same | (segment[:, None, :] == 0))
    return ids, positions, visible[:, None], ends


def batch_loss(model: nn.Module, head: nn.Linear, batch: list[Group]) -> tuple[torch.Tensor, float]:
    ids, positions, visible, ends = laid_out(batch)
    with torch.autocast("cpu", torch.bfloat16):
        mask = torch.zeros(visible.shape, dtype=torch.bfloat16).masked_fill(~visible, float("-inf"))
        layers = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
    rows, columns = zip(*ends, strict=True)
    scores = head(layers.last_hidden_state[list(rows), list(columns)].float())[:, 0]
    better, worse, weight, start = [], [], [], 0
    for group in batch:
        for b, w, weighs in group.comparisons:
            better.append(start + b)
            worse.append(start + w)
            weight.append(weighs)
        start += len(group.answers)
    margin, weights = scores[better] - scores[worse], torch.tensor(weight)
    loss = -(weights * nn.functional.logsigmoid(margin)).sum() / weights.sum()
    return loss + SCORE_DECAY * scores.square().mean(), (margin > 0).float().mean().item()


def train(base: Path, data: Path, work: Path, out: Path, steps_taken: int) -> None:
    model = transformers.LlamaModel.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    trained = with_updates(model)
    head = nn.Linear(model.config.hidden_size, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    groups = Groups(data, read_tokens(base))
    schedule = groups.epoch(0)[:steps_taken]
    print(f"{sum(map(len, schedule))} groups in {len(schedule)} steps", flush=True)
    both = nn.ModuleDict({"updates": trained, "head": head})
    steps = Steps(both, work / "reference.pt", total=len(schedule), peak=PEAK, weight_decay=0.0)
    right: list[float] = []
    for step in steps.remaining():
        loss, accuracy = batch_loss(model, head, schedule[step])
        right = [*right[-99:], accuracy]
        steps.descend(loss, f"comparisons right {sum(right) / len(right):.3f}")
    save_adapter(trained, head, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the preference pairs")
    parser.add_argument("--work", type=Path, default=Path("build/reference"), help="checkpoints and the base model")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/reference"), help="folder of the adapter")
    parser.add_argument("--steps", type=int, default=STEPS, help="of one epoch's 757")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    base = write_base(arguments.work / "base", arguments.work / "download")
    train(base, arguments.data, arguments.work, arguments.out, arguments.steps)


if __name__ == "__main__":
    main()
