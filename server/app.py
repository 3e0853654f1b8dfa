"""The ServerApp: runs the round loop over Flower's grid.

``build_server_app`` wraps whatever a simulation wants to run. ``app`` is what Flower loads in a deployment: it finds
the run's folder on the coordinator and works on it (``server/deployed.py``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.errors import InvalidInput
from server.deployed import RunFolder, run_in, serve_run

HOME_VARIABLE = "CLOISTER_COORDINATOR"
"""Environment variable with the coordinator's folder; clients see the run configuration, so it names the run only."""


def build_server_app(serve: Callable[[Grid, Context], None]) -> ServerApp:
    """A ServerApp whose main calls ``serve`` with Flower's grid and context."""
    app = ServerApp()

    def main(grid: Grid, context: Context) -> None:
        serve(grid, context)

    app.main()(main)
    return app


def serve_folder(grid: Grid, context: Context) -> None:
    """Run, or resume, the run that the run configuration names: ``run`` below the coordinator's folder.

    Raises:
        InvalidInput: the run configuration, the environment or the folder is incomplete.
        CloisterError: see ``serve_run``.
    """
    serve_run(grid, folder_of(context))


def folder_of(context: Context) -> RunFolder:
    """The folder of the run that Flower's run configuration names.

    Raises:
        InvalidInput: it names none, or this process does not know where the coordinator's folder is.
    """
    name = str(context.run_config.get("run") or "")
    if not name:
        raise InvalidInput("the run configuration has no run: submit runs with 'cloister coordinator submit RUN.toml'")
    home = os.environ.get(HOME_VARIABLE)
    if not home:
        raise InvalidInput(f"{HOME_VARIABLE} is not set: it names the coordinator's folder, on SuperExec's side")
    return run_in(Path(home), name)


app = build_server_app(serve_folder)
"""What Flower loads in a deployment."""
