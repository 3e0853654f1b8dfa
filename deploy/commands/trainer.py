"""``cloister client trainer|join|doctor|status``: an organisation takes part in a federation."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from client.progress import ask_status
from client.settings import FILE, TrainerSettings
from common.errors import InvalidInput
from common.logs import VARIABLE
from deploy.commands.logs import LogFormat, announcer, begin, child_listener
from deploy.running.doctor import Finding, Questions, examine, free_port, is_free, worst
from deploy.running.processes import Service, Supervisor, program

PolicyOption = Annotated[Path, typer.Option("--policy", help="the organisation's policy (TOML)")]
SettingsOption = Annotated[
    Path | None, typer.Option("--settings", help=f"the trainer's own settings; default: {FILE} beside the policy")
]
KitOption = Annotated[Path | None, typer.Option("--kit", help="folder that the coordinator's 'provision' made")]
CoordinatorOption = Annotated[str | None, typer.Option("--coordinator", help="HOST:PORT; default: the kit's")]
InsecureOption = Annotated[bool, typer.Option("--insecure", help="plain HTTP: loopback and tests only")]
NOT_REGISTERED = "[code: 2004]"
"""In the line that Flower's SuperNode prints when the SuperLink does not activate it."""

PROMPTNESS = "FLWR_SUPEREXEC_TASK_POLL_INTERVAL"
"""Seconds after which the node's SuperExec looks for work again, which every message waits for; Flower's own is 1."""

Json = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]


def register(app: typer.Typer) -> None:
    """Add the commands to the ``client`` group."""
    app.command("trainer")(trainer)
    app.command("join")(join)
    app.command("doctor")(doctor)
    app.command("status")(status)


def trainer(policy: PolicyOption, settings: SettingsOption = None, log_format: LogFormat = "text") -> None:
    """Serve this organisation's records to training, and to nothing else; ends cleanly on SIGTERM.

    The settings file names data, columns, backbone, device and sockets; docs/operations.md shows one.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    begin(log_format, holds_records=True)
    found = TrainerSettings.load(settings or policy.with_name(FILE))
    from deploy.running.trainer_process import run_trainer
    from deploy.simulation.simulate import quiet_warnings

    with quiet_warnings():
        run_trainer(policy, found, announcer(log_format))


def join(
    kit: KitOption = None,
    coordinator: CoordinatorOption = None,
    trainer: Annotated[
        str, typer.Option("--trainer", help="unix:PATH or host:port of the trainer")
    ] = "unix:trainer.sock",
    insecure: InsecureOption = False,
    port: Annotated[
        int | None, typer.Option("--port", help="SuperNode's own port on loopback; default: a free one")
    ] = None,
    log_format: LogFormat = "text",
) -> None:
    """Connect this organisation to a coordinator: starts Flower's SuperNode and keeps it running.

    It holds no data and no key but its own; what it passes on was signed and noised before. Needs no inbound port.
    """
    begin(log_format)
    say = announcer(log_format)
    questions = Questions(kit=kit, coordinator=_address(coordinator, kit), is_insecure=insecure)
    findings = list(examine(questions))
    if log_format == "json":
        for found in findings:
            say(f"{found.mark} {found.check}: {found.text}")
    else:
        _print(findings)
    if code := worst(findings):
        raise typer.Exit(code)
    own_port = port or free_port()
    if not is_free("127.0.0.1", own_port):
        raise InvalidInput(f"--port {own_port}: somebody listens there already; choose another, or leave it out")
    with tempfile.TemporaryDirectory(prefix="cloister-node-") as home:
        command = supernode_command(str(questions.coordinator), _absolute(trainer), own_port, None if insecure else kit)
        environment = {PROMPTNESS: os.environ.get(PROMPTNESS, "0.25"), "FLWR_HOME": home, VARIABLE: log_format}
        services = [Service("supernode", command, environment)]
        Supervisor(services, say, explaining(child_listener(log_format), say, str(questions.coordinator))).run()


def explaining(
    hear: Callable[[str, str], None], say: Callable[[str], None], coordinator: str
) -> Callable[[str, str], None]:
    """A listener to the SuperNode that says what mends its refusal: Flower's own words do not.

    Args:
        hear: gets every line as well.
        say: gets our sentence.
        coordinator: its address.
    """

    def listen(service: str, line: str) -> None:
        hear(service, line)
        if NOT_REGISTERED in line:
            say(
                f"{coordinator} does not know the node key of this kit: it was revoked, or is not registered yet. The "
                "coordinator's side mends it: 'cloister provision list' shows the kits, 'cloister provision rotate' "
                "makes a new one, 'cloister provision nodes' registers it; this node tries again by itself"
            )

    return listen


def doctor(
    policy: Annotated[Path | None, typer.Option("--policy", help="the organisation's policy (TOML)")] = None,
    settings: SettingsOption = None,
    kit: KitOption = None,
    coordinator: CoordinatorOption = None,
    insecure: InsecureOption = False,
    as_json: Json = False,
) -> None:
    """Check everything that taking part needs: certificates, clock, coordinator, disk, device, backbone, policy, data.

    The exit code is that of the first check that fails: 2 a setting or file, 5 refused, 7 cannot be reached.
    """
    address = _address(coordinator, kit) if coordinator or kit else None
    if policy is None and address is None:
        raise InvalidInput("nothing to check: give --policy, --kit, or both")
    questions = Questions(kit=kit, coordinator=address, is_insecure=insecure, policy=policy, settings=settings)
    findings = []
    for finding in examine(questions):
        findings.append(finding)
        if not as_json:
            _print([finding])
    if as_json:
        typer.echo(json.dumps([{"check": one.check, "result": one.mark, "text": one.text} for one in findings]))
    raise typer.Exit(worst(findings))


def status(policy: PolicyOption, settings: SettingsOption = None, as_json: Json = False) -> None:
    """Show what this organisation's trainer is doing and what is left of its budget; for its own eyes."""
    found = ask_status(Path(TrainerSettings.load(settings or policy.with_name(FILE)).status))
    if as_json:
        typer.echo(json.dumps(found))
        return
    request, budget = found["request"], found["budget"]
    doing = "idle" if request is None else (
        f"run {request['run_id']}, round {request['round']}, step {request['step']} of {request['steps']}"
    )  # fmt: skip
    typer.echo(f"{found['organisation']} ({found['dataset']}): {doing}; {found['answered']} requests answered")
    typer.echo(f"ε {budget['epsilon']:.4g} of {budget['target_epsilon']:g} charged, left {budget['left']:.4g}")


