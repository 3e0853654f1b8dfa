"""The list of certificates that are no longer believed, read again at every call.

    {"version": 1, "serials": {"2f0c…": "clinic-a.1"}}

``cloister provision revoke`` replaces the file in one step; nothing is restarted. A list that is missing or unreadable
lets nobody in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from common.errors import InvalidInput

_VERSION = 1
_LARGEST = 16 * 2**20


def read_revoked(path: Path) -> dict[str, str]:
    """Serial number (hexadecimal) to the name of the kit it was in.

    Raises:
        InvalidInput: the list is missing, unreadable, or of another version.
    """
    try:
        with path.open("rb") as file:
            body = json.loads(file.read(_LARGEST))
        serials = body["serials"]
        if body["version"] != _VERSION or not isinstance(serials, dict):
            raise ValueError("not a revocation list of version 1")
        return {f"{int(serial, 16):x}": str(name) for serial, name in serials.items()}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise InvalidInput(f"{path}: the revocation list cannot be read ({error})") from error


def write_revoked(serials: Mapping[str, str]) -> bytes:
    """The bytes of a list; ``read_revoked`` reads them back."""
    return json.dumps({"version": _VERSION, "serials": dict(serials)}, indent=1, sort_keys=True).encode() + b"\n"


class RevocationList:
    """Answers whether a serial number is on the list in ``path``, which is read at every question."""

    def __init__(self, path: Path) -> None:
        read_revoked(path)  # a service must not start on a list that it cannot read
        self._path = path

    def has(self, serial_number: int) -> bool:
        """True for a revoked certificate, and for every certificate while the list cannot be read."""
        try:
            return f"{serial_number:x}" in read_revoked(self._path)
        except InvalidInput:
            return True
