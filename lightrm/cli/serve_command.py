"""lightrm serve: a model behind HTTP."""

from __future__ import annotations

import logging

import click

from lightrm.cli.shared_options import load_options, quiet, tell
from lightrm.errors import InputError
from lightrm.loading.options import LoadOptions


@click.command()
@click.argument("model")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others need --api-key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option(
    "--api-key", envvar="LIGHTRM_API_KEY", show_envvar=True,
    help="Key that callers must send. The variable is safer: other users can see a command line.",
)  # fmt: skip
@click.option("--name", help="Name of the model in answers; default: MODEL.")
@click.option("--max-body", type=click.IntRange(1), default=8 * 2**20, show_default=True, help="Bytes of a request.")
@click.option("--max-texts", type=click.IntRange(1), default=1024, show_default=True, help="Texts of a request.")
@click.option("--max-waiting", type=click.IntRange(1), default=8192, show_default=True, help="Texts that may wait.")
@click.option("--log-texts", is_flag=True, help="Write the texts that are scored to the log, which else holds none.")
@load_options(
    "scheme", "engine", "device", "memory", "template", "system", "max_length", "revision", "layout", "label", "reduce",
    "strict",
)  # fmt: skip
@quiet
def serve(
    model: str,
    host: str,
    port: int,
    api_key: str | None,
    name: str | None,
    max_body: int,
    max_texts: int,
    max_waiting: int,
    log_texts: bool,
    options: LoadOptions,
    quiet: bool,
) -> None:
    """Score over HTTP with MODEL: a folder, a hub id, or 'demo'.

    Takes the requests of OpenRLHF, verl, slime, vLLM's and text-embeddings-inference's clients, and its own: POST
    /score with {"prompt": ..., "responses": [...]}. What waits is scored together. GET / is a page to try it,
    /openapi.json describes all, /metrics counts. Listens on this machine alone unless there is an API key. SIGTERM
    finishes what was accepted.
    """
    try:
        from lightrm.serving.limits import Access, Limits
        from lightrm.serving.server import bound, run, warm_up
        from lightrm.serving.service import application
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed: pip install 'lightrm[serve]'") from error
    from lightrm.display.progress import on_terminal
    from lightrm.opening import open_model

    access = Access(host, api_key or None)
    limits = Limits(body=max_body, texts=max_texts, waiting=max_waiting)
    level = logging.WARNING if quiet else logging.INFO
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("lightrm.serving").setLevel(level)
    shown = f"[{host}]" if ":" in host else host
    with bound(host, port) as place:
        rm = open_model(model, options, progress=on_terminal(quiet))
        warm_up(rm)
        app = application(rm, name or model, access, limits, log_texts=log_texts)
        run(app, place, limits.seconds, lambda port: tell(f"{name or model} on http://{shown}:{port}"))
