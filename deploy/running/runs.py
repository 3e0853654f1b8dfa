"""The runs of a coordinator, from the operator's side: submit, look, stop, go on.

The folder of a run says where it stands (``server/deployed.py``); the SuperLink only knows which of its tasks works on
it. A run that was killed, has failed or was stopped goes on from its checkpoint under the same name.
"""

from __future__ import annotations

import secrets
import shutil
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.config import RunConfig
from common.errors import InvalidInput, Refused, Unavailable
from deploy.running.flower_control import FlowerControl, FlowerRun
from server.checkpoint import write_atomically
from server.deployed import RunFolder, read_adapter, run_in

NOT_DEPLOYED = (
    "data", "eval_data", "holdout", "silos", "silo_column", "only_silos", "prompt_column", "completion_column",
    "label_column", "seed", "output", "resume", "backend", "subspace_data", "cache_frozen_layers",
)  # fmt: skip
"""Settings of records or of one machine: in a federation each organisation has its own (``trainer.toml``)."""

OVER = frozenset({"finished", "stopped", "failed"})
NOTICED_S = 90.0
"""A ServerApp hears at its next heartbeat, at most 30 s later, that its run was stopped; then it ends."""


def prepare(home: Path, settings: Path, *, clients: int | None, initial: Path | None) -> RunFolder:
    """Make the folder of a new run.

    Args:
        home: the coordinator's folder.
        settings: the run's TOML file.
        clients: for how many organisations to wait; None: as many as have a table ``[clients.NAME]``.
        initial: the untrained adapter, where it does not start at zero.

    Raises:
        InvalidInput: the settings do not suit a federation.
    """
    config = RunConfig.load(settings, {})
    for name in NOT_DEPLOYED:
        if name in config.model_fields_set:
            raise InvalidInput(
                f"{settings}: {name.replace('_', '-')} belongs to an organisation's trainer.toml or to a simulation, "
                "not to a federation's run"
            )
    expected = clients or len(config.clients)
    if expected < 1:
        raise InvalidInput("say --clients N: for how many organisations the run waits before round 1")
    if config.quorum > expected:
        raise InvalidInput(f"quorum = {config.quorum}, but the run waits for {expected} organisations only")
    if initial is not None:
        read_adapter(initial)
    run_id = secrets.token_hex(8)
    path = home / "runs" / run_id
    beside = path.with_name(f".{run_id}.tmp")
    try:
        beside.mkdir(parents=True)
        shutil.copyfile(settings, beside / "run.toml")
        (beside / "clients").write_text(f"{expected}\n", "ascii")
        if initial is not None:
            shutil.copyfile(initial, beside / "initial.npz")
        beside.rename(path)
    except OSError as error:
        raise Unavailable(f"{path}: the run's folder cannot be made ({error.strerror or error})") from error
    return RunFolder(path, home)


def start(folder: RunFolder, control: FlowerControl) -> int:
    """Have the SuperLink work on a run: a new one, or one that is not being worked on.

    Raises:
        Refused: it is being worked on, or is finished.
    """
    state = folder.state()["state"]
    if folder.is_held:
        raise Refused(f"run {folder.run_id} is being worked on ({state}): 'runs show {folder.run_id}' follows it")
    if state == "finished":
        raise Refused(f"run {folder.run_id} is finished: its adapter and certificate are in {folder.path}")
    task = current_task(folder, control)
    if task is not None and not task.is_over and state not in OVER:
        # Killed where Flower does not notice at once: two tasks on one folder would only refuse each other.
        control.stop(task.run_id)
    (folder.path / "stop").unlink(missing_ok=True)
    folder.note("submitted")
    number = control.start(folder.run_id)
    write_atomically(folder.path / "flower-run", f"{number}\n".encode())
    return number


def stop(folder: RunFolder, control: FlowerControl, *, now: bool) -> str:
    """End a run after its current round, or at once; returns what was done, in a sentence.

    At once means that what was sent and not answered is spent and lost.
    """
    if not folder.is_held and folder.state()["state"] in OVER:
        return f"run {folder.run_id} is not being worked on ({folder.state()['state']})"
    (folder.path / "stop").touch()
    if not now:
        return f"run {folder.run_id} ends after its current round, with a certificate of the rounds that were run"
    task = current_task(folder, control)
    if task is not None and not task.is_over:
        control.stop(task.run_id)
    deadline = time.monotonic() + NOTICED_S
    while folder.is_held:
        if time.monotonic() > deadline:
            raise Unavailable(
                f"run {folder.run_id}: the SuperLink was told, but its task has not ended after {NOTICED_S:g} s"
            )
        time.sleep(0.2)
    folder.note("stopped")
    return f"run {folder.run_id} was stopped; 'cloister coordinator runs resume {folder.run_id}' goes on"


def current_task(folder: RunFolder, control: FlowerControl) -> FlowerRun | None:
    """Flower's task that last worked on the run."""
    file = folder.path / "flower-run"
    return control.show(int(file.read_text("ascii"))) if file.exists() else None


def every_run(home: Path) -> list[RunFolder]:
    """All runs, the oldest first."""
    folders = [path for path in (home / "runs").glob("*") if (path / "run.toml").exists()]
    return [RunFolder(path, home) for path in sorted(folders, key=lambda path: (path / "run.toml").stat().st_mtime)]


def summary(folder: RunFolder) -> dict[str, Any]:
    """What ``runs list`` and ``runs show`` tell about one run.

    ``interrupted`` is a run whose state says that somebody works on it, while nobody does: it can be resumed.
    """
    state, metrics = folder.state(), folder.metrics()
    word = state["state"]
    if word not in OVER | {"submitted"} and not folder.is_held:
        word = "interrupted"
    last: Mapping[str, Any] = metrics[-1] if metrics else {}
    return {
        "run_id": folder.run_id,
        "state": word,
        "round": last.get("round", 0),
        "rounds": state.get("rounds") or _rounds(folder),
        "epsilon": last.get("epsilon"),
        "error": state.get("error"),
        "updated": state.get("updated"),
        "folder": str(folder.path),
        "certificate": (folder.path / "certificate.json").exists(),
    }


def find(home: Path, run_id: str) -> RunFolder:
    """A run by its name, or by the beginning of it that no other run has.

    Raises:
        InvalidInput: there is none, or several.
    """
    names = [folder.run_id for folder in every_run(home) if folder.run_id.startswith(run_id)]
    if len(names) > 1:
        raise InvalidInput(f"{run_id}: could be {', '.join(names)}")
    return run_in(home, names[0] if names else run_id)


def _rounds(folder: RunFolder) -> int:
    settings = tomllib.loads((folder.path / "run.toml").read_text("utf-8"))
    return int(settings.get("rounds", RunConfig.model_fields["rounds"].default))
