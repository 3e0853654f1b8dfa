"""Who asks: by a token on a TCP port, or by a certificate that the proxy has verified, over the proxy's own socket.

The two never mix. On TCP no header names anybody, whoever sends it. On the proxy's Unix socket (0600, in a folder that
the proxy and the dashboard share) the three headers below are the identity and a token is none; whoever can write them
can open that socket, so nobody but the proxy can. The proxy overwrites them in every request that it passes on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response

from common.pages.access import Viewer, viewer_of_subject
from common.pages.serving import TokenDoor
from server.revocation import RevocationList

VERIFIED, SUBJECT, SERIAL = "x-cloister-verified", "x-cloister-subject", "x-cloister-serial"
"""Headers that the proxy sets: nginx's ``$ssl_client_verify``, ``$ssl_client_s_dn``, ``$ssl_client_serial``."""


class Door(Protocol):
    """Knows who asks."""

    @property
    def explanation(self) -> str:
        """What a stranger is told to bring."""

    def viewer(self, request: Request) -> Viewer | None:
        """Who asks; None for a stranger."""


class ByToken:
    """The holder of the token is an auditor; nobody else is anybody."""

    explanation = "The token is in the file that 'cloister dashboard' named when it was started."

    def __init__(self, door: TokenDoor) -> None:
        self.door = door

    def viewer(self, request: Request) -> Viewer | None:
        """See ``Door``."""
        return self.door.viewer(request)

    async def log_in(self, request: Request, refused: Callable[[], Response]) -> Response:
        """The answer to the form of the login page."""
        return await self.door.log_in(request, refused)


class ByCertificate:
    """A kit's certificate, verified by the proxy and not revoked: ``OU`` is the role, ``CN`` the name.

    Args:
        revoked: the accountant's list, read at every request; None: certificates end only when they expire.
    """

    explanation = "This page needs a certificate of a kit of this federation, of an auditor or an organisation."

    def __init__(self, revoked: RevocationList | None) -> None:
        self._revoked = revoked

    def viewer(self, request: Request) -> Viewer | None:
        """See ``Door``. A header that is missing or stands there twice is nobody's."""
        given = [request.headers.getlist(name) for name in (VERIFIED, SUBJECT, SERIAL)]
        if any(len(values) != 1 for values in given) or given[0] != ["SUCCESS"]:
            return None
        try:
            serial = int(given[2][0], 16)
        except ValueError:
            return None
        if self._revoked is not None and self._revoked.has(serial):
            return None
        return viewer_of_subject(given[1][0])
