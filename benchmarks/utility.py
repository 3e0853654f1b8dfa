"""What privacy costs and what each method buys at equal ε: main rows, each method alone, and two peers.

    python benchmarks/utility.py run                            the missing runs of the grid, one after another
    python benchmarks/utility.py run --only 'sst2/*/3'          of these rows only
    python benchmarks/utility.py run --budget-minutes 30        start no further run after half an hour
    python benchmarks/utility.py run --again --only sst2/pld/3  also what is done: the newer line of a seed counts
    python benchmarks/utility.py small                          the demo's main arms, a few rounds, nothing is kept
    python benchmarks/utility.py list                           rows, and how many of their seeds are done
    python benchmarks/utility.py table [--short]                the full table, or the README's

Each run is ``cloister simulate`` in this process: noise and sampling come from the operating system, the seed is the
*public* one (split, initialisation). A finished run is one line of ``benchmarks/results/utility.jsonl``; a run that is
interrupted leaves nothing, and the next call goes on. Runs of one backbone share the states of its frozen layers
(``--cache-frozen-layers``). Runs that ``federation.py`` has made with the same options count.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from utility_grid import CLASSIFICATION, MAIN, PEERS, ROOT, Cell, cells, public
from utility_table import full_table, short_table

from client.backbone import load_tokenizer
from client.engine import FrozenStates
from common.config import RunConfig
from common.privacy import RDPAccountant, calibrate_noise_multiplier
from deploy.inputs import classes_of, declared_records, gather, tokenise_silos
from deploy.simulation.simulate import quiet_warnings, simulate, with_demo_preset
from deploy.workshop import DEFAULT_LENGTH, backbone_folder

RESULTS = ROOT / "benchmarks" / "results" / "utility.jsonl"
FEDERATION = ROOT / "benchmarks" / "results" / "federation.jsonl"
DECIDING = (
    "client/engine",
    "client/adapter.py",
    "client/trainer.py",
    "common/privacy",
    "server/rounds.py",
    "benchmarks/*.py",
)
SMALL = ("--rounds", "6", "--eval-every", "6")
Line = dict[str, Any]


def config_of(options: list[str], clients: Mapping[str, Mapping[str, float]] | None = None) -> RunConfig:
    """The settings that ``cloister simulate`` makes of ``options``; ``clients`` is the TOML's table of that name."""
    values: dict[str, Any] = {}
    for place, word in enumerate(options):
        if word.startswith("--"):
            following = options[place + 1 : place + 2]
            values[word[2:]] = True if not following or following[0].startswith("--") else following[0]
    return RunConfig.from_mapping(values | ({"clients": clients} if clients else {}))


def rdp_noise(options: list[str]) -> dict[str, dict[str, float]]:
    """σ of each silo by Rényi accounting at the target: what a user of other libraries adds today."""
    config = with_demo_preset(config_of(options))
    inputs = gather(config)
    classes = classes_of(config, inputs)
    tokenizer = load_tokenizer(backbone_folder(config.model))
    prepared = tokenise_silos(config, inputs.silos, tokenizer, config.max_length or DEFAULT_LENGTH, classes)
    found = {}
    for name, one in prepared.items():
        declared = declared_records(config, name, one.examples)
        sigma = calibrate_noise_multiplier(
            target_epsilon=config.target_epsilon,
            target_delta=config.target_delta or min(1e-5, 0.1 / declared),
            sample_rate=(config.expected_batch_size or 0.0) / declared,
            steps=config.rounds * config.local_steps,
            accountant=RDPAccountant,
        )
        found[name] = {"noise-multiplier": sigma}
    return found


def run(cell: Cell, seed: int, states: FrozenStates, extra: tuple[str, ...] = ()) -> Line:
    """One run with ``extra`` options, as what is kept of it."""
    if cell.arm in PEERS:
        return run_peer(cell, seed, states)
    options = [*cell.options(seed), *extra]
    clients = None
    if cell.arm == "rdp":
        clients = rdp_noise(options)
        place = options.index("--target-epsilon")
        options = options[:place] + options[place + 2 :]
    folder = Path(tempfile.mkdtemp(prefix="cloister-utility-"))
    try:
        with quiet_warnings():
            config = config_of([*options, "--output", str(folder / "run")], clients)
            result = simulate(config, states=states)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    first, last, terms = result.metrics[0], result.metrics[-1], result.terms
    events = {c.name: c.envelope.events[0].noise_multiplier for c in terms.clients if c.envelope is not None}
    return {
        "untrained_score": first["score"],
        "score": last["score"],
        "untrained_loss": first["loss"],
        "loss": last["loss"],
        "rounds": last["round"],
        "spent": max(last["epsilon"].values()) if last["epsilon"] else None,
        "delta": max(c.target_delta for c in terms.clients) if events else None,
        "noise_multiplier": {name: round(sigma, 5) for name, sigma in events.items()},
        "unit": "record",
        "relation": terms.relation,
        "sampler": "poisson",
        "accountant": "RDP, certified by PLD" if cell.arm == "rdp" else "PLD",
        "options": public(options),
        "clients": clients,
        **chance_of(config, cell.task),
    }


