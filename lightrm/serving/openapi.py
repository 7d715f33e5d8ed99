"""The OpenAPI document of a server, from the table of endpoints and pydantic's schemas."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import models_json_schema

import lightrm
from lightrm.serving import wire_forms as forms
from lightrm.serving.endpoints import ENDPOINTS, Endpoint

REF = "#/components/schemas/{model}"
REFUSED = {
    "400": "The request is not understood, or holds a text that cannot be scored",
    "401": "The API key is missing or wrong",
    "403": "The Host header is not a name of this machine, and there is no API key",
    "408": "The request did not arrive in time",
    "413": "The request is too large, or a text is too long in strict mode",
    "415": "The request is not JSON",
    "429": "Too much waits already; Retry-After says when to ask again",
}


def document(keyed: bool) -> dict[str, Any]:
    """Return the document. keyed: whether an API key is asked for."""
    asked: list[type[BaseModel]] = [form for endpoint in ENDPOINTS for _, form in endpoint.forms]
    found = [kind for endpoint in ENDPOINTS for kind in endpoint.found]
    answers: list[type[BaseModel]] = [kind for kind in found if isinstance(kind, type) and issubclass(kind, BaseModel)]
    answers += [forms.RankedText, forms.ModelsFound, forms.Health, forms.ErrorFound]
    modes: list[tuple[type[BaseModel], Literal["validation", "serialization"]]] = []
    modes += [(form, "validation") for form in asked] + [(form, "serialization") for form in answers]
    _, schemas = models_json_schema(modes, ref_template=REF)
    paths: dict[str, Any] = {path: {"post": posted(one, path)} for one in ENDPOINTS for path in one.paths}
    paths["/health"] = {"get": got("Whether the model scores.", reference(forms.Health), keyed=False)}
    paths["/v1/models"] = {"get": got("The model.", reference(forms.ModelsFound))}
    paths["/metrics"] = {"get": got("Counts in Prometheus' text format.", {"type": "string"}, kind="text/plain")}
    made: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "lightrm", "version": lightrm.__version__, "description": "Scores of a reward model."},
        "paths": paths,
        "components": {"schemas": schemas["$defs"]},
    }
    if keyed:
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"key": []}]
    return made


def posted(endpoint: Endpoint, path: str) -> dict[str, Any]:
    body = [reference(form) for _, form in endpoint.forms]
    found = {
        "description": "The scores",
        "content": {"application/json": {"schema": any_of(map(schema_of, endpoint.found))}},
    }
    made: dict[str, Any] = {
        "summary": endpoint.says,
        "operationId": path.strip("/").replace("/", "_"),
        "requestBody": {"required": True, "content": {"application/json": {"schema": any_of(body)}}},
        "responses": {"200": found, **refused()},
    }
    if path == "/get_reward":
        said = "true: prompt and response are one text that a chat template made"
        made["parameters"] = [{"name": "templated", "in": "query", "description": said, "schema": {"type": "boolean"}}]
    return made


def got(says: str, schema: dict[str, Any], kind: str = "application/json", keyed: bool = True) -> dict[str, Any]:
    codes = ("401", "403") if keyed else ("403",)
    answers = {"200": {"description": says, "content": {kind: {"schema": schema}}}}
    return {"summary": says, "responses": answers | {code: refused()[code] for code in codes}} | (
        {} if keyed else {"security": []}
    )


def refused() -> dict[str, Any]:
    content = {"application/json": {"schema": reference(forms.ErrorFound)}}
    return {code: {"description": says, "content": content} for code, says in REFUSED.items()}


def any_of(schemas: Any) -> dict[str, Any]:
    every = list(schemas)
    return every[0] if len(every) == 1 else {"anyOf": every}


def schema_of(kind: Any) -> dict[str, Any]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return reference(kind)
    made = TypeAdapter(kind).json_schema(ref_template=REF)
    made.pop("$defs", None)
    return made


def reference(model: type[BaseModel]) -> dict[str, Any]:
    return {"$ref": REF.format(model=model.__name__)}
