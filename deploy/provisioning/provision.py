"""A federation's keys and certificates, in one folder on a machine that need not be the coordinator's.

    federation.json       where the coordinator is reached
    authority/            the certificate authority; keep it offline if you can
    members/NAME.1/       what was issued: certificate, public keys, role; nothing secret
    kits/NAME, NAME.tar   what NAME is handed; delete it here afterwards
    coordinator/          what the coordinator's machine needs, one folder per service:
      proxy/ superlink/ superexec/ accountant/ nodes/ dashboard/, and postgres/ if that is where the ledger is

``nodes/`` holds the public keys of the SuperNodes that may join, and ``nodes/revoked/`` of those that no longer may;
``accountant/revoked.json`` is the accountant's list, ``dashboard/revoked.json`` a copy for the dashboard, which must
not see the key beside the other. All are read while everything runs, so a revocation restarts nothing. Every file is
0600 and every folder 0700; what exists is never overwritten.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import ipaddress
import json
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from common.errors import InvalidInput, Refused, Unavailable
from common.signing import SigningKey
from deploy.provisioning.certificates import LEAF_DAYS, Authority, Pair, expiry_of, serial_of
from deploy.provisioning.database import make_passwords
from deploy.provisioning.kits import (
    PublicKeys,
    auditor_readme,
    client_readme,
    kit_json,
    make_keys,
    node_key_pem,
    read_public_keys,
    tar_of,
)
from deploy.provisioning.private_files import make_folder, new_folder, read_small, replace_private, write_private
from server.revocation import read_revoked, write_revoked

CLIENT, AUDITOR = "client", "auditor"
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
_INSIDE = ("localhost", "127.0.0.1")
"""Names under which services reach each other on one machine, beside their own."""


@dataclass(frozen=True)
class Member:
    """One kit that was issued.

    Attributes:
        name: the organisation; role: ``client`` or ``auditor``.
        generation: 1 for the first kit of that name, one more for each rotation.
        serial: of its certificate, hexadecimal.
        expires: end of its certificate, ISO 8601.
        revoked: whether it is believed no more.
    """

    name: str
    role: str
    generation: int
    serial: str
    expires: str
    revoked: bool = False

    @property
    def label(self) -> str:
        """Name and generation: ``clinic-a.2``."""
        return f"{self.name}.{self.generation}"


def init(folder: Path, coordinator: str, now: datetime, *, also_known_as: Sequence[str] = ()) -> None:
    """Make a federation: authority, the servers' certificates, the coordinator's and the accountant's keys.

    Args:
        folder: must not exist.
        coordinator: ``host:port`` under which organisations reach the proxy.
        now: the time, with a zone.
        also_known_as: further names or addresses of the same proxy.

    Raises:
        InvalidInput: the folder exists, or an address is none.
    """
    host, _ = split_address(coordinator)
    hosts = [host, *(_checked_host(other) for other in also_known_as)]
    with new_folder(folder) as root:
        authority = Authority.create(host, now)
        write_private(root / "authority" / "ca.crt", authority.pair.certificate)
        write_private(root / "authority" / "ca.key", authority.pair.key)
        side = root / "coordinator"
        for path, data in _server_files(authority, hosts, now).items():
            write_private(side / path, data)
        secret = secrets.token_hex(32).encode()  # Flower reads the file as raw bytes: no line end
        for service in ("superlink", "superexec"):
            write_private(side / service / "superexec.secret", secret)
        coordinator_key, accountant_key = SigningKey.generate(), SigningKey.generate()
        coordinator_key.save(side / "superexec" / "coordinator.key")
        accountant_key.save(side / "accountant" / "accountant.key")
        for name, key in (("coordinator", coordinator_key), ("accountant", accountant_key)):
            write_private(side / "superexec" / f"{name}.pub", key.public_key.encode() + b"\n")
        for service in ("accountant", "dashboard"):
            write_private(side / service / "revoked.json", write_revoked({}))
        make_folder(side / "nodes" / "revoked")
        make_folder(side / "superexec" / "clients")
        for empty in ("members", "kits"):
            make_folder(root / empty)
        body = {"format": 1, "coordinator": coordinator, "hosts": hosts, "version": _version()}
        write_private(root / "federation.json", json.dumps(body, indent=1).encode() + b"\n")


def request_keys(folder: Path, name: str) -> None:
    """On an organisation's own machine: private keys to keep, public ones to send.

    Raises:
        InvalidInput: the folder exists, or the name is none.
    """
    _check_name(name)
    with new_folder(folder) as root:
        public = make_keys(root / "private", name)
        for file, data in public.files().items():
            write_private(root / "public" / file, data)


class Federation:
    """A folder that ``init`` made.

    Raises:
        InvalidInput: it is none, or of another format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "federation.json").is_file():
            raise InvalidInput(f"{folder}: no federation here; make one with 'cloister provision init {folder}'")
        try:
            body = json.loads(read_small(folder / "federation.json"))
            self.coordinator, self.hosts = str(body["coordinator"]), [str(host) for host in body["hosts"]]
            if body["format"] != 1:
                raise ValueError("made by another version")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InvalidInput(f"{folder / 'federation.json'}: cannot be read ({error})") from error
        self._side = folder / "coordinator"

    def members(self) -> list[Member]:
        """Every kit that was issued, in the order of names and generations."""
        revoked = read_revoked(self._side / "accountant" / "revoked.json")
        found = []
        for path in sorted((self.folder / "members").glob("*.*/member.json")):
            try:
                body: dict[str, Any] = json.loads(read_small(path))
                found.append(Member(**{**body, "revoked": body["serial"] in revoked}))
            except (ValueError, TypeError, KeyError) as error:
                raise InvalidInput(f"{path}: cannot be read ({error})") from error
        return sorted(found, key=lambda member: (member.name, member.generation))

    def add(
        self, name: str, now: datetime, *, role: str = CLIENT, public_keys: Path | None = None, days: int = LEAF_DAYS
    ) -> Path:
        """Issue the first kit of ``name``; returns its folder, beside which lies its tar.

        Raises:
            InvalidInput: there is such a member, the name is none, or the keys that were sent cannot be used.
        """
        _check_name(name)
        with self._alone():
            return self._first(name, now, role, public_keys, days)

    def _first(self, name: str, now: datetime, role: str, public_keys: Path | None, days: int) -> Path:
        if any(member.name == name for member in self.members()):
            raise InvalidInput(f"{name} has a kit already; 'cloister provision rotate {name}' makes another")
        return self._issue(name, 1, role, now, public_keys, days)

    def rotate(
        self,
        name: str,
        now: datetime,
        *,
        keep_old: bool = False,
        public_keys: Path | None = None,
        days: int = LEAF_DAYS,
    ) -> Path:
        """Issue another kit with new keys, and revoke the ones before unless ``keep_old``.

        Raises:
            InvalidInput: there is no such member, or the keys that were sent cannot be used.
        """
        with self._alone():
            before = self._of(name)
            kit = self._issue(name, before[-1].generation + 1, before[-1].role, now, public_keys, days)
            if not keep_old:
                self._revoke(before)
        return kit

    def database_passwords(self) -> Path:
        """Make the passwords of PostgreSQL's two roles where they are missing; returns their folder."""
        with self._alone():
            make_passwords(self._side / "postgres")
        return self._side / "postgres"

    def rotate_servers(self, now: datetime) -> None:
        """Replace the servers' certificates and the coordinator's own; the authority and all kits stay.

        Each file is replaced in one step, not all of them at once: restart the services afterwards.
        """
        with self._alone():
            own = serial_of(read_small(self._side / "superexec" / "client.crt"))
            for path, data in _server_files(self._authority(), self.hosts, now).items():
                replace_private(self._side / path, data)
            self._strike_out({own: "coordinator"})

    def revoke(self, name: str, *, generation: int | None = None) -> list[Member]:
        """Believe the kits of ``name`` no more (or one of them); returns those. Again does no harm.

        The accountant refuses them at their next call. Their SuperNodes are struck off the SuperLink's list by
        ``cloister provision nodes``, which runs beside it.

        Raises:
            InvalidInput: there is no such kit.
        """
        with self._alone():
            chosen = [member for member in self._of(name) if generation in (None, member.generation)]
            if not chosen:
                raise InvalidInput(f"{name} has no kit of generation {generation}")
            self._revoke(chosen)
        return chosen

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One command at a time: two revocations at once must not lose one of them."""
        with (self.folder / "federation.json").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _of(self, name: str) -> list[Member]:
        found = [member for member in self.members() if member.name == name]
        if not found:
            known = ", ".join(sorted({member.name for member in self.members()})) or "none yet"
            raise InvalidInput(f"there is no member {name!r}; known: {known}")
        return found

    def _revoke(self, members: Sequence[Member]) -> None:
        self._strike_out({member.serial: member.label for member in members})
        for member in members:
            (self._side / "superexec" / "clients" / f"{member.label}.pub").unlink(missing_ok=True)
            node = self._side / "nodes" / f"{member.label}.pub"
            if node.exists():
                try:
                    os.replace(node, self._side / "nodes" / "revoked" / node.name)
                except OSError as error:
                    raise Unavailable(f"{node}: cannot be moved ({error.strerror}); run the same again") from error

    def _strike_out(self, serials: dict[str, str]) -> None:
        path = self._side / "accountant" / "revoked.json"
        data = write_revoked({**read_revoked(path), **serials})
        replace_private(path, data)
        replace_private(self._side / "dashboard" / "revoked.json", data)

    def _authority(self) -> Authority:
        folder = self.folder / "authority"
        return Authority.load(Pair(read_small(folder / "ca.crt"), read_small(folder / "ca.key")))

    def _issue(self, name: str, generation: int, role: str, now: datetime, sent: Path | None, days: int) -> Path:
        """Make the kit. It is recorded before it appears: a kit that nobody could revoke never exists."""
        if role not in (CLIENT, AUDITOR):
            raise InvalidInput(f"role must be {CLIENT} or {AUDITOR}, got {role!r}")
        authority = self._authority()
        keys = {side: self._public_key(side) for side in ("coordinator", "accountant")}
        label = f"{name}.{generation}"
        kit = self.folder / "kits" / (name if generation == 1 else label)
        with new_folder(kit) as made:
            public = make_keys(made, name) if sent is None else read_public_keys(sent)
            self._refuse_known_keys(public)
            certificate = authority.party_of_request(public.request, name, role, now, days=days)
            files = {"ca.crt": authority.pair.certificate, "client.crt": certificate}
            files |= {f"{side}.pub": key.encode() + b"\n" for side, key in keys.items()}
            files["kit.json"] = kit_json(name, self.coordinator)
            if role == CLIENT:
                files |= {file: public.files()[file] for file in ("supernode.pub", "client.pub")}
                readme = client_readme(name, self.coordinator, keys, has_private_keys=sent is None)
            else:
                readme = auditor_readme(name, keys)
                for unused in ("supernode.key", "client.key"):
                    (made / unused).unlink(missing_ok=True)
            for file, data in {**files, "README.md": readme}.items():
                write_private(made / file, data)
            self._record(Member(name, role, generation, serial_of(certificate), _end(certificate)), certificate, public)
            replace_private(kit.with_name(f"{kit.name}.tar"), tar_of(made, kit.name))
        return kit

    def _record(self, member: Member, certificate: bytes, public: PublicKeys) -> None:
        """Remember what was issued, so that it can be revoked, then let it in."""
        body = {key: value for key, value in asdict(member).items() if key != "revoked"}
        with new_folder(self.folder / "members" / member.label) as record:
            write_private(record / "member.json", json.dumps(body, indent=1).encode() + b"\n")
            write_private(record / "client.crt", certificate)
            if member.role == CLIENT:
                for file in ("supernode.pub", "client.pub"):
                    write_private(record / file, public.files()[file])
        if member.role == CLIENT:
            file = f"{member.label}.pub"
            replace_private(self._side / "superexec" / "clients" / file, public.files()["client.pub"])
            replace_private(self._side / "nodes" / file, public.supernode)

    def _public_key(self, side: str) -> str:
        return read_small(self._side / "superexec" / f"{side}.pub").decode("ascii").strip()

    def _refuse_known_keys(self, public: PublicKeys) -> None:
        """A key names one member for ever: Flower never takes a revoked one again, and a signature must name its maker.

        Raises:
            Refused: one of the keys was issued before.
        """
        for record in sorted((self.folder / "members").glob("*.*/supernode.pub")):
            is_node = node_key_pem(record.read_bytes()) == node_key_pem(public.supernode)
            if is_node or (record.parent / "client.pub").read_text("ascii").strip() == public.client:
                raise Refused(f"one of these keys was issued before, to {record.parent.name}: make fresh ones")


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``host:port``.

    Raises:
        InvalidInput: it is something else.
    """
    host, separator, port = address.rpartition(":")
    if not separator or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise InvalidInput(f"{address}: write HOST:PORT, for example coordinator.example.org:8443")
    return _checked_host(host.strip("[]")), int(port)


