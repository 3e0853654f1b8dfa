"""What one organisation is handed: a folder and a tar of it, with a page that says how to use it.

    ca.crt                          the authority behind the coordinator's certificates
    supernode.key, supernode.pub    who the SuperNode is to Flower's fleet (ECDSA P-384, OpenSSH)
    client.key, client.pub          what the trainer signs with (Ed25519, ``common/signing.py``)
    client-tls.key, client.crt      who the organisation is to the accountant (mutual TLS)
    coordinator.pub, accountant.pub the keys that its policy pins
    kit.json                        {"name", "coordinator": "host:port", "version"}

An organisation that made its own keys gets the same without the three private ones.
"""

from __future__ import annotations

import base64
import importlib.metadata
import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_public_key,
)

from common.errors import InvalidInput
from common.signing import SigningKey, fingerprint
from deploy.provisioning.certificates import signing_request
from deploy.provisioning.private_files import read_small, write_private

PRIVATE = ("supernode.key", "client.key", "client-tls.key")
_NIST = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)


@dataclass(frozen=True)
class PublicKeys:
    """What the coordinator needs to know of an organisation's keys.

    Attributes:
        supernode: OpenSSH line of the SuperNode's ECDSA key.
        client: base64 Ed25519 key of the trainer.
        request: PEM request for the certificate shown to the accountant.
    """

    supernode: bytes
    client: str
    request: bytes

    def files(self) -> dict[str, bytes]:
        """Under the names that ``read_public_keys`` reads."""
        return {
            "supernode.pub": self.supernode,
            "client.pub": self.client.encode("ascii") + b"\n",
            "client-tls.csr": self.request,
        }


def make_keys(folder: Path, name: str) -> PublicKeys:
    """Write the three private keys of an organisation into ``folder`` and return the public side."""
    node = ec.generate_private_key(ec.SECP384R1())
    signing = SigningKey.generate()
    tls_key, request = signing_request(name)
    write_private(folder / "supernode.key", node.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    signing.save(folder / "client.key")
    write_private(folder / "client-tls.key", tls_key)
    public = node.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return PublicKeys(public + b" " + name.encode("ascii") + b"\n", signing.public_key, request)


def read_public_keys(folder: Path) -> PublicKeys:
    """The public side that an organisation sent.

    Raises:
        InvalidInput: a file is missing or holds another kind of key; names it. Also if a private key was sent.
    """
    for name in PRIVATE:
        if (folder / name).exists():
            raise InvalidInput(f"{folder / name}: a private key was sent: it is spent, ask for new ones and delete it")
    supernode = read_small(folder / "supernode.pub")
    _check_node_key(folder / "supernode.pub", supernode)
    try:
        client = read_small(folder / "client.pub").decode("ascii").strip()
        Ed25519PublicKey.from_public_bytes(base64.b64decode(client, validate=True))
    except ValueError as error:
        raise InvalidInput(f"{folder / 'client.pub'}: no base64 Ed25519 public key ({error})") from error
    return PublicKeys(supernode, client, read_small(folder / "client-tls.csr"))


def node_key_pem(line: bytes) -> bytes:
    """An OpenSSH public key as Flower's SuperLink stores it (PEM)."""
    return load_ssh_public_key(line).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _check_node_key(path: Path, line: bytes) -> None:
    try:
        key = load_ssh_public_key(line)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InvalidInput(f"{path}: no OpenSSH public key ({error})") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, _NIST):
        raise InvalidInput(f"{path}: must be an ECDSA key (ssh-keygen -t ecdsa -b 384)")


def kit_json(name: str, coordinator: str) -> bytes:
    """Who the kit is for, where the coordinator is, and for which version of Cloister it was made."""
    body = {"name": name, "coordinator": coordinator, "version": importlib.metadata.version("cloister")}
    return json.dumps(body, indent=1).encode() + b"\n"


def tar_of(folder: Path, name: str) -> bytes:
    """A tar of ``folder`` under the name ``name``: no owner, modes 0700 and 0600, in the order of names."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        root = tarfile.TarInfo(name)
        root.type, root.mode = tarfile.DIRTYPE, 0o700
        archive.addfile(root)
        for file in sorted(folder.iterdir()):
            data = file.read_bytes()
            item = tarfile.TarInfo(f"{name}/{file.name}")
            item.size, item.mode = len(data), 0o600
            archive.addfile(item, io.BytesIO(data))
    return stream.getvalue()


def client_readme(name: str, coordinator: str, keys: Mapping[str, str], *, has_private_keys: bool) -> bytes:
    """The page in a client's kit; ``keys`` are the coordinator's and the accountant's public keys."""
    own = _WITH_KEYS if has_private_keys else _WITHOUT_KEYS
    text = _CLIENT.format(
        name=name,
        coordinator=coordinator,
        own=own,
        coordinator_key=keys["coordinator"],
        accountant_key=keys["accountant"],
        coordinator_fingerprint=fingerprint(keys["coordinator"]),
        accountant_fingerprint=fingerprint(keys["accountant"]),
    )
    return text.encode()


def auditor_readme(name: str, keys: Mapping[str, str]) -> bytes:
    """The page in an auditor's kit."""
    return _AUDITOR.format(name=name, accountant_fingerprint=fingerprint(keys["accountant"])).encode()


_WITH_KEYS = """\
The private keys in it were made for you by the coordinator. If you would rather that nobody else ever held them, make
your own (`cloister provision request NAME --output FOLDER`), send the public ones, and ask for another kit."""

_WITHOUT_KEYS = """\
Your private keys are not in it: they never left you. Put them beside the other files:

    cp FOLDER/private/* ."""

_CLIENT = """\
# Kit of {name}

Everything in this folder that ends in `.key` is secret. Keep the folder at mode 0700 on the machine that joins.
{own}

Compare these with the coordinator by telephone before you pin them:

    coordinator  {coordinator_fingerprint}
    accountant   {accountant_fingerprint}

## Join, in three commands

1. Say what you allow. Only you can change this file:

       cloister client policy init policy.toml --organisation {name} --dataset NAME --declared-records N \\
           --coordinator-key {coordinator_key} \\
           --accountant-key {accountant_key}

   Name in it the backbones you allow (`cloister backbone verify FOLDER` prints the hash). Beside it goes
   `trainer.toml`, which says where your records and the backbone are; docs/deployment.md shows one.
   `cloister client doctor --policy policy.toml --kit .` checks everything, and sends nothing.

2. Start the trainer, the only process that can read your records. It signs with `client.key` of this folder:

       cloister client trainer --policy policy.toml

3. Join the coordinator at {coordinator}:

       cloister client join --kit . --trainer unix:trainer.sock

In containers the same is `deploy/client/compose.yaml`: set the variables of `deploy/client/.env.example`, then
`docker compose up --detach --wait`.

The coordinator reaches nothing here: both processes call out or listen on this machine only, and the relay has no file
of yours but `ca.crt` and `supernode.key`.
"""

_AUDITOR = """\
# Kit of the auditor {name}

`client-tls.key` is secret. `client.crt` and it let you read the accountant's whole ledger and watch its head; you can
change nothing. The accountant's key has the fingerprint {accountant_fingerprint}: compare it with the coordinator and
with an organisation before you trust it.
"""
