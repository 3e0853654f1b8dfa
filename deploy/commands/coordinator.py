"""``cloister coordinator serve|submit|initial|runs``: the coordinator's side of a federation."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from common.errors import InvalidInput, Unavailable
from common.logs import VARIABLE
from common.signing import SigningKey, fingerprint
from common.text import MOST_LINE, shown
from deploy.commands.logs import LogFormat, announcer, begin, child_listener
from deploy.running.doctor import is_free
from deploy.running.flower_control import FlowerControl
from deploy.running.processes import Service, Supervisor, program
from deploy.running.runs import every_run, find, prepare, start, stop, summary
from deploy.running.secretary import writing_reports
from server.accountant_service import is_local
from server.app import HOME_VARIABLE

coordinator_app = typer.Typer(name="coordinator", help="The coordinator of a federation.", no_args_is_help=True)
runs_app = typer.Typer(name="runs", help="The runs of this coordinator.", no_args_is_help=True)
coordinator_app.add_typer(runs_app)

Folder = Annotated[
    Path, typer.Option("--folder", envvar=HOME_VARIABLE, help="where the coordinator keeps keys, ledger and runs")
]
SuperLink = Annotated[
    str, typer.Option("--superlink", envvar="CLOISTER_SUPERLINK", help="HOST:PORT of the SuperLink, inner network only")
]
Authority = Annotated[
    Path | None,
    typer.Option("--tls-authority", envvar="CLOISTER_TLS_AUTHORITY", help="PEM of the authority; none: plain HTTP"),
]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="its name, or the beginning of it")]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]
SUPERLINK = "127.0.0.1:8000"


@coordinator_app.command("serve")
def _serve(
    folder: Folder = Path("coordinator"),
    host: Annotated[str, typer.Option("--host", help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="port to listen on")] = 8000,
    tls_certificate: Annotated[Path | None, typer.Option("--tls-certificate", help="PEM")] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", help="PEM")] = None,
    tls_authority: Annotated[Path | None, typer.Option("--tls-authority", help="PEM")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="plain HTTP, unknown nodes: loopback and tests only")
    ] = False,
    log_format: LogFormat = "text",
) -> None:
    """Run Flower's SuperLink and SuperExec and keep them running; ends cleanly on SIGTERM.

    With TLS only registered nodes are admitted ('cloister provision'). The same port serves an interface that starts
    code on every client and knows no passwords: let nobody but the proxy reach it.
    """
    begin(log_format)
    say = announcer(log_format)
    tls = _tls(tls_certificate, tls_key, tls_authority, insecure=insecure)
    if insecure and not is_local(f"{host}:{port}"):
        raise InvalidInput(f"--insecure on {host}: plain HTTP is for loopback only; give certificates")
    if not is_free(host, port):
        raise Unavailable(f"{host}:{port}: somebody listens there already; stop it, or choose another --port")
    home = make_home(folder)
    for name in ("coordinator", "accountant"):
        key = SigningKey.load_or_create(home / "keys" / f"{name}.key")
        say(f"{name} {fingerprint(key.public_key)} public key {key.public_key}")
    secret = _secret(home)
    environment = {HOME_VARIABLE: str(home), "FLWR_HOME": str(home / "flower"), VARIABLE: log_format}
    where = f"{host}:{port}"
    services = [
        Service("superlink", superlink_command(home, host, port, tls, secret), environment),
        Service("superexec", superexec_command(where, tls, secret), environment, may_leave_work=True),
    ]
    say(f"coordinator listens on {where}; its folder is {home}")
    with writing_reports(home):
        Supervisor(services, say, child_listener(log_format)).run()


@coordinator_app.command("submit")
def _submit(
    settings: Annotated[Path, typer.Argument(metavar="RUN.toml", help="the run's settings")],
    folder: Folder = Path("coordinator"),
    clients: Annotated[int | None, typer.Option("--clients", min=1, help="organisations to wait for")] = None,
    initial: Annotated[Path | None, typer.Option("--initial", help="untrained adapter, where it is not zero")] = None,
    superlink: SuperLink = SUPERLINK,
    tls_authority: Authority = None,
    as_json: Json = False,
) -> None:
    """Start a run; it waits for its organisations, trains, and leaves an adapter and a certificate."""
    with FlowerControl(superlink, tls_authority) as control:
        made = prepare(make_home(folder), settings, clients=clients, initial=initial)
        start(made, control)
    if as_json:
        typer.echo(json.dumps(summary(made)))
    else:
        typer.echo(f"run {made.run_id} submitted; 'cloister coordinator runs show {made.run_id}' follows it")


@coordinator_app.command("initial")
def _initial(
    settings: Annotated[Path, typer.Argument(metavar="RUN.toml", help="the run's settings, with its model")],
    output: Annotated[Path, typer.Option("--output", help="file to write (.npz)")] = Path("initial.npz"),
    classes: Annotated[str | None, typer.Option("--classes", help="comma-separated, as in every trainer.toml")] = None,
) -> None:
    """Make the untrained adapter of a run from its public seed; needs torch and the backbone, and no record."""
    import numpy as np

    from common.config import RunConfig
    from deploy.simulation.simulate import quiet_warnings
    from deploy.workshop import WITHOUT_RECORDS, open_workshop

    names = tuple(classes.split(",")) if classes else ()
    with quiet_warnings():
        workshop = open_workshop(RunConfig.load(settings, WITHOUT_RECORDS), names)
    np.savez(output, allow_pickle=False, **workshop.workbench.initial)
    typer.echo(f"{output}: {len(workshop.workbench.initial)} tensors")


@runs_app.command("list")
def _list(folder: Folder = Path("coordinator"), as_json: Json = False) -> None:
    """Every run of this coordinator and where it stands."""
    found = [summary(one) for one in every_run(folder)]
    if as_json:
        typer.echo(json.dumps(found))
    for one in [] if as_json else found:
        typer.echo(_line(one))


@runs_app.command("show")
def _show(run: RunName, folder: Folder = Path("coordinator"), as_json: Json = False) -> None:
    """Where one run stands, the ε of each organisation, and why it failed if it did."""
    found = summary(find(folder, run))
    if as_json:
        typer.echo(json.dumps(found))
        return
    typer.echo(_line(found))
    for client, epsilon in (found["epsilon"] or {}).items():
        typer.echo(f"  {shown(client)}: ε {epsilon:.4f} reserved up to now")
    if found["error"]:
        typer.echo(f"  {shown(found['error'], MOST_LINE)}")
    if found["certificate"]:
        typer.echo(f"  check it: cloister certificate verify {found['folder']}/certificate.json")


@runs_app.command("logs")
def _logs(run: RunName, folder: Folder = Path("coordinator")) -> None:
    """What happened in every round, and why a client was left out or an update was not used."""
    file = find(folder, run).path / "run.log"
    if not file.exists():
        typer.echo("nothing has happened yet")
        return
    text = file.read_text("utf-8")
    typer.echo(shown(text, len(text), keep="\n"), nl=False)


@runs_app.command("stop")
def _stop(
    run: RunName,
    folder: Folder = Path("coordinator"),
    now: Annotated[
        bool, typer.Option("--now", help="do not wait for the current round: what was sent is lost")
    ] = False,
    superlink: SuperLink = SUPERLINK,
    tls_authority: Authority = None,
) -> None:
    """End a run after its current round; it can be resumed."""
    found = find(folder, run)
    with FlowerControl(superlink, tls_authority) as control:
        typer.echo(stop(found, control, now=now))


@runs_app.command("resume")
def _resume(
    run: RunName,
    folder: Folder = Path("coordinator"),
    without: Annotated[
        list[str] | None,
        typer.Option("--without", help="an organisation that is gone for good: certify without its part, and say so"),
    ] = None,
    superlink: SuperLink = SUPERLINK,
    tls_authority: Authority = None,
) -> None:
    """Go on with a run that was stopped, has failed or was killed, from its checkpoint."""
    found = find(folder, run)
    if without:
        found.leave_out(without)
    with FlowerControl(superlink, tls_authority) as control:
        start(found, control)
    typer.echo(f"run {found.run_id} goes on after round {summary(found)['round']}")


def make_home(folder: Path) -> Path:
    """The coordinator's folder, made if it is missing, for its owner only."""
    home = folder.absolute()
    try:
        for path in (home, home / "keys", home / "runs", home / "flower"):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise Unavailable(f"{home}: cannot be made ({error.strerror or error})") from error
    return home


