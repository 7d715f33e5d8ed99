"""Stage two: a value head that prefers, trained by Bradley-Terry comparisons inside one group of answers.

A group is one prompt with a proper answer and spoilt ones: the rejected answer of the pair, a stutter, a cut,
and another prompt's answer. loss = -mean log sigmoid(better - worse) over the comparisons of the group.

One comparison of last tokens is a thin signal to learn relevance from. So two probes, thrown away afterwards, are asked
at every token of the answer. After the middle layer: does this token occur in the prompt, and is this pair of tokens a
repetition? At the end: does the answer belong to another prompt, and has it stuttered by now? The first are facts that
same-token heads can see at once; the later layers and the value head learn to sum them up.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from torch import nn

from training.corruptions import cut, repeated
from training.network import LONGEST, RewardNetwork
from training.records import Pair
from training.steps import Steps

TOKENS = 4096  # padded tokens a step
SHORT, SHORT_EPOCHS = 192, 3  # the first epochs see only groups this short: many comparisons, near matches
MIDDLE = 3  # layers below the first probe; those above it can still gather what it found
LONGEST_ANSWER = 600  # tokens: with a longer answer one group would fill a whole step
LONG = 640  # tokens of a sequence: groups beyond cost most of the time, one in three is seen an epoch
PROPER, FOREIGN, STUTTER = 0, 1, 2
NATURAL_WEIGHT = 0.5  # human labels are noisy, corruptions are not


@dataclass(frozen=True, slots=True)
class Stage:
    """A run of preference training: its checkpoint's name, length, learning rate, and the first epoch's number."""

    name: str
    steps: int
    peak: float
    first_epoch: int


PREFER = Stage("prefer", steps=2400, peak=6e-4, first_epoch=0)
POLISH = Stage("polish", steps=2200, peak=5e-4, first_epoch=SHORT_EPOCHS)  # all lengths, and neighbouring paragraphs


@dataclass(frozen=True, slots=True)
class Group:
    """Token ids of the candidates, and which is better than which: (better, worse, weight).

    faults: for each row its fault and the token it shows from; None where the probe has nothing to learn.
    """

    rows: list[list[int]]
    comparisons: list[tuple[int, int, float]]
    faults: list[tuple[int, int] | None]
    answer_from: int

    @property
    def longest(self) -> int:
        return max(map(len, self.rows))


def encode(vocabulary: sentencepiece.SentencePieceProcessor, prompt: str, answer: str) -> list[int]:
    """`<s> text </s>`; too long a text loses its front, so that the end of the answer is always seen."""
    ids = vocabulary.encode(prompt + answer)
    return [1, *ids[-(LONGEST - 2) :], 2]


def shared(a: list[int], b: list[int]) -> int:
    """Length of the common prefix."""
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Groups:
    """Makes the groups of one epoch: fresh corruptions and fresh foreign answers every time."""

    def __init__(self, pairs: list[Pair], asked: list[tuple[str, str, str]], vocabulary) -> None:
        self.vocabulary = vocabulary
        known = {pair.prompt for pair in pairs}
        self.items = [(p.prompt, p.chosen, p.rejected, p.lang) for p in pairs]
        self.items += [(prompt, answer, None, lang) for prompt, answer, lang in asked if prompt not in known]
        self.items = [item for item in self.items if len(vocabulary.encode(item[1])) <= LONGEST_ANSWER]
        self.answers: dict[str, list[tuple[str, str]]] = {"zh": [], "en": []}
        for prompt, chosen, _, lang in self.items:
            self.answers[lang].append((prompt, chosen))

    def foreign(self, prompt: str, answer: str, lang: str, rng: random.Random) -> str:
        """Another prompt's answer; half the time the nearest in length of four, so that length says little."""
        candidates: list[str] = []
        wanted = rng.choice((1, 4))
        while len(candidates) < wanted:
            other, foreign = rng.choice(self.answers[lang])
            if other != prompt and foreign != answer:
                candidates.append(foreign)
        return min(candidates, key=lambda a: abs(len(a) - len(answer)))

    def make(self, item: tuple[str, str, str | None, str], rng: random.Random) -> Group:
        prompt, chosen, rejected, lang = item
        rows, answers, comparisons = [encode(self.vocabulary, prompt, chosen)], [chosen], []
        faults: list[tuple[int, int] | None] = [(PROPER, 0)]
        answer_from = min(len(self.vocabulary.encode(prompt)) + 1, len(rows[0]) - 1)

        def worse(than: int, answer: str | None, fault: int | None, weight: float = 1.0) -> None:
            if answer is not None and answer not in answers:
                comparisons.append((than, len(answers), weight))
                answers.append(answer)
                rows.append(encode(self.vocabulary, prompt, answer))
                shows = shared(rows[than], rows[-1]) if fault == STUTTER else answer_from
                faults.append(None if fault is None else (fault, shows))

        if rejected is not None:
            worse(0, rejected, None, NATURAL_WEIGHT)
        # Spoil the rejected answer now and then: it too is a proper text.
        spoil = 1 if len(answers) == 2 and rng.random() < 0.3 else 0
        worse(spoil, repeated(answers[spoil], rng), STUTTER)
        worse(0, cut(answers[0], rng), PROPER)
        worse(0, self.foreign(prompt, chosen, lang, rng), FOREIGN)
        if len(chosen) < 400:  # cheap ones: relevance is the hardest of the three
            worse(0, self.foreign(prompt, chosen, lang, rng), FOREIGN)
        return Group(rows, comparisons, faults, answer_from)

    def epoch(self, number: int) -> list[list[Group]]:
        """Batches of groups of about one length, at most TOKENS padded tokens each, in random order."""
        rng = random.Random(number)
        groups = [self.make(item, rng) for item in self.items]
        if number < SHORT_EPOCHS:
            groups = [g for g in groups if g.comparisons and g.longest <= SHORT]
        else:
            groups = [g for g in groups if g.comparisons and (g.longest <= LONG or rng.random() < 1 / 3)]
        groups.sort(key=lambda g: g.longest + rng.random())
        batches, batch, rows = [], [], 0
        for group in groups:
            if batch and (rows + len(group.rows)) * group.longest > TOKENS:
                batches.append(batch)
                batch, rows = [], 0
            batch.append(group)
            rows += len(group.rows)
        batches.append(batch)
        rng.shuffle(batches)
        return batches


