"""The same ServerApp and ClientApp on Flower's own simulation engine, which spreads clients over Ray actors.

Flower marks the Python entry point as deprecated in favour of ``flwr run``; it is used because ``flwr run`` leaves a
server process behind and starts from an app bundle, while here the caller's own objects are to run.
"""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from common.config import RunConfig
from common.errors import CloisterError, InvalidInput


def run_on_ray(server: ServerApp, client: ClientApp, clients: int, config: RunConfig) -> None:
    """Run to the end; one CPU per client, as many clients at once as there are CPUs.

    Raises:
        InvalidInput: the extra ``simulation`` is not installed.
        CloisterError: whatever the ServerApp raised.
    """
    try:
        import ray
        from flwr.simulation import run_simulation
    except ImportError as error:
        raise InvalidInput("--backend ray needs the extra: pip install 'cloister[simulation]'") from error
    gpus = 1.0 / (os.cpu_count() or 1) if config.device == "cuda" else 0.0
    failure: list[CloisterError] = []
    logging.getLogger("flwr").setLevel(logging.ERROR)
    settings: dict[str, Any] = {
        "init_args": {
            "num_cpus": min(clients, os.cpu_count() or 1),
            "include_dashboard": False,
            "log_to_driver": False,
            "logging_level": logging.ERROR,
        },
        "client_resources": {"num_cpus": 1, "num_gpus": gpus},
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run_simulation(_keeping(server, failure), client, clients, backend_config=settings)
    except RuntimeError as error:
        if not failure:
            raise CloisterError(f"Flower's simulation engine stopped: {error}") from error
    finally:
        ray.shutdown()
    if failure:
        raise failure[0]


def _keeping(server: ServerApp, failure: list[CloisterError]) -> ServerApp:
    """The same app; Flower's engine hides what it raises behind a RuntimeError, so our own errors are kept here."""
    app = ServerApp()

    @app.main()
    def main(grid: Any, context: Any) -> None:
        try:
            server(grid, context)
        except CloisterError as error:
            failure.append(error)

    return app