def superlink_command(home: Path, host: str, port: int, tls: Sequence[Path] | None, secret: Path) -> list[str]:
    """The command line of Flower's SuperLink: its database on disk, ServerApps in processes of their own."""
    command = [
        program("flower-superlink"), "--host", host, "--port", str(port), "--isolation", "process",
        "--database", str(home / "superlink.db"), "--superexec-auth-secret-file", str(secret),
        "--disable-runtime-dependency-installation",
    ]  # fmt: skip
    if tls is None:
        return [*command, "--insecure"]
    certificate, key, authority = map(str, tls)
    return [
        *command, "--enable-supernode-auth",
        "--ssl-certfile", certificate, "--ssl-keyfile", key, "--ssl-ca-certfile", authority,
    ]  # fmt: skip


def superexec_command(superlink: str, tls: Sequence[Path] | None, secret: Path) -> list[str]:
    """The command line of Flower's SuperExec, which starts a ServerApp per run."""
    command = [
        program("flower-superexec"), "--runtime-api-address", superlink, "--superexec-auth-secret-file", str(secret),
    ]  # fmt: skip
    return [*command, "--insecure"] if tls is None else [*command, "--root-certificates", str(tls[2])]


def _secret(home: Path) -> Path:
    """What SuperLink and SuperExec know each other by; made on first use."""
    path = home / "keys" / "superexec.secret"
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_hex(32).encode())
    return path


def _tls(
    certificate: Path | None, key: Path | None, authority: Path | None, *, insecure: bool
) -> tuple[Path, ...] | None:
    given = tuple(path for path in (certificate, key, authority) if path is not None)
    if insecure and given:
        raise InvalidInput("--insecure and TLS files exclude each other")
    if not insecure and len(given) < 3:
        raise InvalidInput(
            "give --tls-certificate, --tls-key and --tls-authority ('cloister provision' makes them), or --insecure on "
            "loopback"
        )
    for path in given:
        if not path.is_file():
            raise InvalidInput(f"{path}: there is no such file")
    return None if insecure else given


def _line(found: dict[str, Any]) -> str:
    return f"{found['run_id']}  {found['state']:<11} round {found['round']}/{found['rounds']}"
