"""The command line: parses options and prints; the work is done by the modules below. One file for each kind of
command.

Commands import what they need, so that `lightrm --help` is quick.
"""

from __future__ import annotations

from typing import Any

import click

import lightrm
from lightrm.cli import judging, looking, making, ranking, scoring, serve_command
from lightrm.errors import LightRMError


class Group(click.Group):
    """Shows a LightRMError or an OSError as one sentence instead of a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LightRMError as error:
            raise click.ClickException(f"{type(error).__name__}: {error}") from error
        except BrokenPipeError:
            raise  # whoever reads the output has seen enough: click ends quietly
        except OSError as error:
            raise click.ClickException(refused(error)) from error


def refused(error: OSError) -> str:
    """Return what the system refused, and for which file."""
    named = "" if error.filename is None else f": {error.filename}"
    return f"{error.strerror}{named}" if error.strerror else str(error) or type(error).__name__


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(lightrm.__version__)
def main() -> None:
    """Score answers with reward models, on one GPU or a CPU, without remote code."""


for command in (
    scoring.score, ranking.rank, ranking.explain, scoring.demo, looking.inspect, looking.plan, looking.doctor,
    making.quantize, judging.fidelity, judging.evaluate, judging.verify_card, serve_command.serve,
):  # fmt: skip
    main.add_command(command)
