"""Each address with the forms that it takes and what it answers: a table, from which routes and OpenAPI are made."""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit

from lightrm.errors import InputError
from lightrm.judge.exact_ranking import plain_ranking
from lightrm.serving import wire_forms as forms
from lightrm.serving.gatherer import Answers, Texts, asking
from lightrm.serving.refusals import RefusedError
from lightrm.text.conversation import responses_of, texts_of, turns_of

Scores = Callable[[Answers | Texts], Awaitable[list[float]]]


@dataclass(frozen=True, slots=True)
class Asked:
    """One request. name: of the model, for the answer. query: of its address. scores: waits for the model."""

    form: Any
    name: str
    query: dict[str, str]
    scores: Scores


@dataclass(frozen=True, slots=True)
class Endpoint:
    """paths: all of one meaning. forms: each with the fields of which one tells it. answer: what it gives, by form."""

    paths: tuple[str, ...]
    says: str
    forms: tuple[tuple[tuple[str, ...], type[forms.Form]], ...]
    found: tuple[Any, ...]
    answer: Callable[[Asked], Awaitable[Any]]


async def score(asked: Asked) -> forms.ScoreFound | forms.PairsFound:
    form = asked.form
    if isinstance(form, forms.ScoreAsked):
        scores = await asked.scores(answers(form.prompt, form.responses, form.system))
        return forms.ScoreFound(model=asked.name, scores=scores)
    queries = [form.queries] if isinstance(form.queries, str) else form.queries
    documents = [form.documents] if isinstance(form.documents, str) else form.documents
    if len(queries) not in (1, len(documents)):
        raise InputError(f"expected one query, or one for each of {len(documents)} documents; found {len(queries)}")
    prompts = [asking(turns_of(query)) for query in queries]
    prompts = prompts if len(prompts) == len(documents) else prompts * len(documents)
    pairs = list(zip(prompts, responses_of(documents), strict=True))
    scores = activated(await asked.scores(Answers(pairs)), form.use_activation)
    data = [forms.PairFound(index=k, score=value) for k, value in enumerate(scores)]
    return forms.PairsFound(id=label("score"), created=now(), model=asked.name, data=data)


async def rerank(asked: Asked) -> forms.RerankFound | list[forms.RankedText]:
    form = asked.form
    if isinstance(form, forms.TextsAsked):
        scores = activated(await asked.scores(answers(form.query, form.texts)), not form.raw_scores)
        return [
            forms.RankedText(index=one.index, score=one.score, text=one.response if form.return_text else None)
            for one in plain_ranking(np.asarray(scores), form.texts)
        ]
    texts = [document if isinstance(document, str) else document.text for document in form.documents]
    scores = activated(await asked.scores(answers(form.query, texts)), form.use_activation)
    ranked = [
        forms.Ranked(
            index=one.index,
            document=forms.Document(text=one.response) if form.return_documents else None,
            relevance_score=one.score,
        )
        for one in plain_ranking(np.asarray(scores), texts)
    ]
    return forms.RerankFound(id=label("rerank"), model=asked.name, results=ranked[: form.top_n or None])


async def classify(asked: Asked) -> forms.ClassifyFound:
    scores = activated(await asked.scores(templated(asked.form.input)), asked.form.use_activation)
    data = [forms.Classified(index=k, probs=[value]) for k, value in enumerate(scores)]
    return forms.ClassifyFound(id=label("classify"), created=now(), model=asked.name, data=data)


async def embeddings(asked: Asked) -> forms.EmbeddingsFound:
    scores = await asked.scores(templated(asked.form.input))
    data = [forms.Embedded(index=k, embedding=[value]) for k, value in enumerate(scores)]
    return forms.EmbeddingsFound(model=asked.name, data=data)


async def get_reward(asked: Asked) -> forms.RewardsFound | float:
    form = asked.form
    if isinstance(form, forms.QueriesAsked):
        scores = await asked.scores(templated(form.query))
        return forms.RewardsFound(rewards=scores, scores=scores)
    if asked.query.get("templated", "").lower() in ("1", "true"):
        if not isinstance(form.prompt, str):
            raise InputError("with ?templated=true the prompt must be a text that a chat template made, found turns")
        (found,) = await asked.scores(templated(form.prompt + form.response))
    else:
        (found,) = await asked.scores(answers(form.prompt, [form.response]))
    return found


ENDPOINTS = (
    Endpoint(
        ("/score", "/v1/score"), "Score answers.",
        ((("responses",), forms.ScoreAsked), (("queries", "documents", "text_1", "text_2"), forms.PairsAsked)),
        (forms.ScoreFound, forms.PairsFound), score,
    ),
    Endpoint(
        ("/rerank", "/v1/rerank", "/v2/rerank"), "Answers to one prompt, best first.",
        ((("texts",), forms.TextsAsked), (("documents",), forms.RerankAsked)),
        (forms.RerankFound, list[forms.RankedText]), rerank,
    ),
    Endpoint(
        ("/classify",), "Score texts that a chat template made, as verl asks of vLLM.",
        ((("input",), forms.ClassifyAsked),), (forms.ClassifyFound,), classify,
    ),
    Endpoint(
        ("/v1/embeddings",), "Score texts that a chat template made, as verl asks of SGLang.",
        ((("input",), forms.EmbeddingsAsked),), (forms.EmbeddingsFound,), embeddings,
    ),
    Endpoint(
        ("/get_reward",), "Score for OpenRLHF (templated texts) or slime (one prompt and response; a bare number).",
        ((("query",), forms.QueriesAsked), (("response",), forms.SampleAsked)),
        (forms.RewardsFound, float), get_reward,
    ),
)  # fmt: skip


def form_of(endpoint: Endpoint, found: Any) -> type[forms.Form]:
    """Return the form that a request has. Raises RefusedError if it has none."""
    expected = ", or ".join(f"{' and '.join(required(form))}" for _, form in endpoint.forms)
    if not isinstance(found, dict):
        raise RefusedError(400, "InputError", f"expected a JSON object with {expected}; found {type(found).__name__}")
    for telling, form in endpoint.forms:
        if any(name in found for name in telling):
            return form
    names = ", ".join(f"{name!r:.40}" for name in list(found)[:8]) or "none"
    raise RefusedError(400, "InputError", f"expected a JSON object with {expected}; found the fields {names}")


def required(form: type[forms.Form]) -> list[str]:
    return [repr(name) for name, field in form.model_fields.items() if field.is_required()]


def answers(prompt: Any, responses: Sequence[Any], system: str | None = None) -> Answers:
    """Return answers to one prompt, checked. Raises InputError."""
    asked = asking(turns_of(prompt, system))
    return Answers([(asked, text) for text in responses_of(responses)])


def templated(texts: str | list[str]) -> Texts:
    return Texts(texts_of([texts] if isinstance(texts, str) else texts))


def activated(scores: list[float], asked: bool | None) -> list[float]:
    """Return the sigmoid of each score, if that is asked for."""
    return [float(value) for value in expit(scores)] if asked else scores


def label(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"


def now() -> int:
    return int(time.time())
