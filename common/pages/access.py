"""Who looks at a page: by a token, shown once and kept as a session; or by a name that a proxy has verified.

A token is 256 random bits in a file of mode 0600. What a browser keeps is no token but a statement signed with it,
which ends after half a day and dies with the token: a new token file ends every session.

>>> door = Token("t" * 43)
>>> cookie = door.session(now=1_000.0)
>>> door.admits("t" * 43), door.holds(cookie, now=2_000.0), door.holds(cookie, now=1_000.0 + Token.LASTS_S + 1)
(True, True, False)
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.errors import InvalidInput, Refused, Unavailable

Role = Literal["auditor", "client"]
_TEXT = re.compile(r"[A-Za-z0-9_-]{32,256}")
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


@dataclass(frozen=True)
class Viewer:
    """Somebody who may look: an auditor sees everything, a client what concerns the organisation ``name``."""

    role: Role
    name: str = ""

    @property
    def sees_all(self) -> bool:
        """Whether nothing is kept from this viewer."""
        return self.role == "auditor"


class Token:
    """A secret that opens every page.

    Raises:
        InvalidInput: it is shorter than 32 characters, or holds others than letters, digits, ``-`` and ``_``.
    """

    LASTS_S = 12 * 3600

    def __init__(self, text: str) -> None:
        if not _TEXT.fullmatch(text):
            raise InvalidInput("a token is 32 to 256 letters, digits, '-' or '_': leave the file away to have one made")
        self._text = text.encode("ascii")

    @classmethod
    def load_or_create(cls, path: Path) -> Token:
        """The token in a file, made on first use (0600).

        Raises:
            Refused: somebody else than its owner may read the file.
            InvalidInput: it holds no token. Unavailable: it can be neither read nor made.
        """
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return cls._load(path)
        except OSError as error:
            raise Unavailable(f"{path}: the token cannot be kept there ({error.strerror or error})") from error
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
        return cls._load(path)

    @classmethod
    def _load(cls, path: Path) -> Token:
        try:
            mode = path.stat().st_mode
            if stat.S_IMODE(mode) & 0o077:
                raise Refused(f"{path}: others may read this token: chmod 600 it, and make a new one if they did")
            return cls(path.read_text("ascii").strip())
        except (OSError, UnicodeDecodeError) as error:
            raise Unavailable(f"{path}: the token cannot be read ({error})") from error

    def admits(self, text: str) -> bool:
        """Whether ``text`` is the token; the time taken does not tell how near it is."""
        return hmac.compare_digest(text.encode("utf-8", "replace"), self._text)

    def session(self, now: float) -> str:
        """What a browser keeps: the end of the session and its signature; ``now`` in seconds since the epoch."""
        end = str(int(now + self.LASTS_S))
        return f"{end}.{self._sign(end)}"

    def holds(self, session: str, now: float) -> bool:
        """Whether ``session`` was made with this token and has not ended."""
        end, _, signature = session.partition(".")
        sound = end.isascii() and end.isdigit() and len(end) < 16
        return hmac.compare_digest(signature.encode("utf-8", "replace"), self._sign(end).encode()) and (
            sound and now < int(end)
        )

    def _sign(self, end: str) -> str:
        return hmac.new(
            self._text, b"cloister/session/v1\n" + end.encode("utf-8", "replace"), hashlib.sha256
        ).hexdigest()


def viewer_of_subject(subject: str) -> Viewer | None:
    """The viewer that a kit's certificate names: OU is the role, CN the name; None for any other subject.

    Args:
        subject: as nginx writes ``$ssl_client_s_dn`` (RFC 2253), from a proxy that has verified the certificate.

    >>> viewer_of_subject("CN=clinic-a,OU=client,O=Cloister federation")
    Viewer(role='client', name='clinic-a')
    >>> viewer_of_subject("CN=clinic-a,OU=service,O=Cloister federation") is None
    True
    """
    parts = [part.partition("=") for part in subject.split(",")]
    found = {name: value for name, _, value in parts}
    if len(parts) != 3 or set(found) != {"CN", "OU", "O"} or not _NAME.fullmatch(found["CN"]):
        return None
    if found["OU"] == "auditor":
        return Viewer("auditor", found["CN"])
    return Viewer("client", found["CN"]) if found["OU"] == "client" else None
