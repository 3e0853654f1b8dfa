"""``cloister client doctor``: what would stop this organisation from taking part, one line each, before anything runs.

Counts and contents of records stay on this screen. A check that cannot be made because another one failed says so.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import shutil
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from cryptography import x509

from client.policy import Policy
from client.settings import TrainerSettings
from common.errors import CloisterError, InvalidInput, Refused, Unavailable
from common.release import own_version

LEAST_FREE = 1 << 30
"""Bytes that ledger and replies should find free."""

LARGEST_SKEW_S = 60.0
SOON_DAYS = 14
CONNECT_TIMEOUT_S = 10.0
_EXPIRED = 10
"""OpenSSL's X509_V_ERR_CERT_HAS_EXPIRED."""

CERTIFICATES = ("ca.crt", "client.crt")
RENEW = "ask the coordinator for a new kit ('cloister provision rotate')"


@dataclass(frozen=True)
class Finding:
    """One line: ``error`` is what this check would raise, None when all is well; ``is_warning`` when it still works."""

    check: str
    text: str
    error: CloisterError | None = None
    is_warning: bool = False

    @property
    def mark(self) -> str:
        """``ok``, ``warn`` or ``fail``."""
        return "fail" if self.error is not None else ("warn" if self.is_warning else "ok")


@dataclass(frozen=True)
class Questions:
    """What is to be looked at; None leaves the checks out that need it."""

    kit: Path | None = None
    coordinator: str | None = None
    is_insecure: bool = False
    policy: Path | None = None
    settings: Path | None = None
    reads_data: bool = True


def examine(questions: Questions, now: Callable[[], float] = time.time) -> Iterator[Finding]:
    """Every check that applies, in an order in which the first failure is the one to mend first."""
    if questions.kit is not None and not questions.is_insecure:
        for name in CERTIFICATES:
            yield _checked(f"certificate {name}", lambda name=name: _certificate(questions.kit, name, now()))  # type: ignore[misc]
        yield _checked("version", lambda: _version(questions.kit))
    if questions.coordinator is not None:
        yield from _coordinator(questions, now)
    if questions.policy is not None:
        yield from _organisation(questions, now)


def worst(findings: list[Finding]) -> int:
    """The exit code: that of the first failure, 0 without one."""
    return next((found.error.exit_code for found in findings if found.error is not None), 0)


def _checked(check: str, run: Callable[[], Finding | str]) -> Finding:
    try:
        found = run()
    except CloisterError as error:
        return Finding(check, str(error), error)
    return Finding(check, found) if isinstance(found, str) else found


