"""Which layer's quantization moves the score: one layer at a time is quantized, the others are in full precision.

Schemes with int8 activations run in a rotated basis. The exact layers are rotated into the same basis, in float32,
where they compute what the original computes. So a quantized layer can stand among exact ones.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from lightrm.answer_scores import AnswerScores
from lightrm.architecture import Alibi
from lightrm.data.preferences import Question
from lightrm.display.progress import item_progress
from lightrm.engine.answer_ids import AnswerIds, joined
from lightrm.engine.devices import free_bytes
from lightrm.engine.engine import Engine
from lightrm.engine.memory import SHARE, weight_bytes
from lightrm.errors import InputError, SchemeError
from lightrm.judge.agreement import Array, Prompts, spread_of
from lightrm.judge.fidelity import Sensitivity
from lightrm.loading.folding import Folding
from lightrm.loading.loader import Loader
from lightrm.loading.placement import Placement
from lightrm.loading.quantized_folder import is_native
from lightrm.model.decoder import Decoder, Layer, Layers
from lightrm.model.head import ValueHead
from lightrm.schemes.grammar import parse_scheme
from lightrm.scorer import RewardModel, native
from lightrm.text.conversation import asked_once

TOKENS = 8192  # of text that the passes run over


@dataclass(frozen=True, slots=True)
class Mixture:
    """The layers of one model, some of them replaced by those of another."""

    ours: Layers
    theirs: Layers
    taken: Collection[int]

    def __len__(self) -> int:
        return len(self.ours)

    def __getitem__(self, i: int) -> Layer:
        return self.theirs[i] if i in self.taken else self.ours[i]


def measure_sensitivity(
    rm: RewardModel, questions: Sequence[Question], *, tokens: int = TOKENS, progress: bool = False
) -> Sensitivity:
    """Run one pass for each layer over the first questions that have `tokens` tokens together.

    rm: loaded from its source with int8 activations (w8a8, w4a8, ..., calibrated or not). progress: show a bar. Raises
    SchemeError for other schemes, InputError for a folder that holds no exact weights.
    """
    if not rm.report.scheme.integer:
        raise SchemeError(f"sensitivity is of schemes with int8 activations, w8a8 or w4a8, not of {rm.report.scheme}")
    checkpoint, engine = native(rm)
    if is_native(checkpoint.folder):
        raise InputError(f"{checkpoint.folder} holds quantized weights only: load its source with {rm.report.scheme}")
    ids, prompt = some_ids(rm, questions, tokens)
    exact, head = exact_twin(rm)

    def scores(taken: Collection[int]) -> Array:
        return scores_through(Mixture(exact.layers, engine.decoder.layers, taken), rm, exact, head, ids)

    reference = scores(())
    unit = spread_of(reference, Prompts(prompt))

    def moved(taken: Collection[int]) -> float:
        return float(np.sqrt(np.mean((scores(taken) - reference) ** 2)) / unit)

    layers = []
    count = len(exact.layers)
    with item_progress(count, "layers quantized alone", progress) as advance:
        for i in range(count):
            layers.append(moved((i,)))
            advance(1)
    return Sensitivity(
        rm.report.scheme.name, tuple(layers), moved(range(count)), len(ids.whole), sum(map(len, ids.whole))
    )


def some_ids(rm: RewardModel, questions: Sequence[Question], tokens: int) -> tuple[AnswerIds, np.ndarray]:
    """Return the ids of whole questions until there are enough tokens, and the question of each answer."""
    text = AnswerScores(rm.text, rm.engine)
    read: list[AnswerIds] = []
    of: list[int] = []
    count = 0
    for k, question in enumerate(questions):
        read.append(text.ids(asked_once(question.each_prompt, question.responses), progress=False))
        of += [k] * len(question.responses)
        count += sum(map(len, read[-1].whole))
        if count >= tokens:
            break
    return joined(read), np.asarray(of, np.int64)


def scores_through(layers: Layers, rm: RewardModel, exact: Decoder, head: ValueHead, ids: AnswerIds) -> Array:
    """Return the scores of `exact` with its layers replaced, float64, one for each answer."""
    decoder = Decoder(exact.architecture, exact.embedding_VD, layers, None, exact.dtype)
    engine = Engine(decoder, head, rm.report.scheme, rm.engine.residence)
    return ids.made(engine.all_scores(rm.text.read(ids.sequences))).astype(np.float64)


def exact_twin(rm: RewardModel) -> tuple[Decoder, ValueHead]:
    """Return the same model in float32 in the rotated basis, streamed if it does not fit, and its head."""
    checkpoint, engine = native(rm)
    positions = engine.architecture.positions
    alibi = positions if isinstance(positions, Alibi) else Alibi()
    full = parse_scheme("fp32", rm.device)
    loader = Loader(checkpoint, Placement(full, rm.device, alibi))
    loader.folding = Folding(loader.architecture)
    streamed = weight_bytes(loader.architecture, full) > SHARE * free_bytes(rm.device)
    loaded = loader.load(streamed)
    return loaded.decoder, engine.head if loaded.head.names else loaded.head  # with what the caller chose
