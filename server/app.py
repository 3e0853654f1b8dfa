"""The ServerApp: draws up the terms with the clients that are there, then runs the round loop over Flower's grid.

The same function serves a simulation (in one process or on Ray) and a deployment; only what is handed to it differs.
"""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp


def build_server_app(serve: Callable[[Grid, Context], None]) -> ServerApp:
    """A ServerApp whose main calls ``serve`` with Flower's grid and context."""
    app = ServerApp()

    def main(grid: Grid, context: Context) -> None:
        serve(grid, context)

    app.main()(main)
    return app
