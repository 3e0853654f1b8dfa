"""The command ``cloister``.

Exit codes: 0 done · 1 something failed · 2 a setting, a file or a record is wrong · 4 a privacy budget does not allow
it · 5 refused by a policy, signature or plan · 6 a ledger, certificate or checkpoint does not verify · 7 something
cannot be reached · 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from rich.console import Console
from rich.markup import escape

from common.config import RunConfig
from common.errors import CloisterError, Interrupted
from common.text import MOST_LINE, shown
from deploy.commands.accountant import accountant_app
from deploy.commands.adapter import adapter_app
from deploy.commands.backbone import backbone_app
from deploy.commands.client_dashboard import dashboard as client_dashboard
from deploy.commands.coordinator import coordinator_app
from deploy.commands.dashboard import register as register_dashboard
from deploy.commands.ledger import certificate_app, ledger_app
from deploy.commands.logs import LogFormat, begin, report, report_fault
from deploy.commands.options import with_run_options
from deploy.commands.plan import calibrate, plan
from deploy.commands.policy import policy_app, register_budget
from deploy.commands.provision import provision_app
from deploy.commands.report import report as write_report_again
from deploy.commands.trainer import register as register_trainer

app = typer.Typer(
    name="cloister",
    help="Fine-tune a language model across organisations under differential privacy that an auditor can check.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="print one JSON object instead of tables")]


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    _State.debug = debug


class _State:
    """What ``main`` needs to know about the command line."""

    debug = False


def _simulate(config: RunConfig, as_json: Json = False, log_format: LogFormat = "text") -> None:
    """Train an adapter across the silos of this machine; without options, the embedded demo."""
    begin(log_format, holds_records=True, level=logging.INFO if log_format == "json" else logging.WARNING)
    if log_format == "text" and not as_json:
        typer.echo("loading the libraries …")  # torch alone takes seconds, and a silent terminal looks broken
    from deploy.simulation.simulate import Watcher, quiet_warnings, simulate

    if log_format == "json":
        from deploy.simulation.log_watcher import LogWatcher

        watcher = LogWatcher()
        with quiet_warnings():
            result = simulate(config, watcher)
        watcher.finished(result)
        if as_json:
            _print_json(_summary(result))
        return
    if as_json:
        with quiet_warnings():
            result = simulate(config, Watcher())
        _print_json(_summary(result))
        return
    from deploy.simulation.terminal import Terminal, closing

    console = Console(stderr=False)
    with quiet_warnings(), Terminal(console) as terminal:
        terminal.say("loading the backbone and trying the engine on made-up tokens …")
        result = simulate(config, terminal)
    closing(result, console)


app.command("simulate")(with_run_options(_simulate))
app.command("report")(write_report_again)
app.command("plan")(plan)
app.command("calibrate")(calibrate)
app.add_typer(accountant_app)
client_app = typer.Typer(help="An organisation's own side.", no_args_is_help=True)
client_app.add_typer(policy_app)
register_budget(client_app)
register_trainer(client_app)
client_app.command("dashboard")(client_dashboard)
app.add_typer(client_app, name="client")
app.add_typer(coordinator_app)
register_dashboard(app)
app.add_typer(ledger_app)
app.add_typer(certificate_app)
app.add_typer(provision_app)
app.add_typer(backbone_app)
app.add_typer(adapter_app)


@app.command()
def evaluate(
    adapter: Annotated[Path, typer.Option("--adapter", help="adapter folder of a run")],
    eval_data: Annotated[str, typer.Option("--eval-data", help="public evaluation set, or 'demo'")],
    model: Annotated[str | None, typer.Option("--model", help="backbone; default: the one it was trained on")] = None,
    prompt_column: Annotated[str | None, typer.Option("--prompt-column", help="column with the prompt or text")] = None,
    completion_column: Annotated[
        str | None, typer.Option("--completion-column", help="column with the completion")
    ] = None,
    label_column: Annotated[str | None, typer.Option("--label-column", help="column with the class")] = None,
    as_json: Json = False,
) -> None:
    """Score a saved adapter on a public set, through stock ``peft``."""
    from client.data import ColumnNames
    from deploy.reporting.use import evaluate_adapter
    from deploy.simulation.simulate import quiet_warnings

    columns = ColumnNames(prompt_column, completion_column, label_column)
    with quiet_warnings():
        found = evaluate_adapter(adapter, eval_data, model, columns)
    if as_json:
        _print_json({"score": found.score, "loss": found.loss, "count": found.count})
    else:
        typer.echo(f"score {found.score:.4f}  loss {found.loss:.4f}  ({found.count} predictions)")


@app.command()
def generate(
    adapter: Annotated[Path, typer.Option("--adapter", help="adapter folder of a run")],
    prompt: Annotated[str, typer.Option("--prompt", help="what to answer")],
    model: Annotated[str | None, typer.Option("--model", help="backbone; default: the one it was trained on")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="tokens of the answer")] = 64,
    as_json: Json = False,
) -> None:
    """Answer a prompt with a saved adapter (greedy)."""
    from deploy.reporting.use import generate_with_adapter
    from deploy.simulation.simulate import quiet_warnings

    with quiet_warnings():
        answer = generate_with_adapter(adapter, prompt, model, max_new_tokens)
    if as_json:
        _print_json({"prompt": prompt, "completion": answer})
    else:
        typer.echo(answer)


def _summary(result: Any) -> dict[str, Any]:
    first, last = result.metrics[0], result.metrics[-1]
    return {
        "run_id": result.terms.run_id,
        "output": str(result.output),
        "private": result.certificate.private,
        "reasons": list(result.certificate.reasons),
        "rounds": last["round"],
        "untrained_score": first["score"],
        "score": last["score"],
        "untrained_loss": first["loss"],
        "loss": last["loss"],
        "epsilon": last["epsilon"],
        "delta": {client.name: client.target_delta for client in result.terms.clients},
        "relation": result.terms.relation,
        "unit": "record",
        "sampler": "poisson",
    }


def _print_json(body: dict[str, Any]) -> None:
    typer.echo(json.dumps(body, ensure_ascii=False))


def main() -> None:
    """Run the command; every deliberate error is one line on stderr and its own exit code."""
    # Before torch is loaded: threads that wait must sleep, or a busy machine spends its time on spinning.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code = app(standalone_mode=False)
    except click.exceptions.Exit as exit_request:
        sys.exit(exit_request.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.exceptions.Abort):
        _fail(Interrupted("interrupted; go on with --resume and the same --output"))
    except CloisterError as error:
        _fail(error)
    except Exception as error:
        if _State.debug or not report_fault(error):
            raise
        sys.exit(1)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _fail(error: CloisterError) -> None:
    if _State.debug:
        raise error
    if report(error):
        sys.exit(error.exit_code)
    words = shown(error, MOST_LINE, keep="\n")
    Console(stderr=True).print(f"[red]error:[/red] {escape(words)}", highlight=False, soft_wrap=True)
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
