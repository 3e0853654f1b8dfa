"""Where the last head of the ledger is kept outside this machine: a file on another one, or a command that reaches it.

A ledger that was set back to an older state is whole in itself; only somebody else can know that there was more.

    anchor = "/mnt/elsewhere/clinic-a.head"
    anchor-command = ["/usr/local/bin/keep-head", "clinic-a"]      # called with "get", and with "put HEAD"
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from client.journal import write_durably
from common.errors import LedgerCorrupt, Unavailable

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
    """A program of the organisation: ``get`` prints the head (nothing when there is none), ``put HEAD`` keeps it."""

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
            done = subprocess.run(  # noqa: S603 - the policy's owner names the program; no shell is involved
                [*self._command, *arguments], check=True, capture_output=True, text=True, timeout=TIMEOUT_S
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise Unavailable(f"the anchor command {self._command[0]} {arguments[0]} failed: {error}") from error
        return done.stdout


def checked_head(text: str) -> str:
    """A head, or LedgerCorrupt: an anchor that holds anything else cannot be trusted."""
    head = text.strip()
    if len(head) != 64 or set(head) - set("0123456789abcdef"):
        raise LedgerCorrupt("the anchor holds no head: restore it before training")
    return head
