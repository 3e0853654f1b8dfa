"""What a person sees while a simulation runs: bars on a terminal, plain lines elsewhere, nothing with ``--json``."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from client.data.tokens import Prepared
from common.text import MOST_LINE, shown
from deploy.inputs import Inputs
from deploy.simulation.simulate import Result, Watcher
from server.accountant import Denial, Outcome
from server.terms import RunTerms

EVERY_LINES = 10
"""About so many lines of progress when the output is no terminal."""


class Terminal(Watcher):
    """Rich progress for rounds and clients; use it as a context."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._rounds = self._clients = None
        self._total = 1

    def __enter__(self) -> Terminal:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        """One line about what is going on."""
        self._console.print(escape(shown(text, MOST_LINE)), highlight=False)

    def warn(self, text: str) -> None:
        """One warning."""
        self._console.print(f"[yellow]warning:[/yellow] {escape(shown(text, MOST_LINE))}", highlight=False)

    def prepared(self, terms: RunTerms, prepared: Mapping[str, Prepared], inputs: Inputs, output: Path) -> None:
        """The silos and what each will spend, before round 1."""
        self._total = terms.rounds
        self._console.print(_silos(terms))
        for name, one in prepared.items():
            if one.truncated:
                self.say(
                    f"{name}: {one.truncated} of {len(one.examples)} records are longer than the context and are cut"
                )
            if one.set_aside:
                self.say(f"{name}: {one.set_aside} records keep no completion token and are set aside")
        if inputs.held_out:
            self.say(
                f"{inputs.held_out} records are set aside for evaluation; they count as public and are not covered"
            )
        self.say(f"results go to {output}/")
        self._rounds = self._bars.add_task("rounds", total=terms.rounds, note="")
        self._clients = self._bars.add_task("clients", total=1, note="")

    def round_started(self, server_round: int, clients: tuple[str, ...]) -> None:
        """A new round."""
        self._bars.reset(self._clients, total=len(clients), note="")

    def stepped(self, client: str, step: int, steps: int) -> None:
        """One local step."""
        self._bars.update(self._clients, note=escape(f"{client} step {step}/{steps}"))

    def answered(self, server_round: int, client: str, outcome: Outcome, reason: str) -> None:
        """One client's answer."""
        self._bars.advance(self._clients)
        if outcome is not Outcome.REPLIED:
            self.warn(f"round {server_round}: {client}: {outcome}: {reason}")

    def denied(self, server_round: int, denial: Denial) -> None:
        """A client leaves."""
        self.say(
            f"round {server_round}: {denial.client} leaves: ε {denial.spent:.4g} is spent, "
            f"another round would reach {denial.asked:.4g}"
        )

    def round_ended(self, record: Mapping[str, Any]) -> None:
        """A line of metrics."""
        number = record["round"]
        score = "" if record["score"] is None else f"score {_number(record['score'])}  loss {_number(record['loss'])}"
        self._bars.update(self._rounds, completed=number, note=score)
        step = max(1, self._total // EVERY_LINES)
        if not self._console.is_terminal and (number % step == 0 or number == self._total):
            self.say(f"round {number}/{self._total}  {score}  {_largest(record)}  {record['seconds']:.1f} s")


def closing(result: Result, console: Console) -> None:
    """The table at the end, and where the files are."""
    table = Table(title=f"run {result.terms.run_id}", title_justify="left")
    table.add_column("round", justify="right")
    table.add_column("score", justify="right")
    table.add_column("loss", justify="right")
    for client in result.terms.clients:
        table.add_column(escape(f"ε {client.name}"), justify="right")
    step = max(1, len(result.metrics) // 8)
    shown = [line for i, line in enumerate(result.metrics) if i % step == 0 or i == len(result.metrics) - 1]
    for line in shown:
        epsilon = line["epsilon"] or {}
        table.add_row(
            str(line["round"]),
            _number(line["score"]),
            _number(line["loss"]),
            *(_number(epsilon.get(client.name)) for client in result.terms.clients),
        )
    console.print(table)
    console.print(_meaning(result), highlight=False)
    console.print(
        f"adapter, certificate, metrics, ledger and report: {escape(str(result.output))}/\n"
        f"check it: {_command()} certificate verify {escape(str(result.output))}/certificate.json",
        highlight=False,
        soft_wrap=True,  # a command in two lines cannot be copied
    )


def _command() -> str:
    """How this very program is called from here: by name where it is on the path, else by its file."""
    called = Path(sys.argv[0])
    return called.name if shutil.which(called.name) else os.path.relpath(called)


def _meaning(result: Result) -> str:
    if not result.certificate.private:
        return "[red]not private:[/red] " + "; ".join(result.certificate.reasons)
    deltas = sorted({client.target_delta for client in result.terms.clients if client.target_delta})
    shown = f"{deltas[0]:g}" if len(deltas) == 1 else f"{deltas[0]:g} to {deltas[-1]:g}"
    return (
        f"ε is an upper bound (PLD) for each record of one organisation, at δ = {shown}, "
        f"relation {result.terms.relation}, Poisson sampling"
    )


def _silos(terms: RunTerms) -> Table:
    table = Table(title=f"{len(terms.clients)} silos, {terms.rounds} rounds", title_justify="left")
    for name in ("silo", "declared records", "batch", "q", "σ", "target ε", "δ"):
        table.add_column(name, justify="left" if name == "silo" else "right")
    for client in terms.clients:
        event = client.envelope.events[0] if client.envelope and client.envelope.events else None
        table.add_row(
            escape(client.name),
            str(client.declared_records),
            f"{client.expected_batch_size:g}",
            f"{client.expected_batch_size / client.declared_records:.4f}",
            "–" if event is None else f"{event.noise_multiplier:.4f}",
            "–" if client.target_epsilon is None else f"{client.target_epsilon:.4g}",
            "–" if client.target_delta is None else f"{client.target_delta:g}",
        )
    return table


def _largest(record: Mapping[str, Any]) -> str:
    return f"largest ε {max(record['epsilon'].values()):.4f}" if record["epsilon"] else "no privacy"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
