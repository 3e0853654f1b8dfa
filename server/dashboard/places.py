"""Which runs lie under a folder, and in which ledger each is written.

Three kinds of folder are known: a coordinator's (``runs/RUN/run.toml``, one ledger for all), a simulation's (``cloister
simulate --output DIR``, with a ledger of its own), and a folder of simulations.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.errors import InvalidInput

Kind = Literal["federation", "simulation"]
_RUN_ID = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Place:
    """One run: its name, its folder, and the ledger (a path or a URL) that its reservations are in."""

    run_id: str
    path: Path
    kind: Kind
    ledger: str


def check_folder(folder: Path, ledger: str | None) -> None:
    """Whether there is something to show in ``folder``, now or later.

    Raises:
        InvalidInput: it is no folder of ours; says what is.
    """
    if not folder.is_dir():
        raise InvalidInput(f"{folder}: there is no such folder")
    if ledger is None and not find(folder, None) and not _is_coordinator(folder):
        raise InvalidInput(
            f"{folder}: neither a coordinator's folder nor a run's: give the folder of 'cloister coordinator serve', "
            "the --output of 'cloister simulate', or a folder of such runs"
        )


def find(folder: Path, ledger: str | None) -> list[Place]:
    """Every run under ``folder``, the newest first; ``ledger`` overrules where a coordinator's ledger is."""
    if _is_coordinator(folder):
        book = ledger or str(folder / "ledger.sqlite")
        paths = [path for path in (folder / "runs").glob("*") if _is_submitted(path)]
        return [Place(path.name, path, "federation", book) for path in _newest_first(paths)]
    own = _simulation(folder, ledger)
    if own is not None:
        return [own]
    found = [_simulation(path, None) for path in _newest_first([path for path in folder.glob("*") if path.is_dir()])]
    runs: dict[str, Place] = {}
    for place in found:
        if place is not None:
            runs.setdefault(place.run_id, place)
    return list(runs.values())


def _is_coordinator(folder: Path) -> bool:
    return (folder / "keys").is_dir() or any(_is_submitted(path) for path in (folder / "runs").glob("*"))


def _is_submitted(path: Path) -> bool:
    return _RUN_ID.fullmatch(path.name) is not None and (path / "run.toml").exists()


def _simulation(path: Path, ledger: str | None) -> Place | None:
    """The run of ``cloister simulate`` in ``path``; None where there is none."""
    book = path / "ledger.sqlite"
    run_id = _name_of(path) if ledger is not None or book.exists() else None
    return None if run_id is None else Place(run_id, path, "simulation", ledger or str(book))


def _name_of(path: Path) -> str | None:
    """The run's name, from its settings or, where those were left behind, from its certificate."""
    for file, keys in (("state/run.json", ("run_id",)), ("certificate.json", ("certificate", "run_id"))):
        try:
            body = json.loads((path / file).read_text("utf-8"))
            for key in keys:
                body = body[key]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(body, str) and _RUN_ID.fullmatch(body):
            return body
    return None


def _newest_first(paths: list[Path]) -> list[Path]:
    def age(path: Path) -> float:
        try:
            return path.stat().st_mtime
        except OSError:
            return 0.0

    return sorted(paths, key=lambda path: (age(path), path.name), reverse=True)
