"""The ASGI application: routes from the table of endpoints, and the pages that need no model."""

from __future__ import annotations

import contextlib
import logging
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json, to_json
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lightrm.errors import LightRMError
from lightrm.scorer import RewardModel
from lightrm.serving import wire_forms as forms
from lightrm.serving.doorkeeper import LOG, Doorkeeper
from lightrm.serving.endpoints import ENDPOINTS, Asked, Endpoint, form_of
from lightrm.serving.gatherer import Answers, Gatherer, Texts
from lightrm.serving.limits import Access, Limits
from lightrm.serving.openapi import document
from lightrm.serving.refusals import RefusedError, refusal_of
from lightrm.serving.tallies import Tallies

PAGE = Path(__file__).parent / "page"
PAGES = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
POLICY = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
SHOWN = 3  # faults of one request that its answer names


def application(
    rm: RewardModel, name: str, access: Access, limits: Limits | None = None, *, log_texts: bool = False
) -> Starlette:
    """Return the application of one model. name: by which it is listed. log_texts: write what is scored to the log."""
    limits, tallies, started = limits or Limits(), Tallies(), int(time.time())
    gatherer = Gatherer(rm, limits.waiting, tallies.together)
    tallies.watch_waiting(lambda: gatherer.texts)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        gatherer.start()
        yield
        gatherer.close()

    async def scores(work: Answers | Texts) -> list[float]:
        if len(work) > limits.texts:
            raise RefusedError(
                413, "TooMany", f"a request has at most {limits.texts} texts, found {len(work)}: send fewer at once"
            )
        if work.longest > limits.longest:
            most = f"a text with its prompt has at most {limits.longest} characters"
            raise RefusedError(413, "TooLong", f"{most}, found {work.longest}")
        if work.characters > limits.characters:
            most = f"a request has at most {limits.characters} characters, a prompt's counted with each of its answers"
            raise RefusedError(413, "TooMany", f"{most}; found {work.characters}: send fewer answers at once")
        if log_texts:
            LOG.info("scoring %r", work)
        return await gatherer.scores(work)

    def posted(endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            form = read(endpoint, await request.body())
            return as_json(await endpoint.answer(Asked(form, name, dict(request.query_params), scores)))

        return answering(answer)

    async def health(request: Request) -> Response:
        if not gatherer.alive:
            raise RefusedError(503, "NotReady", "the thread that scores has ended: start the server again")
        return as_json(forms.Health())

    async def models(request: Request) -> Response:
        return as_json(forms.ModelsFound(data=[forms.ModelCard(id=name, created=started)]))

    async def metrics(request: Request) -> Response:
        return Response(tallies.text(), media_type="text/plain; version=0.0.4")

    described = to_json(document(access.key is not None))

    async def openapi(request: Request) -> Response:
        return Response(described, media_type="application/json")

    pages = {path: ((PAGE / file).read_bytes(), kind) for path, (file, kind) in PAGES.items()}

    async def page(request: Request) -> Response:
        content, kind = pages[request.url.path]
        return Response(content, media_type=kind, headers=POLICY)

    got = {"/health": answering(health), "/v1/models": models, "/metrics": metrics, "/openapi.json": openapi}
    routes = [Route(path, posted(one), methods=["POST"]) for one in ENDPOINTS for path in one.paths]
    routes += [Route(path, handler) for path, handler in (got | dict.fromkeys(PAGES, page)).items()]
    paths = frozenset(route.path for route in routes)
    takers = frozenset(path for one in ENDPOINTS for path in one.paths)
    doorkeeper = Middleware(Doorkeeper, access=access, limits=limits, tallies=tallies, paths=paths, posted=takers)
    app = Starlette(
        routes=routes, middleware=[doorkeeper], lifespan=lifespan, exception_handlers={HTTPException: no_route}
    )
    app.router.redirect_slashes = False  # trainers do not follow, and would read an empty body
    return app


def answering(answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """Turn what a route raises into an answer. Of an error that nobody expected, only its kind and its place are
    logged: its message may hold a user's text."""

    async def run(request: Request) -> Response:
        try:
            return await answer(request)
        except RefusedError as refusal:
            return refusal.response()
        except LightRMError as error:
            return refusal_of(error).response()
        except Exception as error:
            place = "".join(traceback.format_tb(error.__traceback__))
            logging.getLogger(LOG.name).error("%s in a request:\n%s", type(error).__name__, place)
            return RefusedError(500, "InternalError", f"{type(error).__name__}: the server's log says where").response()

    return run


def read(endpoint: Endpoint, body: bytes) -> forms.Form:
    """Return a request's form. Raises RefusedError."""
    try:
        found = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RefusedError(400, "InputError", f"the body is not JSON: {error}") from error
    form = form_of(endpoint, found)
    try:
        return form.model_validate(found)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        named = [f"{'.'.join(str(part)[:40] for part in fault['loc'])}: {fault['msg']}" for fault in faults[:SHOWN]]
        more = f", and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise RefusedError(400, "InputError", "; ".join(named) + more) from error


def as_json(found: Any) -> Response:
    return Response(to_json(found, exclude_none=True), media_type="application/json")


async def no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = sorted(path for one in ENDPOINTS for path in one.paths)
    said = f"no such address; there are {', '.join(known)}" if error.status_code == 404 else error.detail
    response = RefusedError(
        error.status_code, "NotFound" if error.status_code == 404 else "NotAllowed", said
    ).response()
    response.headers.update(error.headers or {})
    return response
