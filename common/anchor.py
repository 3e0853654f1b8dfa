"""Where the last head of a ledger is kept outside its machine: a file on another one, or a command that reaches it.

A ledger that was set back to an older state is whole in itself; only somebody else can know that there was more.

    anchor = "/mnt/elsewhere/clinic-a.head"
    anchor-command = ["/usr/local/bin/keep-head", "clinic-a"]      # called with "get", and with "put HEAD"
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from common.errors import LedgerCorrupt, Unavailable
from common.ledger import GENESIS, Ledger

TIMEOUT_S = 30.0


class Anchor(Protocol):
    """Holds one head."""

    def read(self) -> str | None:
        """The head that was written last; None when there never was one.

        Raises:
            Unavailable: it cannot be asked.
        """

    def write(self, head: str) -> None:
        """Keep ``head``; when this returns, it is kept.

        Raises:
            Unavailable: it cannot be kept.
        """


class FileAnchor:
    """A file on a disk that is not set back together with this machine."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> str | None:
        """See ``Anchor``."""
        if not self._path.exists():
            return None
        try:
            return checked_head(self._path.read_text("ascii"))
        except (OSError, UnicodeDecodeError) as error:
            raise Unavailable(f"the anchor {self._path} cannot be read: {error}") from error

    def write(self, head: str) -> None:
        """See ``Anchor``."""
        try:
            write_durably(self._path, head.encode() + b"\n")
        except OSError as error:
            raise Unavailable(f"the anchor {self._path} cannot be written: {error.strerror}") from error


class CommandAnchor:
    """A program of the owner: ``get`` prints the head (nothing when there is none), ``put HEAD`` keeps it."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = tuple(command)

    def read(self) -> str | None:
        """See ``Anchor``."""
        text = self._run("get").strip()
        return checked_head(text) if text else None

    def write(self, head: str) -> None:
        """See ``Anchor``."""
        self._run("put", head)

    def _run(self, *arguments: str) -> str:
        try:
            done = subprocess.run(  # noqa: S603 - the owner names the program; no shell is involved
                [*self._command, *arguments], check=True, capture_output=True, text=True, timeout=TIMEOUT_S
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise Unavailable(f"the anchor command {self._command[0]} {arguments[0]} failed: {error}") from error
        return done.stdout


def check_anchored(ledger: Ledger, anchor: Anchor) -> None:
    """A ledger that was set back is older than its anchor; one whose anchor is gone cannot be trusted either.

    An empty ledger's anchor is made here.

    Raises:
        LedgerCorrupt: the ledger does not hold the head, or there is none and the ledger has lines.
        Unavailable: the anchor cannot be asked.
    """
    head = anchor.read()
    if head is not None:
        ledger.verify(anchor=head)
    elif ledger.verify() > 0:
        raise LedgerCorrupt(
            "the anchor of this ledger is missing: restore it; where none was ever kept, write the head there that "
            "'cloister ledger verify' prints"
        )
    else:  # so that a crash between the first line and its anchor is no missing anchor
        anchor.write(GENESIS)


def checked_head(text: str) -> str:
    """A head, or LedgerCorrupt: an anchor that holds anything else cannot be trusted."""
    head = text.strip()
    if len(head) != 64 or set(head) - set("0123456789abcdef"):
        raise LedgerCorrupt("the anchor holds no head: restore it before anything is promised")
    return head


def write_durably(path: Path, data: bytes) -> None:
    """Write beside, sync, rename, sync the folder: after a crash there is the old file or the new one."""
    beside = path.with_name(path.name + ".new")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