def run_peer(cell: Cell, seed: int, states: FrozenStates) -> Line:
    """One run of another library on the same data, adapter and backbone."""
    options = [*Cell(cell.task, "pld", cell.epsilon, cell.seeds).options(seed), "--precision", "float32"]
    config = config_of(options)
    with quiet_warnings():
        if cell.arm == "opacus-central":
            from peers.central_opacus import train_centrally

            found = train_centrally(config, states)
        else:
            from peers.flower_local import train_with_local_dp

            found = train_with_local_dp(config, states)
    return {**found, "options": public(options), **chance_of(config, cell.task)}


def chance_of(config: RunConfig, task: str) -> Line:
    """How many rows the score is taken on, and the largest class's share of them."""
    if task not in CLASSIFICATION:
        return {}
    labels = Counter(str(row["label"]) for row in gather(config).evaluation)
    return {"evaluated": labels.total(), "majority": max(labels.values()) / labels.total()}


def finished() -> list[Line]:
    """Every line of the grid, and those of ``federation.py`` that belong to it."""
    lines = [json.loads(line) for line in RESULTS.read_text("utf-8").splitlines()] if RESULTS.exists() else []
    return [*lines, *_adopted()]


def _adopted() -> Iterator[Line]:
    by_options = {
        _compared(public(cell.options(seed))): cell
        for cell in cells()
        if cell.task in ("medquad", "demo", "sst2") and cell.arm != "rdp"
        for seed in cell.seeds
    }
    for text in FEDERATION.read_text("utf-8").splitlines() if FEDERATION.exists() else ():
        line = json.loads(text)
        cell = by_options.get(_compared(line["options"])) if not line["extra"] else None
        if cell is not None:
            spent = max(line["spent"].values()) if line["spent"] else None
            delta = max(line["delta"].values()) if line["spent"] else None
            yield {**line, "row": cell.name, "arm": cell.arm, "spent": spent, "delta": delta}


def _compared(options: list[str]) -> frozenset[str]:
    """Options without order, folders, the backbone's name, and what changes speed and rounding alone."""
    left_out = {"--cache-frozen-layers", "--precision", "bf16", "all-MiniLM-L6-v2"}
    return frozenset(one.rsplit("/", 1)[-1] for one in options) - left_out


def missing(only: list[str], *, again: bool = False) -> Iterator[tuple[Cell, int]]:
    """The runs that are still to be made, in order; with ``again`` all of those rows."""
    done = set() if again else {(line["row"], line["seed"]) for line in finished()}
    for cell in cells():
        if not only or any(fnmatch.fnmatch(cell.name, pattern) for pattern in only):
            yield from ((cell, seed) for seed in cell.seeds if (cell.name, seed) not in done)


def work(only: list[str], budget_s: float | None, *, again: bool) -> None:
    """Make the missing runs until they or the time are at an end."""
    began, data, states = time.monotonic(), "", FrozenStates()
    for cell, seed in list(missing(only, again=again)):
        if budget_s is not None and time.monotonic() - began > budget_s:
            break
        if cell.task.split("-")[0] != data:  # the states of the last data set are not needed any more
            data, states = cell.task.split("-")[0], FrozenStates()
        line = timed(cell, seed, states)
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        shown = {name: line[name] for name in ("row", "seed", "score", "loss", "spent", "cpu_seconds")}
        print(json.dumps(shown), flush=True)


def timed(cell: Cell, seed: int, states: FrozenStates, *, extra: tuple[str, ...] = ()) -> Line:
    """One run as a whole line, with what it took."""
    wall, cpu = time.monotonic(), time.process_time()
    found = run(cell, seed, states, extra)
    return {
        "row": cell.name,
        "task": cell.task,
        "arm": cell.arm,
        "epsilon": cell.epsilon,
        "seed": seed,
        **found,
        "cpu_seconds": round(time.process_time() - cpu),
        "wall_seconds": round(time.monotonic() - wall),
        "commit": commit(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
    }


def small() -> None:
    """The main arms on the demo with a quarter of its rounds: shows that all of it runs, not what it buys."""
    rows = [Cell("demo", arm, None if arm == "none" else 8.0, (0,)) for arm in MAIN]
    lines = [timed(cell, 0, FrozenStates(), extra=SMALL) for cell in rows]
    print(full_table(lines, rows))


def commit() -> str:
    """What is checked out, with a plus when a file that decides figures differs from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", *DECIDING)
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="make the missing runs")
    runs.add_argument("--only", nargs="+", default=[], metavar="PATTERN", help="rows, as 'list' names them")
    runs.add_argument("--again", action="store_true", help="also runs that are done")
    runs.add_argument("--budget-minutes", type=float, help="start no further run after so many minutes")
    commands.add_parser("list", help="the rows of the grid")
    commands.add_parser("small", help="the demo's main arms, in minutes")
    shown = commands.add_parser("table", help="Markdown")
    shown.add_argument("--short", action="store_true", help="the main rows only")
    given = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    if given.command == "run":
        work(given.only, None if given.budget_minutes is None else 60 * given.budget_minutes, again=given.again)
    elif given.command == "small":
        small()
    elif given.command == "table":
        print((short_table if given.short else full_table)(finished(), list(cells())))
    else:
        done = Counter(line["row"] for line in finished())
        for cell in cells():
            print(f"{min(done[cell.name], len(cell.seeds))}/{len(cell.seeds)}  {cell.name}")


if __name__ == "__main__":
    sys.exit(main())
