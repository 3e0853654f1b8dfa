"""``cloister dashboard``: the coordinator's page, on loopback behind a token, or behind the proxy by certificates."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from common.errors import InvalidInput
from common.pages.access import Token, Viewer
from common.pages.serving import TokenDoor, listen, listen_unix, server
from deploy.commands.logs import LogFormat, announcer, begin
from server.accountant_service import is_local
from server.app import HOME_VARIABLE
from server.dashboard.app import Dashboard
from server.dashboard.doors import ByCertificate, ByToken, Door
from server.dashboard.records import RECHECK_S
from server.dashboard.watch import Watch
from server.revocation import RevocationList

DEFAULTS = (Path("coordinator"), Path("runs"))
"""Where to look when no folder is named: what the other commands write to by default."""


def dashboard(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FOLDER]",
            envvar=HOME_VARIABLE,
            help="a coordinator's folder, the --output of 'cloister simulate', or a folder of such; "
            "default: coordinator, else runs",
        ),
    ] = None,
    ledger: Annotated[
        str | None,
        typer.Option("--ledger", envvar="CLOISTER_LEDGER", help="the accountant's SQLite file or database URL"),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free")] = 8600,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", help="made on first use, 0600; default: with the folder's keys")
    ] = None,
    tls_certificate: Annotated[Path | None, typer.Option("--tls-certificate", help="PEM; needed off loopback")] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", help="PEM")] = None,
    proxy_socket: Annotated[
        Path | None,
        typer.Option("--proxy-socket", help="listen on this Unix socket instead, for a proxy that checks certificates"),
    ] = None,
    revoked: Annotated[
        Path | None, typer.Option("--revoked", help="with --proxy-socket: the list of 'cloister provision revoke'")
    ] = None,
    recheck: Annotated[
        float, typer.Option("--recheck", min=1.0, help="seconds between two verifications of the whole ledger")
    ] = RECHECK_S,
    log_format: LogFormat = "text",
) -> None:
    """Show runs, budgets and the ledger of a coordinator or of a simulation in a browser, live and read-only.

    Whoever has the token sees everything. With --proxy-socket there is no token: the proxy names who asks, from the
    certificate of a kit, and an organisation sees itself alone.
    """
    begin(log_format)
    say = announcer(log_format)
    found = _folder(folder)
    watch = Watch(found, ledger, recheck_s=recheck)
    if proxy_socket is not None:
        if tls_certificate or tls_key or token_file:
            raise InvalidInput("--proxy-socket goes without token and TLS: the proxy has both sides of them")
        door: Door = ByCertificate(None if revoked is None else RevocationList(revoked))
        listener, where = listen_unix(proxy_socket), f"the proxy's socket {proxy_socket}"
        tls = None
    else:
        if revoked is not None:
            raise InvalidInput("--revoked is about certificates: it needs --proxy-socket")
        tls = _tls(tls_certificate, tls_key, host)
        file = token_file or _token_file(found)
        door = ByToken(TokenDoor(Token.load_or_create(file), Viewer("auditor")))
        listener = listen(host, port)
        where = f"http{'s' if tls else ''}://{host}:{listener.getsockname()[1]}/"
        say(f"the token is in {file}")
        if sys.stdout.isatty():  # the person who started it; a log is for more people
            typer.echo(f"token: {file.read_text('ascii').strip()}")
    say(f"reading {found} …")
    watch.start()
    signal.signal(signal.SIGTERM, _end)
    say(f"dashboard of {found} on {where} (Ctrl-C ends it)")
    try:
        server(Dashboard(watch, door).app, tls=tls).run(sockets=[listener])
    finally:
        watch.stop()
        if proxy_socket is not None:
            proxy_socket.unlink(missing_ok=True)


def _end(_number: int, _frame: FrameType | None) -> NoReturn:
    """SIGTERM, which the server hands on when it has ended: leave in order, so that the socket goes too."""
    raise SystemExit(0)


def _folder(given: Path | None) -> Path:
    """The folder to show.

    Raises:
        InvalidInput: none was named, and none is where one would be.
    """
    if given is not None:
        return given
    for path in DEFAULTS:
        if path.is_dir():
            return path
    raise InvalidInput("name the folder to show: a coordinator's, or the --output of 'cloister simulate'")


def _token_file(folder: Path) -> Path:
    """Where the token of a folder is kept: with what is secret already, if there is such a folder."""
    inside = next((folder / name for name in ("keys", "state") if (folder / name).is_dir()), folder)
    return inside / "dashboard.token"


def _tls(certificate: Path | None, key: Path | None, host: str) -> tuple[Path, Path] | None:
    if certificate is not None and key is not None:
        for path in (certificate, key):
            if not os.access(path, os.R_OK):
                raise InvalidInput(f"{path}: cannot be read")
        return certificate, key
    if certificate is not None or key is not None:
        raise InvalidInput("--tls-certificate and --tls-key go together")
    if not is_local(f"{host}:0"):
        raise InvalidInput(f"--host {host}: a token must not cross a network in plain text: give --tls-certificate")
    return None


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("dashboard")(dashboard)