def token_facts(batch: list[Group], width: int) -> torch.Tensor:
    """For each answer token, (B, L, 2): does it occur in the prompt, and did it follow the same token before?"""
    facts = torch.zeros(sum(len(group.rows) for group in batch), width, 2)
    rows = [(group, ids) for group in batch for ids in group.rows]
    for row, (group, ids) in enumerate(rows):
        prompt, pairs = set(ids[: group.answer_from]), set()
        for k in range(group.answer_from, len(ids)):
            facts[row, k, 0] = ids[k] in prompt
            facts[row, k, 1] = (ids[k - 1], ids[k]) in pairs
            pairs.add((ids[k - 1], ids[k]))
    return facts


def probe_targets(batch: list[Group], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the probe should say at each token, (B, L, 2) of foreign and stutter, and where it is asked, (B, L)."""
    total = sum(len(group.rows) for group in batch)
    target, asked = torch.zeros(total, width, 2), torch.zeros(total, width, dtype=torch.bool)
    row = 0
    for group in batch:
        for ids, fault in zip(group.rows, group.faults, strict=True):
            if fault is not None:
                asked[row, group.answer_from : len(ids)] = True
                kind, shows = fault
                if kind != PROPER:
                    target[row, shows:, kind - 1] = 1.0
            row += 1
    return target, asked


def batch_loss(network: RewardNetwork, probes: nn.ModuleDict, batch: list[Group]) -> tuple[torch.Tensor, float]:
    rows = [row for group in batch for row in group.rows]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for k, row in enumerate(rows):
        ids[k, : len(row)] = torch.tensor(row)
    with torch.autocast("cpu", torch.bfloat16):
        layers = network.model(input_ids=ids, use_cache=False, output_hidden_states=True)
    hidden_BLD, middle_BLD = layers.last_hidden_state, layers.hidden_states[MIDDLE]
    scores = network.value(hidden_BLD, lengths)
    better, worse, weight, start = [], [], [], 0
    for group in batch:
        for b, w, weighs in group.comparisons:
            better.append(start + b)
            worse.append(start + w)
            weight.append(weighs)
        start += len(group.rows)
    margin = scores[better] - scores[worse]
    weights = torch.tensor(weight)
    loss = -(weights * nn.functional.logsigmoid(margin)).sum() / weights.sum()
    target, asked = probe_targets(batch, ids.shape[1])
    middle = nn.functional.rms_norm(middle_BLD[asked].float(), middle_BLD.shape[-1:])
    cross_entropy = nn.functional.binary_cross_entropy_with_logits
    probed = cross_entropy(probes["end"](hidden_BLD[asked].float()), target[asked])
    probed = probed + cross_entropy(probes["middle"](middle), token_facts(batch, ids.shape[1])[asked])
    return loss + probed + 1e-3 * scores.square().mean(), (margin > 0).float().mean().item()


def with_probes(network: RewardNetwork) -> nn.ModuleDict:
    """The network and the two probes that learn beside it."""
    width = network.model.config.hidden_size
    probes = nn.ModuleDict({"middle": nn.Linear(width, 2), "end": nn.Linear(width, 2)})
    return nn.ModuleDict({"network": network, "probes": probes})


def prefer(trained: nn.ModuleDict, groups: Groups, stage: Stage, folder: Path) -> None:
    schedule: list[list[Group]] = []
    sizes = [len(groups.epoch(stage.first_epoch))]
    while sum(sizes) < stage.steps:
        sizes.append(len(groups.epoch(stage.first_epoch + len(sizes))))
    steps = Steps(trained, folder / f"{stage.name}.pt", total=stage.steps, peak=stage.peak, weight_decay=0.05)
    current, right = -1, []
    for step in steps.remaining():
        epoch = 0
        while step >= sum(sizes[: epoch + 1]):
            epoch += 1
        if epoch != current:
            schedule, current = groups.epoch(stage.first_epoch + epoch), epoch
        loss, accuracy = batch_loss(trained["network"], trained["probes"], schedule[step - sum(sizes[:epoch])])
        right = [*right[-99:], accuracy]
        steps.descend(loss, f"comparisons right {sum(right) / len(right):.3f}")