def supernode_command(coordinator: str, trainer: str, port: int, kit: Path | None) -> Sequence[str]:
    """The command line of Flower's SuperNode; without a kit it speaks plain HTTP."""
    command = [
        program("flower-supernode"), "--superlink", coordinator, "--isolation", "subprocess",
        "--host", "127.0.0.1", "--port", str(port), "--node-config", f'trainer="{trainer}"',
    ]  # fmt: skip
    if kit is None:
        return [*command, "--insecure"]
    command += ["--root-certificates", str(kit / "ca.crt")]
    key = kit / "supernode.key"
    return [*command, "--auth-supernode-private-key", str(key)] if key.exists() else command


def _address(coordinator: str | None, kit: Path | None) -> str:
    """The coordinator's address: the one given, or the one in the kit.

    Raises:
        InvalidInput: neither says it.
    """
    if coordinator is not None:
        return coordinator
    if kit is None:
        raise InvalidInput("give --coordinator HOST:PORT, or --kit FOLDER with a kit.json")
    try:
        return str(json.loads((kit / "kit.json").read_text("utf-8"))["coordinator"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(
            f"{kit / 'kit.json'}: does not name a coordinator ({error!r}); give --coordinator"
        ) from error


def _absolute(trainer: str) -> str:
    """A socket's path starts at the root: the relay runs in a folder of Flower's choice."""
    if not trainer.startswith("unix:"):
        return trainer
    path = str(Path(trainer.removeprefix("unix:")).absolute())
    if '"' in path or " " in path:
        raise InvalidInput(f"{path}: a socket's path has neither spaces nor quotes here")
    return "unix:" + path


def _print(findings: Sequence[Finding]) -> None:
    for found in findings:
        typer.echo(f"{found.mark:<5} {found.check}: {found.text}", err=found.error is not None)
