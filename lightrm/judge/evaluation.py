"""How often a model agrees with labels, in the fields that trainers print, with intervals and baselines.

numpy on scores, of any model. The pairs are all pairs of a prompt's answers to which the labels give different worth.

    eval_accuracy            share of the pairs whose better answer scores higher; a tie is not right
    eval_loss                mean of -log sigmoid(better - worse), Bradley-Terry's, in float64
    eval_runtime             seconds
    eval_samples_per_second  pairs per second
    eval_steps_per_second    the same in steps of eight pairs, as LLaMA-Efficient-Tuning's cards count

Intervals: Wilson's for accuracies. They count all pairs as independent, and so are slightly narrow if a prompt has many
pairs. For the loss, percentiles of a bootstrap over prompts. A record whose labels call all answers equally good is a
tie: it is left out, and counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Group
from scipy.stats import binomtest

from lightrm.data.preferences import Question
from lightrm.display.tables import Column, Sheet, plain_text
from lightrm.errors import InputError
from lightrm.judge.agreement import Array, Estimate, Prompts, estimate, margins, share

STEP = 8  # pairs


@dataclass(frozen=True, slots=True)
class Part:
    """One line of the breakdown: group and its name, accuracy of the model and of the longer answer."""

    by: str
    name: str
    accuracy: Estimate
    longer: Estimate


@dataclass(frozen=True, slots=True)
class Evaluation:
    """longer: accuracy of preferring the answer with more characters; equal lengths count half. ties: records whose
    labels prefer no answer. unlabelled: records without labels, or with one answer. Both are left out.

    A coin is right in half of the pairs. A model whose accuracy is not clearly above 50 % and above `longer` has
    learned nothing about this data.
    """

    model: str
    data: str
    scheme: str
    accuracy: Estimate
    loss: Estimate
    seconds: float
    pairs: int
    prompts: int
    longer: Estimate
    parts: tuple[Part, ...]
    ties: int = 0
    unlabelled: int = 0

    @property
    def left_out(self) -> list[tuple[str, str]]:
        """What the labels say nothing about, as lines of the table."""
        found = (("ties in the labels", self.ties), ("without a preference", self.unlabelled))
        return [(name, f"{count} records, left out") for name, count in found if count]

    @property
    def fields(self) -> dict[str, float]:
        """The fields of model cards, under their names."""
        return {
            "eval_accuracy": self.accuracy.value,
            "eval_loss": self.loss.value,
            "eval_runtime": round(self.seconds, 4),
            "eval_samples_per_second": round(self.pairs / self.seconds, 3),
            "eval_steps_per_second": round(math.ceil(self.pairs / STEP) / self.seconds, 3),
        }

    def __rich__(self) -> Group:
        title = f"{self.model} as {self.scheme} on {self.pairs} pairs of {self.prompts} prompts of {self.data}"
        lines = [
            ("eval_accuracy", self.accuracy.text(4)),
            ("eval_loss", self.loss.text(4)),
            *((name, f"{self.fields[name]}") for name in list(self.fields)[2:]),
            ("a coin", "0.5000, loss 0.6931"),
            ("the longer answer", self.longer.text(4)),
            *self.left_out,
        ]
        whole = Sheet((Column("", words=True), Column("", words=True)), tuple(lines), title)
        headings = (
            Column("by", words=True), Column("", words=True), Column("accuracy"), Column("the longer answer"),
            Column("pairs"),
        )  # fmt: skip
        parts = tuple(
            (part.by, part.name, part.accuracy.percent(1), part.longer.percent(1), str(part.accuracy.n))
            for part in self.parts
        )
        return Group(whole, Sheet(headings, parts)) if parts else Group(whole)

    def __str__(self) -> str:
        return plain_text(self, 80)

    __repr__ = __str__


def wilson(right: float, n: int) -> Estimate:
    """Return a share with Wilson's 95 % interval. right may hold halves; for the interval it is rounded."""
    interval = binomtest(round(right), n).proportion_ci(method="wilson")
    return Estimate(right / n, float(interval.low), float(interval.high), n)


def evaluate_scores(
    questions: Sequence[Question], scores: NDArray[np.floating], seconds: float, model: str, data: str, scheme: str
) -> Evaluation:
    """Judge scores, one for each answer of each question, in order. Raises InputError if the labels prefer no
    answer."""
    prompt = np.asarray([k for k, q in enumerate(questions) for _ in q.responses], np.int64)
    worth = np.asarray([w for q in questions for w in q.worths])
    length = np.asarray([len(text) for q in questions for text in q.responses])
    prompts = Prompts(prompt)
    wanted = np.sign(np.nan_to_num(margins(worth, prompts)))
    pairs, sign = prompts.pairs[wanted != 0], wanted[wanted != 0]
    if not len(pairs):
        raise InputError(
            f'{data} prefers no answer to another in {len(questions)} records: evaluation needs "chosen" and '
            '"rejected", or scores, or another form of lightrm.data.record_forms'
        )
    margin = sign * (scores[pairs[:, 0]].astype(np.float64) - scores[pairs[:, 1]])
    right = margin > 0
    longer = (1 + np.sign(sign * (length[pairs[:, 0]] - length[pairs[:, 1]]))) / 2
    of = prompt[pairs[:, 0]]
    labelled = [q.worth is not None and len(q.responses) > 1 for q in questions]
    parts = []
    for by in ("lang", "kind", "source"):
        labels = np.asarray([getattr(q, by) for q in questions])[of]
        for name in sorted(set(labels)) if len(set(labels)) > 1 else ():
            chosen = labels == name
            n = int(chosen.sum())
            parts.append(Part(by, str(name), wilson(right[chosen].sum(), n), wilson(longer[chosen].sum(), n)))
    return Evaluation(
        model=model,
        data=data,
        scheme=scheme,
        accuracy=wilson(right.sum(), len(right)),
        loss=mean_loss(margin, of),
        seconds=seconds,
        pairs=len(pairs),
        prompts=len(np.unique(of)),
        longer=wilson(longer.sum(), len(longer)),
        parts=tuple(parts),
        ties=sum(labelled) - len(np.unique(of)),
        unlabelled=len(questions) - sum(labelled),
    )


def mean_loss(margin: Array, of: NDArray[np.int64]) -> Estimate:
    """Return Bradley-Terry's loss over pairs, with an interval over prompts. of: the prompt of each pair."""
    loss = np.logaddexp(0, -margin)
    asked, index = np.unique(of, return_inverse=True)
    top, bottom = np.bincount(index, loss), np.bincount(index)
    draws = [share(top[chosen].sum(), bottom[chosen].sum()) for chosen in Prompts(asked).drawn()]
    return estimate(float(loss.mean()), np.asarray(draws), len(loss))
