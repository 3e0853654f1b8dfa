"""The state of a run after a finished round, in one file that is replaced as a whole: there is never half of one.

The file is numpy's ``.npz`` without pickles. It holds the adapter, the server optimizer's and the average's state, the
finished rounds' metrics and the digest of the run's terms; a file of another run or with a changed byte is refused.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import LedgerCorrupt, Unavailable
from common.messages import Arrays

MAX_BYTES = 8 << 30
"""A larger file is refused unread."""


@dataclass(frozen=True)
class Checkpoint:
    """A run after ``server_round`` rounds; round 0 is the untrained adapter.

    Attributes:
        plan_hash: of the run's terms. adapter: the global adapter. optimizer: the server optimizer's state.
        metrics: one object per finished round, from round 0. left: clients that have left for good.
        average: state of the average of adapters, empty without one. importance: of the modules' importance.
    """

    plan_hash: str
    server_round: int
    adapter: Arrays = field(repr=False)
    optimizer: dict[str, npt.NDArray[Any]] = field(repr=False)
    metrics: tuple[dict[str, Any], ...] = ()
    left: tuple[str, ...] = ()
    average: dict[str, npt.NDArray[Any]] = field(default_factory=dict, repr=False)
    importance: dict[str, npt.NDArray[Any]] = field(default_factory=dict, repr=False)


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Write the checkpoint durably, beside and renamed.

    Raises:
        Unavailable: the disk is full or read-only; the old checkpoint is untouched.
    """
    header = {
        "version": 1,
        "plan_hash": checkpoint.plan_hash,
        "server_round": checkpoint.server_round,
        "metrics": list(checkpoint.metrics),
        "left": list(checkpoint.left),
    }
    arrays: dict[str, npt.NDArray[Any]] = {f"adapter/{name}": array for name, array in checkpoint.adapter.items()}
    arrays |= {f"optimizer/{name}": array for name, array in checkpoint.optimizer.items()}
    arrays |= {f"average/{name}": array for name, array in checkpoint.average.items()}
    arrays |= {f"importance/{name}": array for name, array in checkpoint.importance.items()}
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    body = buffer.getvalue()
    write_atomically(path, body + hashlib.sha256(body).digest())


def load(path: Path, plan_hash: str) -> Checkpoint | None:
    """The checkpoint in ``path``, or None if there is none yet.

    Raises:
        LedgerCorrupt: the file is damaged or belongs to another run.
    """
    if not path.exists():
        return None
    if path.stat().st_size > MAX_BYTES:
        raise LedgerCorrupt(f"{path}: larger than {MAX_BYTES} bytes: not a checkpoint of ours")
    data = path.read_bytes()
    body, check = data[:-32], data[-32:]
    if hashlib.sha256(body).digest() != check:
        raise LedgerCorrupt(f"{path}: damaged; the round it holds cannot be trusted")
    try:
        with np.load(io.BytesIO(body), allow_pickle=False) as file:
            header = json.loads(bytes(file["header"]))
            arrays = {name: file[name] for name in file.files if name != "header"}
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise LedgerCorrupt(f"{path}: not a checkpoint ({error})") from error
    if header["plan_hash"] != plan_hash:
        raise LedgerCorrupt(f"{path}: belongs to a run with other terms; resume with the settings it was started with")
    return Checkpoint(
        plan_hash=plan_hash,
        server_round=int(header["server_round"]),
        adapter={name[8:]: array for name, array in arrays.items() if name.startswith("adapter/")},
        optimizer={name[10:]: array for name, array in arrays.items() if name.startswith("optimizer/")},
        metrics=tuple(header["metrics"]),
        left=tuple(header["left"]),
        average={name[8:]: array for name, array in arrays.items() if name.startswith("average/")},
        importance={name[11:]: array for name, array in arrays.items() if name.startswith("importance/")},
    )


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``: written beside, fsynced, renamed; a crash leaves the old file or the new one.

    Raises:
        Unavailable: the file cannot be written.
    """
    # One name per target: what a killed writer leaves is overwritten by the next, and never piles up.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise Unavailable(f"{path}: cannot be written ({error.strerror or error})") from error
