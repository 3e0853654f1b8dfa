"""The commands ``cloister plan`` and ``cloister calibrate``: options in, tables or one JSON object out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from common.config import RunConfig, default_delta
from common.errors import InvalidInput
from common.privacy.checks import Relation
from common.privacy.schedules import KINDS
from deploy.planning.calibration import CalibrationReport, calibration_report
from deploy.planning.config import plan_from_config
from deploy.planning.memory import arena_bytes_per_record
from deploy.planning.plan import (
    FederationReport,
    NoiseShape,
    PlanReport,
    RoundPlan,
    plan_report,
)

Json = Annotated[bool, typer.Option("--json", help="print one JSON object instead of tables")]
Rate = Annotated[float | None, typer.Option("--sample-rate", help="q, the chance of a record to be in a step")]
Batch = Annotated[float | None, typer.Option("--expected-batch-size", help="expected records per step, instead of q")]
Records = Annotated[int | None, typer.Option("--declared-records", help="public constant behind q and the default δ")]
Delta = Annotated[
    float | None, typer.Option("--target-delta", help="δ; default min(1e-5, 0.1/declared records), or 1e-5")
]
RelationOption = Annotated[str, typer.Option("--relation", help="add_remove, zero_out or replace_one")]
Rounds = Annotated[int, typer.Option("--rounds", help="rounds of the run")]
Steps = Annotated[int, typer.Option("--local-steps", help="DP-SGD steps per round")]
Schedule = Annotated[str, typer.Option("--noise-schedule", help=", ".join(KINDS))]
Final = Annotated[float, typer.Option("--noise-final", help="last round's noise over the first's")]
Drop = Annotated[float, typer.Option("--noise-drop", help="factor of the step schedule")]
Every = Annotated[
    int | None, typer.Option("--noise-every", help="rounds between two steps of the step schedule; default a quarter")
]
ServerSchedule = Annotated[
    str, typer.Option("--server-schedule", help="the server's learning rate, which lr-matched noise follows")
]


def plan(
    noise_multiplier: Annotated[
        float | None, typer.Option("--noise-multiplier", help="σ, noise over clipping norm")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="TOML file of a run: plan every organisation of it", metavar="FILE")
    ] = None,
    rounds: Rounds = 40,
    local_steps: Steps = 1,
    sample_rate: Rate = None,
    expected_batch_size: Batch = None,
    declared_records: Records = None,
    target_epsilon: Annotated[float | None, typer.Option("--target-epsilon", help="budget to fit rounds into")] = None,
    target_delta: Delta = None,
    relation: RelationOption = "add_remove",
    noise_schedule: Schedule = "constant",
    noise_final: Final = 0.5,
    noise_drop: Drop = 0.5,
    noise_every: Every = None,
    server_schedule: ServerSchedule = "constant",
    plot: Annotated[Path | None, typer.Option("--plot", help="write ε over the rounds to FILE.png or FILE.svg")] = None,
    as_json: Json = False,
) -> None:
    """Show what a run will cost, by every accountant, before any data is touched."""
    if config is not None:
        federation = plan_from_config(config)
        rows = arena_bytes_per_record(RunConfig.load(config, {}))
        if as_json:
            body = federation.to_json() | {"arena_bytes_per_record": rows}
            typer.echo(json.dumps(body, ensure_ascii=False))
        else:
            print_federation(federation, Console())
            print_memory(rows, Console())
        return
    if noise_multiplier is None:
        raise InvalidInput("give --noise-multiplier for one organisation, or --config FILE.toml for a federation")
    with invalid_input():
        rate = _rate(sample_rate, expected_batch_size, declared_records)
        shape = NoiseShape(noise_schedule, noise_final, noise_drop, noise_every, server_schedule)
        rounds_plan = RoundPlan(noise_multiplier, rate, local_steps, rounds, shape)
        report = plan_report(
            rounds_plan,
            target_delta=_delta(target_delta, declared_records),
            target_epsilon=target_epsilon,
            relation=cast(Relation, relation),
        )
        if plot is not None:
            write_plot(report, plot)
    if as_json:
        typer.echo(json.dumps(report.to_json(), ensure_ascii=False))
    else:
        print_plan(report, Console())


def calibrate(
    target_epsilon: Annotated[float, typer.Option("--target-epsilon", help="ε that the whole run must not exceed")],
    rounds: Rounds = 40,
    local_steps: Steps = 1,
    sample_rate: Rate = None,
    expected_batch_size: Batch = None,
    declared_records: Records = None,
    target_delta: Delta = None,
    relation: RelationOption = "add_remove",
    noise_schedule: Schedule = "constant",
    noise_final: Final = 0.5,
    noise_drop: Drop = 0.5,
    noise_every: Every = None,
    server_schedule: ServerSchedule = "constant",
    as_json: Json = False,
) -> None:
    """Find the smallest noise whose certified ε meets a target."""
    with invalid_input():
        report = calibration_report(
            target_epsilon=target_epsilon,
            target_delta=_delta(target_delta, declared_records),
            sample_rate=_rate(sample_rate, expected_batch_size, declared_records),
            rounds=rounds,
            local_steps=local_steps,
            relation=cast(Relation, relation),
            shape=NoiseShape(noise_schedule, noise_final, noise_drop, noise_every, server_schedule),
        )
    if as_json:
        typer.echo(json.dumps(report.to_json(), ensure_ascii=False))
    else:
        print_calibration(report, Console())


@contextmanager
def invalid_input() -> Iterator[None]:
    """Turn the ``ValueError`` of a setting into the error with exit code 2."""
    try:
        yield
    except InvalidInput:
        raise
    except ValueError as error:
        raise InvalidInput(str(error)) from error


def _rate(sample_rate: float | None, expected_batch_size: float | None, declared_records: int | None) -> float:
    if sample_rate is not None:
        if expected_batch_size is not None:
            raise InvalidInput("give --sample-rate, or --expected-batch-size with --declared-records, not both")
        return sample_rate
    if expected_batch_size is None or declared_records is None:
        raise InvalidInput("give --sample-rate, or --expected-batch-size together with --declared-records")
    return expected_batch_size / declared_records


def _delta(target_delta: float | None, declared_records: int | None) -> float:
    if target_delta is not None:
        return target_delta
    return default_delta(declared_records) if declared_records else 1e-5


def print_plan(report: PlanReport, console: Console) -> None:
    """Print a plan as tables."""
    meaning = f"δ = {report.delta:g}, {report.relation}, per {report.unit}, {report.sampler} sampling"
    accountants = Table(title=f"The whole plan: {meaning}", title_justify="left")
    for column in ("accountant", "kind", "ε", ""):
        accountants.add_column(column, justify="right" if column == "ε" else "left")
    for row in report.accountants:
        accountants.add_row(row.accountant, row.kind, _number(row.epsilon), row.note)
    console.print(accountants)
    curve = Table(title="After each round", title_justify="left")
    for column in ("round", "ε (pld)", "ε (rdp)", "ε (estimate)"):
        curve.add_column(column, justify="right")
    stride = max(1, len(report.curve) // 12)
    shown = [point for i, point in enumerate(report.curve) if i % stride == 0 or point is report.curve[-1]]
    for point in shown:
        curve.add_row(
            str(point.server_round), _number(point.epsilon), _number(point.epsilon_rdp), _number(point.epsilon_estimate)
        )
    console.print(curve)
    dials = Table(title="Turning one dial", title_justify="left")
    for column in ("dial", "to", "ε", "change"):
        dials.add_column(column, justify="left" if column == "dial" else "right")
    for dial in report.dials:
        dials.add_row(dial.dial, f"{dial.value:.4g}", _number(dial.epsilon), f"{dial.change:+.1%}")
    console.print(dials)
    if report.target_epsilon is not None:
        console.print(
            f"Within ε = {report.target_epsilon:g}: {report.rounds_that_fit} rounds fit; all {report.plan.rounds} do "
            f"with noise-multiplier {report.noise_multiplier_for_target:.4f}.",
            highlight=False,
        )


def print_calibration(report: CalibrationReport, console: Console) -> None:
    """Print a calibration as a table."""
    meaning = f"δ = {report.target_delta:g}, {report.relation}, per {report.unit}, {report.sampler} sampling"
    table = Table(title=f"Noise for ε ≤ {report.target_epsilon:g}: {meaning}", title_justify="left")
    for column in ("", ""):
        table.add_column(column)
    table.add_row("noise-multiplier (certified by pld)", f"{report.noise_multiplier:.4f}")
    table.add_row("certified ε", _number(report.epsilon))
    saved = f"{report.noise_saved:.1%} less with pld"
    table.add_row("noise-multiplier by rdp", f"{report.noise_multiplier_rdp:.4f} ({saved})")
    table.add_row("steps allowed at rdp's noise", f"{report.steps_at_rdp_noise}")
    table.add_row("sample-rate allowed at rdp's noise", f"{report.sample_rate_at_rdp_noise:.4g}")
    if report.noise_schedule != "constant":
        first, last = report.noise_multipliers[0], report.noise_multipliers[-1]
        table.add_row(f"noise-schedule {report.noise_schedule}", f"σ from {first:.4f} to {last:.4f}")
    console.print(table)


def print_federation(report: FederationReport, console: Console) -> None:
    """Print what each client of a federation will have spent."""
    meaning = f"{report.relation}, per {report.unit}, {report.sampler} sampling"
    table = Table(title=f"The federation: {meaning}", title_justify="left")
    for column in ("client", "rounds", "δ", "ε (pld)", "ε (rdp)", "target", "fits"):
        table.add_column(column, justify="left" if column == "client" else "right")
    for client in report.clients:
        fits = "" if client.fits is None else ("yes" if client.fits else "no")
        target = "" if client.target_epsilon is None else f"{client.target_epsilon:g}"
        table.add_row(
            client.name,
            str(client.rounds),
            f"{client.delta:g}",
            _number(client.epsilon),
            _number(client.epsilon_rdp),
            target,
            fits,
        )
    console.print(table)
    console.print(f"A person in one organisation only: ε = {_number(report.epsilon)} (the largest).", highlight=False)


def print_memory(arena_bytes: int | None, console: Console) -> None:
    """Print what gradient rows add to the memory of a step."""
    if arena_bytes is None:
        text = "Memory of gradient rows: not known here (needs the backbone's folder and the client's libraries)."
    else:
        text = f"Memory of gradient rows: {arena_bytes / 2**20:.2f} MiB for each record in a micro-batch."
    console.print(text, highlight=False)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def write_plot(report: PlanReport, path: Path) -> None:
    """Write ε over the rounds as PNG or SVG.

    Raises:
        InvalidInput: for another ending, or where matplotlib is not installed.
    """
    if path.suffix.lower() not in (".png", ".svg"):
        raise InvalidInput(f"--plot must end in .png or .svg, got {path}")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InvalidInput("--plot needs matplotlib: pip install 'cloister[plot]'") from None
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    rounds = [point.server_round for point in report.curve]
    axes.plot(rounds, [point.epsilon for point in report.curve], label="PLD (certified)", linewidth=2)
    axes.plot(rounds, [point.epsilon_rdp for point in report.curve], label="RDP (upper bound)", linestyle="--")
    guesses = [float("nan") if p.epsilon_estimate is None else p.epsilon_estimate for p in report.curve]
    axes.plot(rounds, guesses, label="Edgeworth, tilted (estimate)", linestyle=":")
    if report.target_epsilon is not None:
        axes.axhline(report.target_epsilon, color="black", linewidth=0.8, label="target")
    axes.set_xlabel("round")
    axes.set_ylabel(f"ε at δ = {report.delta:g} ({report.relation}, {report.sampler})")
    axes.legend()
    figure.savefig(path)
