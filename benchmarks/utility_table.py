"""Tables from the lines of ``utility.py``: means and spreads, paired differences, and what is no better than chance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from utility_grid import MAIN, METHODS, PEERS, Cell

Line = dict[str, Any]
ARMS = {
    "none": "without privacy",
    "rdp": "DP, noise by RDP",
    "pld": "DP, noise by PLD",
    "best": "DP by PLD, preset",
    "opacus-central": "peer: central DP-LoRA, Opacus on pooled data",
    "flower-local-dp": "peer: Flower's LocalDpMod",
}


def short_table(lines: Sequence[Line], cells: Sequence[Cell]) -> str:
    """The README's: one line per task and ε, one column per main arm."""
    rows = ["| task | ε | without privacy | noise by RDP | noise by PLD | preset |", "|---|---|---|---|---|---|"]
    wanted = dict.fromkeys((cell.task, cell.epsilon) for cell in cells if cell.arm == "pld")
    for task, epsilon in wanted:
        found = [_runs(lines, Cell(task, arm, None if arm == "none" else epsilon, ())) for arm in MAIN]
        if any(found[1:]):
            rows.append(f"| {task} | {epsilon:g} | " + " | ".join(_score(runs) for runs in found) + " |")
    return "\n".join(rows)


def full_table(lines: Sequence[Line], cells: Sequence[Cell]) -> str:
    """docs/methods.md's: every row with what its ε means, then the methods' differences, then the commits."""
    done = [(cell, runs) for cell in cells if (runs := _runs(lines, cell))]
    parts = [_rows([one for one in done if one[0].arm in (*MAIN, *PEERS)])]
    methods = [one for one in done if one[0].arm in METHODS]
    if methods:
        parts.append(_differences(methods, lines))
    return "\n\n".join(parts)


def _rows(done: Sequence[tuple[Cell, list[Line]]]) -> str:
    rows = [
        "| task | arm | ε asked | ε certified | unit, relation, sampler, accountant, δ "
        "| seeds | score | loss | CPU-min |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell, runs in done:
        asked = "–" if cell.epsilon is None else f"{cell.epsilon:g}"
        spent = [run["spent"] for run in runs if run["spent"] is not None]
        terms = runs[-1]
        means = "–"
        if spent:
            delta = max(run["delta"] for run in runs)
            means = ", ".join(terms[k] for k in ("unit", "relation", "sampler", "accountant")) + f", δ {delta:.2g}"
        minutes = statistics.fmean(run["cpu_seconds"] for run in runs) / 60
        cells = (cell.task, ARMS[cell.arm], asked, f"{max(spent):.2f}" if spent else "–", means, len(runs))
        rows.append(
            "| " + " | ".join(map(str, cells)) + f" | {_score(runs)} | {_spread(runs, 'loss')} | {minutes:.1f} |"
        )
    return "\n".join(rows)


def _differences(done: Sequence[tuple[Cell, list[Line]]], lines: Sequence[Line]) -> str:
    rows = [
        "| task, ε | method alone | options | pairs | score − plain | loss − plain |",
        "|---|---|---|---|---|---|",
    ]
    for cell, runs in done:
        plain = {run["seed"]: run for run in _runs(lines, Cell(cell.task, "pld", cell.epsilon, ()))}
        pairs = [(run, plain[run["seed"]]) for run in runs if run["seed"] in plain]
        options = " ".join(METHODS[cell.arm]).replace("--", "").replace("|", "\\|")
        found = [_difference(pairs, name) for name in ("score", "loss")]
        note = ", chance" if _is_chance(runs) else ""
        rows.append(
            f"| {cell.task}, {cell.epsilon:g} | {cell.arm} | {options} | {len(pairs)} | {found[0]}{note} | {found[1]} |"
        )
    return "\n".join(rows)


def _runs(lines: Sequence[Line], cell: Cell) -> list[Line]:
    """The row's latest line per seed."""
    return list({line["seed"]: line for line in lines if line["row"] == cell.name}.values())


def _difference(pairs: Sequence[tuple[Line, Line]], name: str) -> str:
    """Mean ± standard error of the paired differences."""
    if not pairs:
        return "–"
    values = [one[name] - plain[name] for one, plain in pairs]
    mean = f"{statistics.fmean(values):+.4f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.4f}"


def _score(runs: Sequence[Line]) -> str:
    if not runs:
        return "–"
    return _spread(runs, "score") + (" (chance)" if _is_chance(runs) else "")


def _spread(runs: Sequence[Line], name: str) -> str:
    values = [run[name] for run in runs]
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.3f}"


def _is_chance(runs: Sequence[Line]) -> bool:
    """Whether the mean accuracy is within two standard errors of the largest class's share.

    The runs are scored on the same rows, so the error is that of one evaluation, whatever the number of seeds.
    """
    share, count = runs[-1].get("majority"), runs[-1].get("evaluated")
    if share is None or count is None:
        return False
    return statistics.fmean(run["score"] for run in runs) <= share + 2 * math.sqrt(share * (1 - share) / count)
