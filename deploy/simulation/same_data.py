"""A resumed simulation must go on with the records it began with: a fingerprint in the run's private folder says so.

The fingerprint is keyed with a salt of its own and stays in that file (mode 0600): it enters no plan, reply, ledger,
certificate or report, because it follows from the records.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from client.data.tokens import Prepared
from client.engine.batches import Example
from common.errors import InvalidInput
from server.checkpoint import write_atomically


def check_same_data(file: Path, prepared: Mapping[str, Prepared], *, resumed: bool) -> None:
    """Note in ``file`` which records each silo begins with; where a run is resumed, compare.

    Raises:
        InvalidInput: a silo has other records than the run began with; the message names it.
    """
    if not (resumed and file.exists()):
        salt = secrets.token_hex(32)
        body = {"salt": salt, "silos": {name: _fingerprint(salt, one.examples) for name, one in prepared.items()}}
        write_atomically(file, json.dumps(body).encode())
        file.chmod(0o600)
        return
    try:
        body = json.loads(file.read_text("utf-8"))
        salt, kept = str(body["salt"]), dict(body["silos"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InvalidInput(f"{file}: cannot be read, so nobody can tell whether the data is the same") from error
    found = {name: _fingerprint(salt, one.examples) for name, one in prepared.items()}
    changed = sorted(name for name in kept.keys() | found.keys() if kept.get(name) != found.get(name))
    if changed:
        raise InvalidInput(
            f"silo {', '.join(map(repr, changed))}: other records than those this run began with, and its ε speaks of "
            "one data set: put the old file back to resume, or start a new run (the old run's ε stays spent)"
        )


def _fingerprint(salt: str, examples: tuple[Example, ...] | list[Example]) -> str:
    """HMAC-SHA256 over every record's tokens and labels, in order."""
    keyed = hmac.new(bytes.fromhex(salt), digestmod=hashlib.sha256)
    for example in examples:
        for part in (example.input_ids, np.atleast_1d(example.labels)):
            values = np.ascontiguousarray(part, dtype="<i8")
            keyed.update(f"{values.size}\0".encode())
            keyed.update(values.tobytes())
    return keyed.hexdigest()
