"""The accountant that a run's settings name: in this process on a SQLite file, or the service of its own.

    accountant = "embedded"
    accountant = "grpcs://accountant.example:9443"        # mutual TLS: accountant-certificate, -key and -authority
    accountant = "grpc+unix:///run/cloister/accountant.sock"

The first key that a run's accountant shows is kept beside the run (unless ``accountant-public-key`` pins one), and no
other is believed afterwards: the clients' policies name it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from common.anchor import FileAnchor
from common.config import EMBEDDED, RunConfig
from common.errors import InvalidInput, Refused
from common.ledger import Ledger
from common.signing import SigningKey, fingerprint
from server.accountant import EmbeddedAccountant
from server.accountant_service import Tls
from server.checkpoint import write_atomically
from server.remote_accountant import RemoteAccountant

Accountant = EmbeddedAccountant | RemoteAccountant
"""Both have one interface; a contract suite runs on both."""

CONNECT_TIMEOUT_S = 10.0
"""How long the first call may wait for a service that is just starting."""


@contextmanager
def open_accountant(
    config: RunConfig, *, ledger: Path, key: Path, seen: Path, root: Path = Path()
) -> Iterator[Accountant]:
    """The accountant of ``config``, for one run.

    Args:
        config: names it.
        ledger: the embedded accountant's file.
        key: its signing key, made there if it is missing.
        seen: where the accountant's public key is kept once it was seen.
        root: relative paths of the settings start here.

    Raises:
        InvalidInput: the settings lack something, or a file cannot be read.
        Unavailable: the service does not answer; the message says how it is started.
        Refused: it holds another key than the pinned one, or than the one this run began with.
        LedgerCorrupt: the embedded ledger does not verify, or is older than its anchor.
    """
    if config.accountant == EMBEDDED:
        with Ledger(ledger) as book:
            anchor = None if config.accountant_anchor is None else FileAnchor(root / config.accountant_anchor)
            accountant = EmbeddedAccountant(book, SigningKey.load_or_create(key), anchor=anchor)
            _keep(accountant.public_key, seen)
            yield accountant
        return
    with _connect(config, root) as remote:
        _keep(remote.public_key, seen)
        yield remote


def address_of(url: str) -> tuple[str, bool]:
    """How gRPC names the service at ``url``, and whether it is spoken to over TLS."""
    parts = urlsplit(url)
    return (parts.netloc, True) if parts.scheme == "grpcs" else (f"unix:{parts.path}", False)


def _connect(config: RunConfig, root: Path) -> RemoteAccountant:
    address, is_secure = address_of(config.accountant)
    tls = _tls(config, root) if is_secure else None
    pinned = config.accountant_public_key
    return RemoteAccountant(address, tls=tls, public_key=pinned, connect_timeout_s=CONNECT_TIMEOUT_S)


def _tls(config: RunConfig, root: Path) -> Tls:
    given = (config.accountant_certificate, config.accountant_key, config.accountant_authority)
    if None in given:
        raise InvalidInput(
            f"accountant = {config.accountant}: give accountant-certificate, accountant-key and accountant-authority "
            "('cloister provision' makes them)"
        )
    certificate, key, authority = (root / str(path) for path in given)
    return Tls(certificate, key, authority)


def _keep(public_key: str, seen: Path) -> None:
    """Remember the accountant's key at its first sight; another one later is somebody else."""
    if not seen.exists():
        seen.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(seen, public_key.encode("ascii") + b"\n")
    elif (kept := seen.read_text("ascii").strip()) != public_key:
        raise Refused(
            f"this run began with the accountant of key {fingerprint(kept)}; the one that answers now holds "
            f"{fingerprint(public_key)}"
        )
