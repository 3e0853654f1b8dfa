"""``cloister provision``: keys, certificates and kits of a federation."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from common.errors import CloisterError
from common.signing import fingerprint
from deploy.provisioning.certificates import LEAF_DAYS
from deploy.provisioning.private_files import read_small
from deploy.provisioning.provision import CLIENT, Federation, init, request_keys

provision_app = typer.Typer(
    name="provision", help="Make, renew and revoke the keys and certificates of a federation.", no_args_is_help=True
)

FederationFolder = Annotated[Path, typer.Option("--federation", help="the folder that 'init' made")]
PublicKeyFolder = Annotated[
    Path | None, typer.Option("--public-keys", help="the organisation's own public keys, from 'request'")
]
Days = Annotated[int, typer.Option("--days", min=1, max=3650, help="how long the certificate lasts")]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]

HERE = Path("federation")


@provision_app.command("init")
def _init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="must not exist")],
    coordinator: Annotated[str, typer.Option("--coordinator", metavar="HOST:PORT", help="as organisations reach it")],
    also_known_as: Annotated[
        list[str] | None, typer.Option("--also-known-as", metavar="HOST", help="another name or address of it")
    ] = None,
) -> None:
    """Make the authority, the coordinator's certificates and keys, and the accountant's."""
    init(folder, coordinator, datetime.now(UTC), also_known_as=also_known_as or [])
    typer.echo(f"{folder}/coordinator: for the coordinator's machine")
    for side in ("coordinator", "accountant"):
        key = read_small(folder / "coordinator" / "superexec" / f"{side}.pub").decode("ascii").strip()
        typer.echo(f"{side} {fingerprint(key)}  public key {key}")
    typer.echo(f"next: cloister provision add-client NAME --federation {folder}")


@provision_app.command("request")
def _request(
    name: Annotated[str, typer.Argument(metavar="NAME", help="the organisation, as the coordinator will call it")],
    output: Annotated[Path, typer.Option("--output", help="folder to make")],
) -> None:
    """On an organisation's machine: make its keys, of which only the public ones are sent."""
    request_keys(output, name)
    typer.echo(f"{output}/private: stays here\n{output}/public: send it to the coordinator")


@provision_app.command("add-client")
def _add_client(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    federation: FederationFolder = HERE,
    public_keys: PublicKeyFolder = None,
    role: Annotated[str, typer.Option("--role", help="client, or auditor: may read the accountant's ledger")] = CLIENT,
    days: Days = LEAF_DAYS,
) -> None:
    """Make the kit of an organisation: a folder, and a tar of it."""
    kit = Federation(federation).add(name, datetime.now(UTC), role=role, public_keys=public_keys, days=days)
    _say_where(kit, has_private_keys=public_keys is None)


@provision_app.command("rotate")
def _rotate(
    name: Annotated[str | None, typer.Argument(metavar="NAME")] = None,
    federation: FederationFolder = HERE,
    servers: Annotated[bool, typer.Option("--servers", help="the coordinator's own certificates instead")] = False,
    public_keys: PublicKeyFolder = None,
    keep_old: Annotated[bool, typer.Option("--keep-old", help="until 'revoke NAME --generation N'")] = False,
    days: Days = LEAF_DAYS,
) -> None:
    """Make another kit with new keys; the old one is revoked."""
    if servers == (name is not None):
        raise typer.BadParameter("give a NAME, or --servers")
    if name is None:
        Federation(federation).rotate_servers(datetime.now(UTC))
        typer.echo("the servers' certificates are new: restart proxy, superlink, accountant and superexec")
        return
    kit = Federation(federation).rotate(name, datetime.now(UTC), keep_old=keep_old, public_keys=public_keys, days=days)
    _say_where(kit, has_private_keys=public_keys is None)


@provision_app.command("revoke")
def _revoke(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    federation: FederationFolder = HERE,
    generation: Annotated[int | None, typer.Option("--generation", min=1, help="this kit only; default: all")] = None,
) -> None:
    """Believe the kits of an organisation no more; nothing is restarted."""
    for member in Federation(federation).revoke(name, generation=generation):
        typer.echo(f"{member.label}: revoked")


@provision_app.command("list")
def _list(federation: FederationFolder = HERE, as_json: Json = False) -> None:
    """Show every kit that was issued."""
    members = Federation(federation).members()
    if as_json:
        typer.echo(json.dumps([asdict(member) for member in members]))
        return
    for member in members:
        state = "revoked" if member.revoked else f"until {member.expires[:10]}"
        typer.echo(f"{member.label:32} {member.role:8} {state}")


@provision_app.command("database")
def _database(federation: FederationFolder = HERE) -> None:
    """Make the passwords of a PostgreSQL ledger: one for the accountant, which writes, one for who may only read."""
    from deploy.provisioning.database import READER, WRITER

    folder = Federation(federation).database_passwords()
    typer.echo(f"{folder}/{WRITER}: the accountant's\n{folder}/{READER}: the dashboard's")


@provision_app.command("nodes")
def _nodes(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="coordinator/nodes")],
    superlink: Annotated[str, typer.Option("--superlink", metavar="HOST:PORT", help="the SuperLink")],
    root_certificates: Annotated[Path, typer.Option("--root-certificates", help="ca.crt")],
    watch: Annotated[
        float | None, typer.Option("--watch", metavar="SECONDS", min=0.5, help="look again, until it is ended")
    ] = None,
    touch: Annotated[Path | None, typer.Option("--touch", help="file to touch after every look that went well")] = None,
) -> None:
    """On the coordinator: register the SuperNodes of FOLDER with the SuperLink, and strike off the revoked ones."""
    from deploy.provisioning.nodes import connect

    client = connect(superlink, root_certificates)
    pause, said = threading.Event(), ""
    try:
        while True:
            try:
                _look(client, folder)
                said = ""
                if touch is not None:
                    touch.touch()
            except CloisterError as error:
                if watch is None:
                    raise
                if str(error) != said:  # once for as long as it lasts
                    typer.echo(f"{error}; trying again every {watch:g} s", err=True)
                said = str(error)
            if watch is None:
                return
            pause.wait(watch)
    finally:
        client.close()


def _look(client: object, folder: Path) -> None:
    from deploy.provisioning.nodes import keep_in_step

    changed = keep_in_step(client, folder)
    for name in changed.registered:
        typer.echo(f"{name}: registered")
    for name in changed.unregistered:
        typer.echo(f"{name}: unregistered")
    for node in changed.unknown:
        typer.echo(f"warning: node {node} is registered, but none of the kits here is its", err=True)


def _say_where(kit: Path, *, has_private_keys: bool) -> None:
    typer.echo(f"{kit} and {kit}.tar: hand it over on a private way" if has_private_keys else f"{kit} and {kit}.tar")
    if has_private_keys:
        typer.echo("it holds private keys: delete it here when it has arrived")
