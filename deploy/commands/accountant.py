"""``cloister accountant serve``: the accountant as a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.anchor import FileAnchor
from common.errors import InvalidInput
from common.ledger import Ledger
from common.signing import SigningKey, fingerprint
from deploy.commands.ledger import read_anchor
from deploy.commands.logs import LogFormat, announcer, begin
from deploy.running.ending import Ending
from server.accountant import EmbeddedAccountant
from server.accountant_service import Tls, serve
from server.revocation import RevocationList

accountant_app = typer.Typer(name="accountant", help="The privacy accountant of a coordinator.", no_args_is_help=True)

GRACE_S = 5.0


@accountant_app.callback()
def _accountant() -> None:
    """The privacy accountant of a coordinator."""


@accountant_app.command("serve")
def _serve(
    ledger: Annotated[str, typer.Option("--ledger", help="SQLite file or postgresql+psycopg:// URL")],
    key: Annotated[Path, typer.Option("--key", help="the accountant's signing key; made there if it is missing")],
    address: Annotated[str, typer.Option("--address", help="host:port or unix:PATH")] = "127.0.0.1:9443",
    tls_certificate: Annotated[Path | None, typer.Option("--tls-certificate", help="PEM")] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", help="PEM")] = None,
    tls_authority: Annotated[
        Path | None, typer.Option("--tls-authority", help="PEM; who signs the callers' certificates")
    ] = None,
    revoked: Annotated[
        Path | None, typer.Option("--revoked", help="list of revoked certificates, read at every call")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="plain text, on loopback or a Unix socket only")] = False,
    anchor: Annotated[
        str | None, typer.Option("--anchor", help="a head the ledger must hold, or a file with it (also a certificate)")
    ] = None,
    anchor_file: Annotated[
        Path | None,
        typer.Option("--anchor-file", help="file outside this machine, made and kept up to date, with the last head"),
    ] = None,
    log_format: LogFormat = "text",
) -> None:
    """Verify the ledger, then answer until SIGTERM; a ledger older than its anchor is not served."""
    begin(log_format)
    say = announcer(log_format)
    tls = tls_files(tls_certificate, tls_key, tls_authority, insecure=insecure)
    revocations = None if revoked is None else RevocationList(revoked)
    head = None if anchor is None else read_anchor(anchor)
    with Ledger(ledger) as book:
        if head is not None:
            book.verify(anchor=head)
        kept = None if anchor_file is None else FileAnchor(anchor_file)
        accountant = EmbeddedAccountant(book, SigningKey.load_or_create(key), anchor=kept)
        server, listening = serve(accountant, address, tls=tls, revoked=revocations)
        ending = Ending()
        say(f"accountant {fingerprint(accountant.public_key)} listens on {listening}")
        say(f"public key {accountant.public_key}")
        ending.wait()
        server.stop(GRACE_S).wait(2 * GRACE_S)


def tls_files(certificate: Path | None, key: Path | None, authority: Path | None, *, insecure: bool) -> Tls | None:
    """The three files of mutual TLS, or None where plain text was asked for in so many words.

    Raises:
        InvalidInput: some are missing, or both were asked for.
    """
    given = [path for path in (certificate, key, authority) if path is not None]
    if insecure:
        if given:
            raise InvalidInput("--insecure and TLS files exclude each other")
        return None
    if certificate is None or key is None or authority is None:
        raise InvalidInput(
            "give --tls-certificate, --tls-key and --tls-authority ('cloister provision' makes them), "
            "or --insecure for plain text on this machine only"
        )
    return Tls(certificate, key, authority)