def _checked_host(host: str) -> str:
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not _HOST.fullmatch(host):
        raise InvalidInput(f"{host!r} is no host name and no address")
    return host


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidInput(f"{name!r}: a name has 1 to 63 small letters, digits and dashes, no dash at either end")


def _server_files(authority: Authority, hosts: Sequence[str], now: datetime) -> dict[str, bytes]:
    """Every certificate of the coordinator's side, by its path below ``coordinator``."""
    known_as = {
        "proxy": list(dict.fromkeys([*hosts, "proxy", *_INSIDE])),
        "superlink": ["superlink", *_INSIDE],
        "accountant": list(dict.fromkeys(["accountant", *_INSIDE, *hosts])),
    }
    files = {}
    for service, names in known_as.items():
        pair = authority.server(service, names, now)
        files[f"{service}/tls.crt"], files[f"{service}/tls.key"] = pair.certificate, pair.key
    caller = authority.party("coordinator", "coordinator", now)
    files["superexec/client.crt"], files["superexec/client-tls.key"] = caller.certificate, caller.key
    for service in (*known_as, "superexec", "nodes"):
        files[f"{service}/ca.crt"] = authority.pair.certificate
    return files


def _end(certificate: bytes) -> str:
    return expiry_of(certificate).isoformat()


def _version() -> str:
    return importlib.metadata.version("cloister")
