"""The ServerApp: runs the round loop over Flower's grid.

``build_server_app`` wraps whatever a simulation wants to run. ``app`` is what Flower loads in a deployment: it reads a
run's folder on the coordinator (settings, initial adapter, keys), asks the connected clients for their public facts,
draws up the terms, and goes on from the folder's checkpoint if there is one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.config import RunConfig
from common.errors import InvalidInput
from common.messages import Arrays
from common.signing import SigningKey
from server.accountants import open_accountant
from server.checkpoint import write_atomically
from server.exchange import Exchange
from server.rounds import Finished, RoundLoop, keys_of
from server.terms import draw_up

CONNECT_TIMEOUT_S = 600.0


def build_server_app(serve: Callable[[Grid, Context], None]) -> ServerApp:
    """A ServerApp whose main calls ``serve`` with Flower's grid and context."""
    app = ServerApp()

    def main(grid: Grid, context: Context) -> None:
        serve(grid, context)

    app.main()(main)
    return app


def serve_folder(grid: Grid, context: Context) -> None:
    """Run, or resume, the run whose folder on the coordinator is named in the run configuration.

    The run configuration has ``run-folder`` and ``clients`` (how many must be connected). The folder holds ``run.toml``
    (the settings), ``run-id`` and ``initial.npz`` (the untrained adapter, the same as the trainers'); keys, ledger,
    checkpoint, ``metrics.jsonl`` and ``adapter.npz`` are made there.

    Raises:
        InvalidInput: the run configuration or the folder is incomplete.
    """
    folder = _setting(context, "run-folder", lambda value: Path(str(value)))
    clients = _setting(context, "clients", int)
    config = RunConfig.load(folder / "run.toml", {})
    initial = read_adapter(folder / "initial.npz")
    run_id = (folder / "run-id").read_text("ascii").strip()
    exchange = Exchange(grid, poll_s=1.0)
    descriptions = exchange.describe(clients, CONNECT_TIMEOUT_S)
    with open_accountant(
        config,
        ledger=folder / "ledger.sqlite",
        key=folder / "keys" / "accountant.key",
        seen=folder / "keys" / "accountant.pub",
        root=folder,
    ) as accountant:
        loop = RoundLoop(
            terms=draw_up(config, descriptions, run_id),
            initial=initial,
            public_keys=keys_of(descriptions),
            exchange=exchange,
            accountant=accountant,
            key=SigningKey.load_or_create(folder / "keys" / "coordinator.key"),
            folder=folder,
            on_metrics=lambda metrics: _write_metrics(folder, metrics),
        )
        _write_adapter(folder, loop.run())


def read_adapter(path: Path) -> Arrays:
    """The arrays of an ``.npz`` file; pickles are not read.

    Raises:
        InvalidInput: the file is missing or holds anything but float32 arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path}: not a readable adapter ({error})") from error
    for name, array in arrays.items():
        if array.dtype != np.float32:
            raise InvalidInput(f"{path}: {name} is {array.dtype}, float32 is needed")
    return arrays


def _setting(context: Context, name: str, read: Callable[[Any], Any]) -> Any:
    value = context.run_config.get(name)
    if value is None:
        raise InvalidInput(f"the run configuration has no {name}: flwr run … --run-config \"{name}='…'\"")
    return read(value)


def _write_metrics(folder: Path, metrics: tuple[dict[str, Any], ...]) -> None:
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in metrics)
    write_atomically(folder / "metrics.jsonl", lines.encode())


def _write_adapter(folder: Path, finished: Finished) -> None:
    beside = folder / "adapter.tmp.npz"
    np.savez(beside, allow_pickle=False, **finished.adapter)
    beside.replace(folder / "adapter.npz")


app = build_server_app(serve_folder)
"""What Flower loads in a deployment."""
