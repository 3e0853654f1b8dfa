"""``cloister client dashboard``: the organisation's own page, on loopback, for whoever has the printed address."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated

import typer

from client.settings import FILE, TrainerSettings
from deploy.commands.logs import LogFormat, announcer, begin

HOST = "127.0.0.1"


def dashboard(
    policy: Annotated[Path, typer.Option("--policy", help="the organisation's policy (TOML)")],
    settings: Annotated[
        Path | None, typer.Option("--settings", help=f"the trainer's own settings; default: {FILE} beside the policy")
    ] = None,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="on loopback; 0: any that is free")] = 0,
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", help="keep the token of the address here (0600) instead of printing a new one"),
    ] = None,
    log_format: LogFormat = "text",
) -> None:
    """Show this organisation's budgets, releases and refusals, and the running round; ends cleanly on SIGTERM.

    Read from its ledger, for reading only, and from the trainer's local socket; nothing of it leaves this machine. Run
    it as the trainer's user. The address holds a random token: who does not have it is shown nothing.
    """
    from client.dashboard.app import address, build_app
    from client.dashboard.view import Lookout
    from common.pages.access import Token
    from common.pages.serving import listen, server

    begin(log_format)
    own = TrainerSettings.load(settings or policy.with_name(FILE))
    lookout = Lookout(policy, own.ledger, Path(own.status))
    text = secrets.token_urlsafe(32) if token_file is None else None
    token = Token(text) if text is not None else Token.load_or_create(token_file or Path())
    with listen(HOST, port) as listener:
        found = listener.getsockname()[1]
        # On standard output and never in a log, which may be collected: whoever has the address may look.
        typer.echo(address(found, text) if text else f"http://{HOST}:{found}/TOKEN/ with the token in {token_file}")
        announcer(log_format)("this organisation's page is served until SIGTERM; it stays on this machine")
        server(build_app(lookout, token, port=found)).run(sockets=[listener])
