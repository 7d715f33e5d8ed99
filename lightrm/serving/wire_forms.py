"""The requests that each kind of caller sends, and the answers that it reads, as pydantic models.

The forms are those of lightrm, vLLM (`/score`, `/rerank`, `/classify`), text-embeddings-inference (`/rerank` with
`texts`), SGLang (`/v1/embeddings`), OpenRLHF and slime (`/get_reward`). Fields that do not matter to a score are
ignored. Scores are raw unless a form says otherwise.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, WithJsonSchema

Turns = list[dict[str, Any]]
Text = str | Turns
Whole = Annotated[str, WithJsonSchema({"type": "string", "minLength": 1})]  # lightrm itself refuses an empty one


class Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class ScoreAsked(Form):
    """lightrm's own: several answers to one prompt."""

    prompt: Text = Field(description="A string, or turns with role and content, the last one the user's.")
    responses: list[str | dict[str, Any]] = Field(description="Strings, or assistant turns.")
    system: str | None = Field(None, description="A system turn to put before the prompt.")


class PairsAsked(Form):
    """vLLM's: pairs of texts. One query stands for all documents."""

    queries: str | list[str] = Field(
        validation_alias=AliasChoices("queries", "text_1"), description="Prompts; also called text_1."
    )
    documents: str | list[str] = Field(
        validation_alias=AliasChoices("documents", "text_2"), description="Answers; also called text_2."
    )
    use_activation: bool | None = Field(None, description="true: the sigmoid of each score.")


class DocumentAsked(Form):
    text: str


class RerankAsked(Form):
    """vLLM's, Jina's and Cohere's: answers to one prompt, best first."""

    query: str
    documents: list[str | DocumentAsked]
    top_n: int | None = Field(None, ge=0, description="How many to return; 0 or nothing: all.")
    return_documents: bool = True
    use_activation: bool | None = Field(None, description="true: the sigmoid of each score.")


class TextsAsked(Form):
    """text-embeddings-inference's: answers to one prompt, best first."""

    query: str
    texts: list[str]
    raw_scores: bool = Field(False, description="false: the sigmoid of each score, as this form has it.")
    return_text: bool = False


class ClassifyAsked(Form):
    """vLLM's, as verl asks: texts that a chat template made."""

    input: Whole | list[Whole]
    use_activation: bool | None = Field(None, description="true: the sigmoid of each score.")


class EmbeddingsAsked(Form):
    """SGLang's, as verl asks: texts that a chat template made. The one number of an embedding is the score."""

    input: Whole | list[Whole]


class QueriesAsked(Form):
    """OpenRLHF's: texts that a chat template made."""

    query: Whole | list[Whole]


class SampleAsked(Form):
    """slime's: one answer. With ?templated=true in the address, prompt and response are one templated text."""

    prompt: Text
    response: str


class ScoreFound(BaseModel):
    model: str
    scores: list[float] = Field(description="float32, in the order of the responses.")


class PairFound(BaseModel):
    index: int
    object: Literal["score"] = "score"
    score: float


class PairsFound(BaseModel):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[PairFound]


class Document(BaseModel):
    text: str


class Ranked(BaseModel):
    index: int
    document: Document | None = None
    relevance_score: float


class RerankFound(BaseModel):
    id: str
    model: str
    results: list[Ranked]


class RankedText(BaseModel):
    index: int
    score: float
    text: str | None = None


class Classified(BaseModel):
    index: int
    label: str = "LABEL_0"
    probs: list[float]
    num_classes: int = 1


class ClassifyFound(BaseModel):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Classified]


class Embedded(BaseModel):
    index: int
    object: Literal["embedding"] = "embedding"
    embedding: list[float]


class EmbeddingsFound(BaseModel):
    object: Literal["list"] = "list"
    model: str
    data: list[Embedded]


class RewardsFound(BaseModel):
    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, float] = Field(default_factory=dict)


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["lightrm"] = "lightrm"


class ModelsFound(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Problem(BaseModel):
    type: str
    message: str


class ErrorFound(BaseModel):
    error: Problem
