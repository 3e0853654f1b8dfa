"""One process works on a run at a time; the lock is a file in the run's folder and ends with the process.

Who only looks asks as a reader and lets go at once; who wants to work waits a moment for those who look.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import Refused

NAME = "lock"
GLANCE_S = 0.5


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Nobody else works on the run in ``path`` meanwhile, however this process ends.

    Raises:
        Refused: somebody does.
    """
    with (path / NAME).open("w") as file:
        deadline = time.monotonic() + GLANCE_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise Refused(f"{path}: another process is working on this run; stop it first") from error
                time.sleep(0.02)
        yield


def worked_on(path: Path) -> bool | None:
    """Whether a process works on the run in ``path`` now; None where nobody ever did.

    The file is opened for reading only, so that a folder that cannot be written can be looked at.
    """
    try:
        with (path / NAME).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False
    except OSError:
        return None