def _version(kit: Path | None) -> Finding | str:
    """The coordinator compares for itself before a run: a kit may be older than an upgrade of both sides."""
    own, path = own_version(), Path(kit or ".") / "kit.json"
    try:
        made_for = str(json.loads(path.read_text("utf-8"))["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{own}; the kit does not say for which version it was made"
    if made_for != own:
        text = f"this is Cloister {own}, the kit was made for {made_for}: the coordinator refuses another version than "
        mend = f"its own; if that is still {made_for}, pip install 'cloister=={made_for}'"
        return Finding("version", text + mend, is_warning=True)
    return own


def _certificate(kit: Path | None, name: str, now: float) -> Finding | str:
    path = Path(kit or ".") / name
    if name != "ca.crt" and not path.exists():
        return "not in this kit (needed for the accountant only)"
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path}: not a readable certificate ({error}); {RENEW}") from error
    moment, last = datetime.fromtimestamp(now, UTC), certificate.not_valid_after_utc
    if moment > last:
        raise Refused(f"{path}: expired on {last:%Y-%m-%d}; {RENEW}")
    if moment < certificate.not_valid_before_utc:
        raise Refused(f"{path}: valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} on; is this clock right?")
    days = (last - moment).days
    if days < SOON_DAYS:
        return Finding(f"certificate {name}", f"expires in {days} days; {RENEW}", is_warning=True)
    return f"valid until {last:%Y-%m-%d}"


def _coordinator(questions: Questions, now: Callable[[], float]) -> Iterator[Finding]:
    try:
        date = reach(str(questions.coordinator), _authority(questions))
    except CloisterError as error:
        yield Finding("coordinator", str(error), error)
        yield Finding("clock", "not compared: the coordinator does not answer", is_warning=True)
        return
    yield Finding("coordinator", f"{questions.coordinator} answers")
    yield _checked("clock", lambda: _clock(date, now()))


def _authority(questions: Questions) -> Path | None:
    if questions.is_insecure:
        return None
    if questions.kit is None:
        raise InvalidInput("give --kit (it holds the coordinator's certificate authority), or --insecure on loopback")
    return questions.kit / "ca.crt"


def reach(address: str, authority: Path | None) -> str | None:
    """Ask the coordinator for anything over HTTP; its ``Date``, or None if it tells none.

    Raises:
        InvalidInput: the address is no ``host:port``. Unavailable: nobody answers there.
        Refused: its certificate is not signed by this authority, or is for another name.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise InvalidInput(f"{address}: write HOST:PORT")
    try:
        if authority is None:
            connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=CONNECT_TIMEOUT_S)
        else:
            context = ssl.create_default_context(cafile=str(authority))
            connection = http.client.HTTPSConnection(
                host.strip("[]"), int(port), timeout=CONNECT_TIMEOUT_S, context=context
            )
        connection.request("GET", "/health")
        answer = connection.getresponse()
        connection.close()
        return answer.getheader("Date")
    except ssl.SSLCertVerificationError as error:
        raise Refused(
            f"{address}: its certificate does not verify ({error.verify_message}); {_mends(error)}"
        ) from error
    except FileNotFoundError as error:
        raise InvalidInput(f"{authority}: missing; {RENEW}") from error
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(
            f"{address}: the coordinator cannot be reached ({getattr(error, 'strerror', None) or error}); check the "
            "address, the port and the firewall"
        ) from error


def _mends(error: ssl.SSLCertVerificationError) -> str:
    if error.verify_code == _EXPIRED:
        return f"the coordinator renews its own with 'cloister provision rotate --servers'; if it has, {RENEW}"
    return f"is this the right kit and address? If so, {RENEW}"


def _clock(date: str | None, now: float) -> Finding | str:
    if date is None:
        return Finding("clock", "not compared: the coordinator does not tell the time", is_warning=True)
    skew = now - parsedate_to_datetime(date).timestamp()
    if abs(skew) > LARGEST_SKEW_S:
        raise Refused(
            f"this clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the coordinator's: certificates "
            "and expiry dates would be misread; set it (for instance with chrony)"
        )
    return f"within {abs(skew):.0f} s of the coordinator's"


def _organisation(questions: Questions, now: Callable[[], float]) -> Iterator[Finding]:
    policy_path = Path(str(questions.policy))
    settings_path = questions.settings or policy_path.with_name("trainer.toml")
    try:
        policy = Policy.load(policy_path)
        yield _checked("policy", lambda: _policy(policy, policy_path, now()))
        settings = TrainerSettings.load(settings_path)
        settings.dataset_of(tuple(policy.datasets))
    except CloisterError as error:
        yield Finding("policy", str(error), error)
        return
    yield _checked("disk", lambda: _disk(settings))
    yield _checked("device", lambda: _device(settings))
    yield _checked("backbone", lambda: _backbone(settings, policy))
    if questions.reads_data:
        yield _checked("data", lambda: _data(settings))


def _policy(policy: Policy, path: Path, now: float) -> Finding | str:
    if policy.has_expired(now):
        raise Refused(f"{path}: expired on {policy.expires}; every request would be refused: set a later expires")
    if not policy.backbones:
        raise Refused(f"{path}: no backbone is allowed; add its hash to backbones")
    return f"{policy.organisation}: {', '.join(sorted(policy.datasets))}"


def _disk(settings: TrainerSettings) -> Finding | str:
    folder = settings.ledger.parent
    if not os.access(folder, os.W_OK):
        raise Unavailable(f"{folder}: the ledger's folder cannot be written")
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE:
        raise Unavailable(
            f"{folder}: {free >> 20} MiB free, {LEAST_FREE >> 20} are needed for ledger and replies: make room"
        )
    return f"{free >> 30} GiB free beside the ledger"


def _device(settings: TrainerSettings) -> Finding | str:
    if importlib.util.find_spec("torch") is None:
        raise InvalidInput("torch is not installed: pip install 'cloister[client]'")
    import torch

    if torch.cuda.is_available():
        return f"GPU {torch.cuda.get_device_name(0)}"
    if settings.run.device == "cuda":
        raise InvalidInput("device = 'cuda', but torch sees no GPU here: check the driver, or set device = 'auto'")
    return "CPU"


def _backbone(settings: TrainerSettings, policy: Policy) -> str:
    from deploy.running.trainer_process import check_backbone

    return f"hash {check_backbone(settings, policy)[:16]}… is allowed"


def _data(settings: TrainerSettings) -> str:
    from client.data import read_rows

    return f"{len(read_rows(settings.run.data))} rows can be read (this number stays here)"


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_port(host: str = "127.0.0.1") -> int:
    """A port nobody listens on now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
